"""Causal models other than GPT-2: both stages of learning, and samples that are the model's own, by the slower sampler."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
)  # fmt: skip

from storygen.checkpoint import save_model
from storygen.cli import InputError
from storygen.logprobs import check_head
from storygen.pattern import Pattern, add_pattern_tokens
from storygen.sampler import sample
from tests.conftest import ROOT
from tests.reward_data import corpus_rows, data_folder

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "gpt_neo": GPTNeoConfig(
        hidden_size=48, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16, max_position_embeddings=512
    ),
    "gpt_neox": GPTNeoXConfig(**SMALL),  # Pythia's
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
}  # fmt: skip


MADE_OF = {
    "hashes": {},
    "sources": {"outlines": {"from": "corpus"}},
    "counts": {"outlines": {"read": 9, "kept": {"train": 9}}},
}


def made(config):
    """A random base model of a family, with the embedded tokenizer and none of the pattern's tokens."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base_model")
    config.vocab_size, config.initializer_range = len(tokenizer), 0.2
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = None
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_and_their_log_probabilities_are_the_models_own(family, capsys):
    model, tokenizer = made(FAMILIES[family])
    add_pattern_tokens(model, tokenizer)
    pattern = Pattern(tokenizer)
    prefixes = [pattern.prefix(text) for text in ("A dog.", "The king sleeps in the deep wood.", "A cat.")] + [
        [pattern.prompt_id]
    ]
    found = sample(model, prefixes, 3, eos_id=pattern.eos_id, seed=3, vocabulary=pattern.size, max_new_tokens=25, max_rows=4)
    alone = sample(model, prefixes, 3, eos_id=pattern.eos_id, seed=3, vocabulary=pattern.size, max_new_tokens=25, max_rows=1)
    assert [[one.ids for one in row] for row in found] == [[one.ids for one in row] for row in alone]
    for prefix, completions in zip(prefixes, found, strict=True):
        for one in completions:
            with torch.no_grad():
                law = model(torch.tensor([prefix + one.ids])).logits[0, len(prefix) - 1 : -1, : pattern.size].log_softmax(-1)
            own = law.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.logps), own, atol=1e-4, rtol=1e-4)
            assert one.finished == (one.ids[-1] == pattern.eos_id) and (one.finished or len(one.ids) == 25)
    # With only the likeliest token in the nucleus: what `generate` writes without sampling.
    greedy = sample(model, prefixes[:1], 1, eos_id=-1, seed=0, vocabulary=pattern.size, top_p=1e-9, max_new_tokens=20)[0][0]
    model.generation_config.eos_token_id = None
    ids = model.generate(torch.tensor(prefixes[:1]), do_sample=False, max_new_tokens=20, pad_token_id=pattern.pad_id)
    if int(ids.max()) < pattern.size:
        assert greedy.ids == ids[0, len(prefixes[0]) :].tolist()


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt_neo"])
def test_both_stages_of_learning_take_a_model_of_another_family(family, tmp_path, script):
    model, tokenizer = made(FAMILIES[family])
    save_model(model, tokenizer, tmp_path / "base")
    data = shutil.copytree(data_folder(), tmp_path / "data")
    rows = [{"split": row["split"], "prompt": row["prompt"]} for row in corpus_rows()]
    pq.write_table(pa.Table.from_pylist(rows), data / "prompts.parquet")
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | MADE_OF))
    stages = [
        ("pattern_learning.py", "--mode", "zeroshot", "--data", data, "--model", tmp_path / "base", "--out", tmp_path / "zeroshot",
         "--steps", 2, "--batch-tokens", 400, "--eval-prompts", 1),
        ("rl_train.py", "--data", data, "--model", tmp_path / "zeroshot", "--out", tmp_path / "rl", "--steps", 1, "--prompts", 2,
         "--k", 2, "--max-new-tokens", 20, "--eval-prompts", 1, "--device", "cpu"),
    ]  # fmt: skip
    for stage in stages:
        done = script(*stage)
        assert done.returncode == 0, done.stderr
    for made_by in ("zeroshot", "rl/final"):
        assert "## Measured" in (tmp_path / made_by / "README.md").read_text("utf-8")
    metrics = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["check/kl"] < 1e-6 and metrics[1]["policy/updates"] >= 1 and metrics[1]["policy/sampler_gap"] < 0.05


def test_a_model_that_scales_its_logits_is_refused():
    model, _ = made(CohereConfig(**SMALL, logit_scale=0.0625))
    with pytest.raises(InputError, match="does more to its logits"):
        check_head(model, [5, 6, 7, 8], 0)
