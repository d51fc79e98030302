"""The full-size preset's code path, at GPT-2's width, vocabulary and context and two of its layers, on a CPU."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from storygen.corpus import load_manifest
from storygen.pattern import INDENT, TAGS
from tests.conftest import ROOT

TOKENIZER = ROOT.parent / "shared" / "data" / "gpt2-tokenizer"
pytestmark = pytest.mark.skipif(
    not TOKENIZER.is_dir(), reason="GPT-2's tokenizer, which is not part of the project, does not lie in ../shared/data"
)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A random GPT-2 with two layers, like `openai-community/gpt2` on the hub: without the pattern's tokens."""
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def test_the_three_stages_of_the_preset(gpt2, script):
    home = gpt2.parent
    stages = [
        ("data_prep.py", "--preset", "gpt2", "--source", "corpus", "--outlines", "corpus", "--limit", 30, "--out", home / "data"),
        ("pattern_learning.py", "--mode", "oneshot", "--data", home / "data", "--model", gpt2, "--out", home / "oneshot",
         "--steps", 2, "--batch-tokens", 1500, "--eval-prompts", 1),
        ("pattern_learning.py", "--mode", "zeroshot", "--data", home / "data", "--model", home / "oneshot",
         "--out", home / "zeroshot", "--steps", 2, "--batch-tokens", 1000, "--eval-prompts", 1),
        ("rl_train.py", "--data", home / "data", "--model", home / "zeroshot", "--out", home / "rl", "--steps", 1,
         "--prompts", 2, "--k", 2, "--max-new-tokens", 30, "--eval-prompts", 1, "--device", "cpu"),
    ]  # fmt: skip
    for stage in stages:
        done = script(*stage)
        assert done.returncode == 0, done.stderr
        assert "preset gpt2" in done.stdout
    assert load_manifest(home / "data")["preset"] == "gpt2"
    tokenizer, model = (kind.from_pretrained(home / "rl" / "final") for kind in (AutoTokenizer, AutoModelForCausalLM))
    vocabulary = tokenizer.get_vocab()
    assert all(text in vocabulary for text in (*TAGS, INDENT)) and tokenizer.eos_token == "<eos>"
    table = model.get_input_embeddings().weight
    assert table.shape[0] % 64 == 0 and table.shape[0] >= len(tokenizer) > 50_257 and model.config.n_positions == 1024
    assert model.get_output_embeddings().weight.data_ptr() == table.data_ptr()
    metrics = [json.loads(line) for line in (home / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["check/kl"] < 1e-6 and metrics[1]["policy/updates"] >= 1
    samples = [json.loads(line) for line in (home / "rl" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 1 + 4 + 1
