"""How long does one RL step take, compared with TRL's GRPO?

    python benchmarks/rl_step.py --data artifacts/data --model artifacts/zeroshot [--quick]

Both sides have the same checkpoint, prompts, samples per prompt, reward, optimizer steps, arithmetic and threads, and no
dropout, and take steps in turn in one process. `fixed`: every sample has `--new-tokens` tokens (its end is forbidden).
`spread`: samples end where they end, within the context, as in a real run.

ratio_fixed, ratio_spread   TRL's seconds per step over ours, medians
peak_gb, peak_gb_peer       peak memory of a process that runs one side only, with spread lengths
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root's reward.py, not benchmarks/reward.py
import rl_train
from benchmarks.trl_peer import run_trl
from reward import Reward, Sample
from storygen.batching import context_length
from storygen.checkpoint import load_model
from storygen.corpus import load_prompts
from storygen.logprobs import pick_dtype
from storygen.memory import keep_freed_memory, peak_memory
from storygen.pattern import Pattern
from storygen.ppo import adapt_beta, advantages
from storygen.rollout import rollout


@dataclass
class Args:
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    model: str = "artifacts/zeroshot"
    """Model folder made by pattern_learning.py."""
    prompts: int = 8
    """Prompts per step."""
    k: int = 4
    """Samples per prompt."""
    new_tokens: int = 128
    """Tokens per sample in `fixed`."""
    steps: int = 5
    """Steps of each side that count, after one that does not."""
    quick: bool = False
    """2 prompts, samples of 64 tokens, one step; `spread` is cut at 160 tokens."""
    only: tuple[str, str] | None = None
    """Run one side alone, in a process of its own, for its peak memory: ours|trl, and fixed|spread."""


PHASES = ("sample", "reward", "learn")


class Ours:
    """Our side of a comparison: steps of `rl_train` on given prompts."""

    def __init__(self, args: rl_train.Args, pattern: Pattern, dtype: torch.dtype):
        self.args, self.pattern, self.dtype = args, pattern, dtype
        self.model, _ = load_model(args.model, "cpu", dtype=dtype)
        self.reference, _ = load_model(args.model, "cpu", dtype=dtype)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=args.adam_eps, weight_decay=0.0, fused=True
        )
        self.step, self.beta = 0, args.beta

    def run(self, prompts: list[str], reward) -> dict[str, float]:
        """One step. Returns its seconds, in total and per phase, and its response tokens."""
        self.step += 1
        args, clock = self.args, time.perf_counter()
        batch = rollout(
            self.model, self.pattern, prompts, args.k, seed=(args.seed, self.step), temperature=1.0, dtype=self.dtype,
            max_new_tokens=args.max_new_tokens,
        )  # fmt: skip
        sampled = time.perf_counter()
        rewards = torch.tensor(reward(rl_train.samples_of(batch))).view(-1, args.k)
        scored = time.perf_counter()
        advantage = advantages(rewards, args.advantage)
        learnt = rl_train.learn(
            self.model, self.reference, self.optimizer, batch, advantage, range(args.prompts), self.beta, self.step, args,
            self.pattern, self.dtype,
        )  # fmt: skip
        self.beta = adapt_beta(self.beta, learnt["objective/kl"], args.kl_target)
        done = time.perf_counter()
        times = dict(zip(PHASES, (sampled - clock, scored - sampled, done - scored), strict=True))
        return {"seconds": done - clock, "tokens": batch.response_tokens(), **times}


def compare(args: Args, lengths: str, sides: tuple[str, ...] = ("ours", "trl")) -> dict[str, list[dict[str, float]]]:
    """Figures of every step of each side, the first left out."""
    dtype, steps = pick_dtype("auto", "cpu"), args.steps + 1
    reward = Reward.load(args.data, dtype=dtype)  # as rl_train does
    model, tokenizer = load_model(args.model, "cpu")
    pattern = Pattern(tokenizer)
    prompts = [p for p in load_prompts(args.data, "train") if len(pattern.prefix(p)) <= 64][: steps * args.prompts]
    if lengths == "fixed":
        pattern.eos_id = -1  # never drawn: every sample runs to the cap
        most = args.new_tokens
    else:
        most = 160 if args.quick else context_length(model) - 64

    def rewards_of(samples: list[Sample]) -> list[float]:
        if lengths == "fixed":  # samples that may not end are scored as if they had
            samples = [replace(sample, finished=True, verdict=None) for sample in samples]
        return [score.reward for score in reward(samples, 200.0)]

    recipe = rl_train.RECIPES["demo"]
    settings = rl_train.Args(
        model=args.model, prompts=args.prompts, k=args.k, lr=recipe.lr, micro_tokens=recipe.micro_tokens, max_new_tokens=most
    )
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    mine = Ours(settings, pattern, dtype) if "ours" in sides else None

    def our_step(step: int, _=None) -> None:
        if mine:
            found["ours"].append(mine.run(prompts[(step - 1) * args.prompts : step * args.prompts], rewards_of))

    if "trl" in sides:
        with tempfile.TemporaryDirectory() as out:
            found["trl"] = run_trl(
                "grpo", args.model, prompts, rewards_of, steps=steps, k=args.k, minibatches=settings.minibatches,
                max_new_tokens=most, min_new_tokens=most if lengths == "fixed" else None, lr=settings.lr,
                warmup=settings.warmup, beta=settings.beta, seed=0, out=out, dtype=dtype, after_step=our_step,
            )  # fmt: skip
    else:
        for step in range(1, steps + 1):
            our_step(step)
    return {side: figures[1:] for side, figures in found.items()}


def peaks_gb(args: Args) -> dict[str, float]:
    """Peak memory of each side in a process of its own, GB. Both run at once, as nothing is timed."""
    flags = {"data": args.data, "model": args.model, "prompts": args.prompts, "k": args.k, "new-tokens": args.new_tokens}
    flags |= {"steps": 1}
    command = [sys.executable, __file__, *(word for name, value in flags.items() for word in (f"--{name}", value))]
    command += ["--quick"] if args.quick else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two processes with all threads each would wait for one another
    started = {
        key: subprocess.Popen(
            [*map(str, command), "--only", side, "spread"], stdout=subprocess.PIPE, text=True, env=environment
        )
        for key, side in (("peak_gb", "ours"), ("peak_gb_peer", "trl"))
    }
    return {key: json.loads(process.communicate()[0].splitlines()[-1])["peak_gb"] for key, process in started.items()}


def arithmetic_seconds(model, tokens: float, rate: float) -> float:
    """Seconds of a step's matrix products at `rate` FLOP/s: sampling, old and reference forwards, forward and backward."""
    table = model.get_output_embeddings().weight
    blocks = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name)
    passes = 1 + 1 + 1 + 3
    head = table.numel() * (passes + 1)  # its logits are computed twice in learning
    return 2 * tokens * (blocks * passes + head) / rate


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, best of ten."""
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 2048).to(dtype)
    best = min(timed(lambda: a @ b) for _ in range(10))
    return 2 * 2048 * 1024 * 2048 / best


def timed(call) -> float:
    clock = time.perf_counter()
    call()
    return time.perf_counter() - clock


def main(args: Args) -> None:
    keep_freed_memory()
    if args.quick:
        args = replace(args, prompts=2, new_tokens=64, steps=1)
    if args.only:
        side, lengths = args.only
        compare(args, lengths, (side,))
        print(json.dumps({"peak_gb": peak_memory()}))
        return
    model, _ = load_model(args.model, "cpu")
    dtype = pick_dtype("auto", "cpu")
    rate, figures = matmul_rate(dtype), {}
    print(
        f"{torch.get_num_threads()} threads, {args.prompts} x {args.k} samples a step, {dtype}, matrix products {rate / 1e9:.0f} GFLOP/s"
    )
    print(f"{'':8} {'':6} {'s/step min':>10} {'median':>8} {'max':>8} {'tokens/s':>9}   phases, s")
    for lengths in ("fixed", "spread"):
        found = compare(args, lengths)
        for side, steps in found.items():
            seconds, tokens = [s["seconds"] for s in steps], statistics.mean(s["tokens"] for s in steps)
            middle = statistics.median(seconds)
            keys = PHASES if side == "ours" else ("generate_s", "reward_s")
            phases = ", ".join(f"{key} {statistics.median(s[key] for s in steps):.2f}" for key in keys)
            print(
                f"{lengths:8} {side:6} {min(seconds):10.2f} {middle:8.2f} {max(seconds):8.2f} {tokens / middle:9.0f}   {phases}"
            )
            if side == "ours":
                share = arithmetic_seconds(model, tokens, rate) / middle
                print(f"{'':8} {'':6} {share:.0%} of the time is what the matrix products take")
        middles = {side: statistics.median(s["seconds"] for s in steps) for side, steps in found.items()}
        figures[f"ratio_{lengths}"] = middles["trl"] / middles["ours"]
    peaks = peaks_gb(args)
    print(f"peak memory, GB: ours {peaks['peak_gb']:.2f}, TRL {peaks['peak_gb_peer']:.2f}")
    print(json.dumps({"bench": "rl_step", **figures, **peaks, "threads": torch.get_num_threads(), "cores": os.cpu_count()}))


if __name__ == "__main__":
    main(tyro.cli(Args))
