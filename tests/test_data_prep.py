"""data_prep.py as a user runs it: what it writes, and one line for every way to get it wrong."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from storygen.bertscore import load_encoder
from storygen.calibration import Calibration
from storygen.corpus import load_manifest, load_prompts, load_sft, read_rows, split_of
from storygen.idf import Idf
from tests.test_outlines import PLAN, serve  # noqa: F401

ROOT = Path(__file__).parents[1]
FILES = {"sft.parquet", "prompts.parquet", "idf.npz", "calibration.json", "manifest.json"}


def command(*args) -> list[str]:
    return [sys.executable, str(ROOT / "data_prep.py"), *map(str, args)]


def as_a_process(*args, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        command(*args), check=False, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300, **options
    )


@pytest.fixture
def prepare(script):
    """The same command line, without the seconds that a new process spends on imports."""
    return partial(script, "data_prep.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("made") / "deep" / "data"
    done = as_a_process("--preset", "demo", "--out", folder, "--limit", 40)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_folder_holds_what_the_later_stages_read(made):
    folder, done = made
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in folder.parent.iterdir()} == {"data", ".data.lock"}
    assert done.stderr == ""
    assert done.stdout.startswith("preset demo: ")
    manifest = load_manifest(folder)
    assert manifest["preset"] == "demo"
    assert json.loads(done.stdout.splitlines()[1]) == manifest["config"]
    for name, digest in manifest["hashes"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert set(manifest["hashes"]) == FILES - {"manifest.json"}
    encoder = load_encoder()
    idf = Idf.load(folder / "idf.npz", encoder.tokenizer)
    assert manifest["encoder"]["fingerprint"] == idf.fingerprint and manifest["encoder"]["sha256"] == encoder.sha256
    assert idf.documents == 80, "40 stories and their outlines"
    assert Calibration.load(folder / "calibration.json").n["rows"] == len(load_sft(folder, "train"))


def test_rows_are_those_of_the_corpus_in_their_own_splits(made):
    folder, _ = made
    corpus = {row["prompt"]: row for row in read_rows("corpus")}
    rows = {split: load_sft(folder, split) for split in ("train", "validation", "test")}
    assert sum(map(len, rows.values())) == 40
    for split, part in rows.items():
        assert all(row == corpus[row["prompt"]] and split_of(row["prompt"]) == split for row in part)
        assert {row["prompt"] for row in part} <= set(load_prompts(folder, split))
    counts = load_manifest(folder)["counts"]["outlines"]
    assert counts["read"] == 40 and sum(counts["kept"].values()) == 40
    assert pq.read_schema(folder / "sft.parquet").names == ["split", "prompt", "think", "story"]
    assert pq.read_schema(folder / "prompts.parquet").names == ["split", "prompt"]


def own_rows(path: Path, n: int = 12) -> Path:
    """Stories of the corpus that the first rows do not hold, under other prompts, with some that must go."""
    stories = [row for row in read_rows("corpus") if row["story"]][100 : 100 + n]
    rows = [{"q": f"[ WP ] {row['prompt']}", "story": row["story"]} for row in stories]
    rows += [{"q": "[ OT ] How do you write?", "story": stories[0]["story"]}, {"q": "You wake .", "story": "[deleted]"}]
    rows += [{"q": "A story of the wrong type.", "story": 3}, dict(rows[0], q=rows[0]["q"].upper())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_stories_beside_the_corpus_outlines_and_the_same_bytes_again(tmp_path, prepare):
    source, out = own_rows(tmp_path / "own.jsonl"), tmp_path / "data"
    args = ("--preset", "demo", "--out", out, "--source", source, "--prompt-column", "q", "--limit", 20)
    assert prepare(*args).returncode == 0
    manifest = load_manifest(out)
    dropped = {reason: sum(n.values()) for reason, n in manifest["counts"]["source"]["dropped"].items()}
    assert dropped == {"off_topic": 1, "deleted": 1, "wrong_type": 1, "duplicate": 1}
    assert manifest["counts"]["source"]["read"] == 16
    assert manifest["idf_documents"] == 12 + 2 * 20
    prompts = [p for split in ("train", "validation", "test") for p in load_prompts(out, split)]
    assert len(prompts) == len(set(prompts)) == 32 and not any("WP" in prompt for prompt in prompts)
    done = prepare(*args)
    assert done.returncode == 0, "an earlier data set is replaced"
    assert load_manifest(out)["hashes"] == manifest["hashes"] and "calibration: as before" in done.stdout


def test_a_teacher_writes_the_outlines(serve, tmp_path, prepare, monkeypatch):  # noqa: F811
    server = serve(PLAN)
    source, out = own_rows(tmp_path / "own.jsonl", 12), tmp_path / "data"
    args = ("--preset", "demo", "--out", out, "--source", source, "--prompt-column", "q", "--outlines", "teacher")
    args += ("--teacher-url", server.url, "--teacher-sample", 8, "--teacher-cache", tmp_path / "cache.jsonl")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-this-test")
    done = prepare(*args)
    assert done.returncode == 0, done.stderr
    rows = [row for split in ("train", "validation", "test") for row in load_sft(out, split)]
    assert len(rows) == 8 and {row["think"] for row in rows} == {PLAN}
    assert len(server.requests) == 8 and rows[0]["story"] in "".join(r["messages"][0]["content"] for r in server.requests)
    assert sum(load_manifest(out)["counts"]["teacher"]["kept"].values()) == 8
    written = b"".join(path.read_bytes() for path in [*out.iterdir(), tmp_path / "cache.jsonl"])
    assert b"sk-secret" not in written + done.stdout.encode()
    assert prepare(*args).returncode == 0 and len(server.requests) == 8, "all answers come out of the cache"


@pytest.mark.parametrize(
    ("content", "name", "args", "says"),
    [
        (None, "none.jsonl", (), "no such file"),
        ("", "empty.jsonl", (), "no rows"),
        ('{"prompt": "a b c", "story": "x"}\n{oops\n', "torn.jsonl", (), "line 2"),
        (b'{"prompt": "\xff"}\n', "latin.jsonl", (), "UTF-8"),
        ('{"title": "a", "body": "b"}\n', "odd.jsonl", (), "title, body"),
        ("a,b\n1,2\n", "odd.csv", ("--prompt-column", "c"), "a, b"),
    ],
)
def test_a_bad_source_is_one_line(tmp_path, prepare, content, name, args, says):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(prepare("--preset", "demo", "--out", tmp_path / "out", "--source", tmp_path / name, *args), tmp_path, says)


def test_a_process_of_its_own_says_no_more_and_exits_with_2(tmp_path):
    refused(
        as_a_process("--preset", "demo", "--out", tmp_path / "out", "--source", tmp_path / "none"), tmp_path, "no such file"
    )


def test_outlines_without_outlines_are_refused(tmp_path, prepare):
    source = own_rows(tmp_path / "own.jsonl")
    done = prepare("--preset", "demo", "--out", tmp_path / "out", "--outlines", source, "--outlines-prompt-column", "q")
    refused(done, tmp_path, "--outlines corpus")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--preset", "gpt2"), "--outlines PATH"),
        (("--preset", "demo", "--source", "hub"), "--source PATH"),
        (("--preset", "demo", "--limit", "0"), "--limit"),
        (("--preset", "demo", "--limit", "1"), "at least 2 rows"),
        (("--preset", "demo", "--encoder", "no-such-encoder"), "--encoder minilm"),
    ],
)
def test_a_bad_flag_is_one_line(tmp_path, prepare, args, says):
    refused(prepare("--out", tmp_path / "out", *args), tmp_path, says)


def refused(done, tmp_path: Path, says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, prepare):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    done = prepare("--preset", "demo", "--out", tmp_path / "out")
    assert done.returncode == 2 and "holds something else" in done.stderr
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_interrupted_it_leaves_the_earlier_data_set(tmp_path, made):
    out, before = tmp_path / "out", with_earlier(tmp_path, made)
    # A test run that was itself started in the background passes on an ignored SIGINT.
    running = subprocess.Popen(
        command("--preset", "demo", "--out", out), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  no thread here holds a lock
    )  # fmt: skip
    wait_for(tmp_path / ".out.partial")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=120)
    assert running.returncode != 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock"}


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path} in {seconds} seconds"
        time.sleep(0.01)


def with_earlier(tmp_path: Path, made) -> dict[str, bytes]:
    """Copy a whole data set to `out`; returns its bytes by name."""
    shutil.copytree(made[0], tmp_path / "out")
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(("kilobytes", "at_the_end"), [(1, False), (80, True)])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path, made, kilobytes, at_the_end):
    """The kernel refuses to let any file grow beyond the limit: the first one, or calibration.json, the last and largest."""
    before = with_earlier(tmp_path, made)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (kilobytes * 1000, kilobytes * 1000))
    done = as_a_process("--preset", "demo", "--out", tmp_path / "out", "--limit", 40, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot write (File too large"), done.stderr
    assert done.stderr.count("\n") == 1 and ("calibration, with" in done.stdout) == at_the_end
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock"}


def test_killed_it_leaves_the_earlier_data_set_and_the_next_run_is_whole(tmp_path, made, prepare):
    before = with_earlier(tmp_path, made)
    args = ("--preset", "demo", "--out", tmp_path / "out", "--limit", 40)
    for name in ("rows.parquet", "sft.parquet", "idf.npz"):
        running = subprocess.Popen(command(*args), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(tmp_path / ".out.partial" / name)
        running.kill()
        running.wait()
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert prepare(*args).returncode == 0
    assert load_manifest(tmp_path / "out")["hashes"] == load_manifest(made[0])["hashes"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock"}
