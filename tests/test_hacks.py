import json

import pytest

from storygen.hacks import FAMILIES, hack
from tests.reward_data import data_folder, held_out


@pytest.mark.parametrize("family", FAMILIES)
def test_hacks_are_seeded_and_change_the_row(family):
    rows = held_out(4)
    before = json.dumps(rows)
    one = hack(family, rows, 1, seed=3)
    assert one == hack(family, rows, 1, seed=3) != rows[1]
    assert json.dumps(rows) == before
    assert one["prompt"] == rows[1]["prompt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_stop_words_alone_and_of_none_can_be_hacked(family):
    plain = {"prompt": "What have you done?", "think": "It was you.", "story": "Who was it?", "finished": True}
    terse = {"prompt": "Dragons fly.", "think": "Dragons fly.", "story": "Dragons fly.", "finished": True}
    for i in (0, 1):
        assert hack(family, [plain, terse], i, seed=3).keys() >= {"prompt", "think", "story"}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The held-out rows as a run's samples, two per prompt: the better one is audited."""
    path = tmp_path_factory.mktemp("run") / "samples.jsonl"
    rows = [row | {"step": 1, "reward": reward} for row in held_out(4) for reward in (0.5, 0.9)]
    rows[0]["story"] = rows[2]["story"] = "Worse. The end."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_family_loses(script, logged):
    """On held-out human rows and on a run's samples, hardly any hack exceeds the reward of the row it was made from.

    The calibration here uses few rows; `reward.py audit` after data_prep.py is the real measurement.
    """
    arguments = ("--data", data_folder(), "--rows", "16", "--samples", logged, "--json")
    result = script("reward.py", "audit", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert set(report["families"]) == set(report["samples"]) == set(FAMILIES)
    assert report["families"][report["worst"]] <= 2 / 16
    assert sum(share == 0 for share in report["families"].values()) >= len(FAMILIES) - 4
    assert max(report["samples"].values()) <= 1 / 4


def test_samples_that_cannot_be_audited(script, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(held_out(1)[0] | {"reward": 0.1}) + "\n", encoding="utf-8")
    result = script("reward.py", "audit", "--data", data_folder(), "--samples", path)
    assert result.returncode == 2
    assert "holds 1 samples" in result.stderr
