"""Does the full-size path fit a small machine? Every script with --preset gpt2, a few steps each, on a CPU.

    python benchmarks/gpt2_path.py --gpt2-tokenizer FOLDER --rows train.jsonl [--layers 2]

The model is `GPT2Config()` with random weights and GPT-2's own tokenizer; the rows come from WritingPrompts, the outlines
from the corpus, and the encoder is the packaged MiniLM. Batches are cut to what a CPU gets through in minutes; context,
vocabulary, memory plan and code are the preset's. The generated text is noise.

seconds   from start to end of a script, including imports
peak_gb   largest resident size of any one of the script's processes (`wait4`)
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 12.0  # GB


@dataclass
class Args:
    gpt2_tokenizer: Path
    """Folder with GPT-2's tokenizer."""
    rows: Path
    """WritingPrompts rows: jsonl with prompt and story."""
    layers: int = 12
    """Layers of the model: 12 is GPT-2 124M."""
    steps: int = 3
    """Optimizer steps of each fine-tuning stage, and steps of RL."""
    quick: bool = False
    """2 layers, 1 step of few tokens, 30 rows; data preparation, the one-shot stage and RL only."""


def commands(home: Path, args: Args) -> list[list[str]]:
    steps = ["--steps", args.steps]
    tokens, new, held_out, limit = (1500, 30, 1, ["--limit", 30]) if args.quick else (8192, 300, 4, [])
    learn = [*steps, "--batch-tokens", tokens, "--eval-prompts", held_out, "--data", home / "data"]
    every = [
        [str(part) for part in command]
        for command in (
            ["data_prep.py", "--preset", "gpt2", "--source", args.rows.resolve(), "--outlines", "corpus", "--out", home / "data", *limit],
            ["pattern_learning.py", "--mode", "oneshot", "--model", home / "base", "--out", home / "oneshot", *learn],
            ["pattern_learning.py", "--mode", "zeroshot", "--model", home / "oneshot", "--out", home / "zeroshot", *learn],
            ["rl_train.py", "--data", home / "data", "--model", home / ("oneshot" if args.quick else "zeroshot"), "--out", home / "rl", *steps,
             "--prompts", 4, "--k", 4, "--max-new-tokens", new, "--eval-prompts", held_out],
            ["evaluate.py", home / "rl/final", "--data", home / "data", "--out", home / "evaluation", "--prompts", 2, "--num", 1,
             "--no-unplanned"],
            ["generate.py", "A dog learns to read.", "--model", home / "rl/final"],
        )
    ]  # fmt: skip
    return [every[0], every[1], every[3]] if args.quick else every


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def main(args: Args) -> None:
    if args.quick:
        args.layers, args.steps = 2, 1
    stages = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(n_layer=args.layers)).save_pretrained(home / "base")
        AutoTokenizer.from_pretrained(args.gpt2_tokenizer).save_pretrained(home / "base")
        for script, *rest in commands(home, args):
            name = f"{script} --mode {rest[1]}" if rest[0] == "--mode" else script
            begin = time.perf_counter()
            process = subprocess.Popen([sys.executable, ROOT / script, *rest], stdout=subprocess.PIPE, text=True, cwd=home)
            said = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"{script} failed:\n{said}")
            memory = next((line for line in said.splitlines() if line.startswith("memory, GB")), "")
            stages[name] = {"seconds": round(time.perf_counter() - begin), "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}
            print(f"{name:40} {stages[name]['seconds']:5} s   peak {stages[name]['peak_gb']:.2f} GB   {memory}", flush=True)
        for name in ("oneshot",) if args.quick else ("oneshot", "zeroshot"):
            fastest = max(row["tokens_per_second"] for row in rows_of(home / name / "metrics.jsonl"))
            stages[f"pattern_learning.py --mode {name}"]["tokens_per_second"] = round(fastest)
        last = rows_of(home / "rl" / "metrics.jsonl")[-1]
        stages["rl_train.py"] |= {key: round(last[f"time/{key}"], 1) for key in ("sample_s", "reward_s", "update_s")}
    highest = max(stage["peak_gb"] for stage in stages.values())
    facts = {"layers": args.layers, "stages": stages, "peak_gb": highest, "within_12_gb": highest < LIMIT}
    print(json.dumps({"bench": "gpt2_path", **facts}))


if __name__ == "__main__":
    main(tyro.cli(Args))
