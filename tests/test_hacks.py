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


def test_every_family_loses(script):
    """On held-out human rows no hack reaches the reward of the row it was made from."""
    result = script("reward.py", "audit", "--data", data_folder(), "--rows", "16", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert set(report["families"]) == set(FAMILIES)
    assert report["families"][report["worst"]] == 0
