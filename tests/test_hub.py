"""data_prep.py by its bare command, with the real hub clients, from a local hub."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storygen.corpus import load_manifest, load_prompts, load_sft, read_rows
from tests.hub import Hub, sha

ROOT = Path(__file__).parents[1]
STORIES, OUTLINES = "euclaise/writingprompts", "hungq/outline-story-2000"
CARD = b"---\nlicense: mit\n---\n# A set\n"


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [row for row in read_rows("corpus") if row["story"]][:60]


@pytest.fixture
def hub(rows):
    """The stories as parquet in two splits, the outlines as jsonl, each with the columns of the real sets."""
    stories = [{"prompt": f"[ WP ] {row['prompt']}", "story": row["story"]} for row in rows[20:]]
    outlines = [{"prompt": row["prompt"], "outline": row["think"], "story": row["story"]} for row in rows[:20]]
    server = Hub({
        STORIES: {"README.md": CARD, "data/train-00000-of-00001.parquet": parquet(stories[:30]),
                  "data/test-00000-of-00001.parquet": parquet(stories[30:])},
        OUTLINES: {"README.md": CARD, "train.jsonl": "".join(json.dumps(row) + "\n" for row in outlines).encode()},
    })  # fmt: skip
    yield server
    server.shutdown()
    server.server_close()


def prepare(hub: Hub, tmp_path: Path, *args: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, ROOT / "data_prep.py", "--preset", "gpt2", "--out", tmp_path / "data", *args]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)


def test_the_bare_command_reads_both_sets_at_a_commit(hub, rows, tmp_path):
    done = prepare(hub, tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    manifest = load_manifest(tmp_path / "data")
    assert manifest["sources"] == {
        "outlines": {"from": "hub", "name": OUTLINES, "revision": sha(OUTLINES)},
        "source": {"from": "hub", "name": STORIES, "revision": sha(STORIES)},
    }
    assert {origin: counts["read"] for origin, counts in manifest["counts"].items()} == {"outlines": 20, "source": 40}
    splits = ("train", "validation", "test")
    prompts = {prompt for split in splits for prompt in load_prompts(tmp_path / "data", split)}
    assert prompts == {row["prompt"] for row in rows}
    assert sorted(row["think"] for split in splits for row in load_sft(tmp_path / "data", split)) == sorted(
        row["think"] for row in rows[:20]
    )
    assert all(sha(STORIES) in path for path in hub.paths if path.startswith(f"/datasets/{STORIES}/"))
    assert not [path for path in (tmp_path / "home").rglob("*.parquet")], "streamed, not downloaded"


def test_a_set_without_a_usable_column_says_which_it_has(hub, tmp_path):
    hub.repositories[STORIES] = {"README.md": CARD, "train.jsonl": b'{"title": "A dog.", "body": "It ran."}\n'}
    refused(prepare(hub, tmp_path), tmp_path, "no prompt column (name one with --prompt-column), there are: title, body")


def test_a_set_that_is_not_there_names_the_flag_that_works_without(hub, tmp_path):
    del hub.repositories[OUTLINES]
    refused(prepare(hub, tmp_path), tmp_path, f"cannot read {OUTLINES} (main)", "`--outlines PATH`")


def test_a_torn_file_is_told_and_leaves_nothing(hub, tmp_path):
    files = hub.repositories[STORIES]
    files["data/train-00000-of-00001.parquet"] = files["data/train-00000-of-00001.parquet"][:-500]
    refused(prepare(hub, tmp_path), tmp_path, f"cannot read {STORIES} (main)")


def refused(done: subprocess.CompletedProcess, tmp_path: Path, *says: str) -> None:
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(one in done.stderr for one in says), done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"home", ".data.lock"}
