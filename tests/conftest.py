import io
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

# Tiny models are faster on one thread than on several that wait for each other; scripts started by tests inherit this.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from storygen.pattern import Pattern, add_pattern_tokens

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


def tiny_gpt2(context: int = 256, seed: int = 0):
    """A random two-layer GPT-2 that knows the pattern's tokens, with the embedded tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base_model")
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=context, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    add_pattern_tokens(model, tokenizer)
    return model, tokenizer


@pytest.fixture(scope="session")
def tiny():
    model, tokenizer = tiny_gpt2()
    return model, tokenizer, Pattern(tokenizer)


@pytest.fixture
def script(monkeypatch, capfd):
    """Run a root script in this process as its command line would: returncode, stdout and stderr."""

    def run(name: str, *arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        code = 0
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run
