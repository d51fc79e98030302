import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, Qwen3Config

from storygen.attention import PLAIN
from storygen.cli import InputError
from storygen.logprobs import response_logps
from storygen.memory import MARGIN, Shape, activations, free_in_container, plan

GPT2 = Shape(parameters=124_439_808, vocabulary=50_304, layers=12, width=768, kv_width=768, heads=12, context=1024)
LAW = {
    "rl": True,
    "longest_row": 1024,
    "longest_sample": 1024,
    "dtype": torch.bfloat16,
    "on_cpu": False,
    "attention": "sdpa",
}


@pytest.mark.parametrize("attention, dtype", [("sdpa", torch.float32), ("sdpa", torch.bfloat16), (PLAIN, torch.bfloat16)])
def test_activations_are_what_a_forward_pass_keeps(attention, dtype):
    """Against the bytes that autograd really saves, for the layers alone: embeddings and head are equal in both models."""
    kept = []
    for layers in (2, 6):
        config = GPT2Config(n_embd=128, n_layer=layers, n_head=4, vocab_size=512, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel(config).eval()
        model.set_attn_implementation(attention)
        for block in model.transformer.h:
            block.mlp.act = torch.nn.GELU(approximate="tanh")
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def pack(tensor, own=own, saved=saved):
            if tensor.untyped_storage().data_ptr() not in own:
                saved[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is reused
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            response_logps(model, [list(range(5, 205))] * 2, [1, 1], 0, dtype=dtype)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()))
    counted = activations(Shape.of(model), 400, 200, attention) * 4 // 6
    assert 0.95 * (kept[1] - kept[0]) < counted < 1.6 * (kept[1] - kept[0])


def test_gpt2_fits_a_card_of_16_gb():
    made = plan(GPT2, rows=256, micro_tokens=8192, available=int(15.5e9), **LAW)
    assert made.rows == 256 and made.micro_tokens >= 4096 and made.peak < 14e9
    assert made.held["weights and AdamW"] == 16 * GPT2.parameters
    fine_tuning = plan(GPT2, rows=64, micro_tokens=8192, available=int(15.5e9), **LAW | {"rl": False})
    assert fine_tuning.micro_tokens == 8192 and fine_tuning.held["weights and AdamW"] == 12 * GPT2.parameters


@given(st.floats(5.2, 80), st.integers(1, 600), st.integers(1024, 65536))
def test_plans_fit_and_take_no_more_than_was_asked_for(gigabytes, rows, micro_tokens):
    available = int(gigabytes * 1e9)
    made = plan(GPT2, rows=rows, micro_tokens=micro_tokens, available=available, **LAW)
    assert made.peak <= MARGIN * available and 1 <= made.rows <= rows and 1024 <= made.micro_tokens <= micro_tokens
    more = plan(GPT2, rows=rows, micro_tokens=micro_tokens, available=2 * available, **LAW)
    assert more.rows >= made.rows and more.micro_tokens >= made.micro_tokens


def test_only_as_long_as_rows_get_counts_not_a_context_of_32_thousand():
    """Qwen2-0.5B's shape: grouped queries, and one row that fills its context takes more than a card of 24 GB has."""
    qwen = Shape(
        parameters=494_032_768, vocabulary=151_936, layers=24, width=896, kv_width=128, heads=14, context=32_768
    )  # fmt: skip
    law = LAW | {"rows": 256, "micro_tokens": 8192, "available": int(24e9)}
    with pytest.raises(InputError, match="--max-new-tokens"):
        plan(qwen, **law | {"longest_row": 32_768, "longest_sample": 32_768})
    fine_tuning = plan(
        qwen, **law | {"longest_sample": 32_768, "rl": False, "rows": 64}
    )  # rows are short, samples may not be
    assert fine_tuning.micro_tokens >= 1024
    made = plan(qwen, **law)
    assert made.rows >= 64 and made.micro_tokens >= 1024
    one, two = (plan(qwen, **law | {"rows": rows}).held["sampling"] for rows in (1, 2))
    assert two - one == 1024 * 2 * 24 * 128 * 2 + 16 * 151_936  # keys and values, bf16; logits


def test_keys_and_values_are_as_wide_as_their_own_heads():
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    for config, width in (
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0), 32),
        (LlamaConfig(**shape, num_key_value_heads=2), 16),
        (Qwen3Config(**shape, num_key_value_heads=2, head_dim=16), 32),
    ):
        model = AutoModelForCausalLM.from_config(config)
        cache = model(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
        keys = cache.layers[0].keys
        assert Shape.of(model).kv_width == width == keys.shape[1] * keys.shape[3]


def test_what_cannot_fit_is_refused_with_both_figures():
    with pytest.raises(InputError, match=r"needs 4\.\d GB with one row at a time, and 1\.0 GB are free"):
        plan(GPT2, rows=64, micro_tokens=8192, available=10**9, **LAW)


@pytest.mark.parametrize("limit, free", [("4000\n", [2600]), ("max\n", []), ("9223372036854771712\n", None)])
def test_a_container_has_what_its_limit_leaves(tmp_path, limit, free):
    """Of 4,000 bytes, 1,500 are in use, 100 of them by pages that can be reclaimed."""
    names = {
        tmp_path: ("memory.max", "memory.current", "inactive_file"),
        tmp_path / "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for folder, (most, used, cache) in names.items():
        home = tmp_path / folder.name / "fs"
        inside = home / "memory" if folder.name == "memory" else home
        inside.mkdir(parents=True)
        (inside / most).write_text(limit)
        (inside / used).write_text("1500\n")
        (inside / "memory.stat").write_text(f"anon 1200\n{cache} 100\n")
        found = free_in_container(home)
        assert found == free if free is not None else found[0] > 2**62
    assert free_in_container(tmp_path / "none") == []


def test_freed_memory_is_kept():
    """64 MB allocated and freed forty times: pages are requested a few times, then stay; by plain glibc, every time."""
    code = """
import resource, torch
from storygen.memory import keep_freed_memory
{}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
before = faults()
for _ in range(40):
    torch.ones(2**24)
print(faults() - before)
"""
    kept, given = (
        int(subprocess.run([sys.executable, "-c", code.format(call)], check=True, capture_output=True, text=True).stdout)
        for call in ("keep_freed_memory()", "")
    )
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        assert kept < given / 3
