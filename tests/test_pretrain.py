"""base_model/pretrain.py: what it makes loads and writes, a stopped run ends as an uninterrupted one, bad flags are one line."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import ROOT

SCRIPT = ROOT / "base_model" / "pretrain.py"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Text files and a corpus folder of a hundred rows, and the flags of a run of three steps on them."""
    folder = tmp_path_factory.mktemp("pretrain")
    for name in ("stories.jsonl", "simple.jsonl", "prompts.txt"):
        lines = (ROOT / "corpus" / name).read_text("utf-8").splitlines(keepends=True)[:100]
        (folder / name).write_text("".join(lines), "utf-8")
    stories = [json.loads(line)["story"] for line in (folder / "simple.jsonl").read_text("utf-8").splitlines()]
    rows = [{"text": story, "author": "A" if i % 2 else "B"} for i, story in enumerate(stories)]
    (folder / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder, [
        "--text", folder / "prose.jsonl", "--leave-out", "B", "--corpus", folder, "--vocab", 400, "--layers", 1, "--width", 16,
        "--heads", 2, "--context", 32, "--warmup", 1, "--eval-every", 2, "--no-compile",
    ]  # fmt: skip


def pretrain(script, flags, *more):
    return script("base_model/pretrain.py", *flags, *more)


def test_a_base_model_is_made_that_loads_and_writes(small, script, tmp_path):
    _, flags = small
    assert pretrain(script, flags, "--steps", 3, "--out", tmp_path / "base").returncode == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    text = 'She said: "Naïve — 9 → 漢"\n  And so on.'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("Once", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0).shape[1] > ids.shape[1]
    log = [json.loads(line) for line in (tmp_path / "base" / "training_log.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in log] == [2, 3] and log[-1]["tokens"] == 3 * 4 * 32
    assert not (tmp_path / "base" / "state.pt").exists()


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(small, script, tmp_path):
    """The signal comes while the first step is in hand; the second call goes on from the state that it left."""
    _, flags = small
    stop = f"""
import os, runpy, signal, sys
import numpy as np
whole = np.random.default_rng
def first_step(key=None):
    if key == (0, 0):
        os.kill(os.getpid(), signal.SIGTERM)
    return whole(key)
np.random.default_rng = first_step
sys.argv = {["pretrain.py", *map(str, flags), "--steps", "3", "--out", str(tmp_path / "stopped")]!r}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", stop], check=False, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert torch.load(tmp_path / "stopped" / "state.pt", weights_only=True)["step"] == 1
    for name in ("stopped", "whole"):
        assert pretrain(script, flags, "--steps", 3, "--out", tmp_path / name).returncode == 0
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "more, line",
    [
        (["--corpus-share", 0.6, "--simple-share", 0.5], "at most 1 together"),
        (["--heads", 3], "--width 16 is not a multiple of --heads 3"),
        (["--text", "no_such_file.txt"], "no file no_such_file.txt"),
    ],
)
def test_bad_flags_are_one_line(small, script, tmp_path, more, line):
    _, flags = small
    flags = flags if more[0] != "--text" else [*flags[2:]]
    done = pretrain(script, flags, *more, "--out", tmp_path / "base")
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "base").exists()
