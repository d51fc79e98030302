"""Who learns more from the same samples, and from the same minutes: our PPO, TRL's GRPO or TRL's RLOO?

    python benchmarks/vs_trl.py --data artifacts/data --model artifacts/zeroshot [--seeds 0 1 2] [--out FOLDER] [--quick]

All start from the same checkpoint and see the same prompts in the same order, with the same reward (length target fixed at
the human median), samples per prompt, cap on new tokens, learning rate, optimizer steps and arithmetic; loss, advantages,
clipping and KL are each trainer's own. Every `--eval-every` steps the held-out prompts are sampled with our sampler and
scored, outside the timing. Writes curves.json to --out after every run and skips the runs already in it, so a stopped
benchmark can be continued.

reward_at_equal_samples_ours, _trl   held-out reward after the last step, mean over seeds; _trl: the better of TRL's trainers
speedup_to_equal_reward              TRL's minutes to its own highest mean reward over our minutes to the same reward (linear
                                     between evaluations); null if we never reach it
"""

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root's reward.py, not benchmarks/reward.py
import rl_train
from benchmarks.rl_step import Ours
from benchmarks.trl_peer import run_trl
from reward import Reward, Sample
from storygen.batching import context_length
from storygen.checkpoint import load_model
from storygen.cli import as_json, write_atomically
from storygen.corpus import load_prompts, spread
from storygen.logprobs import pick_dtype
from storygen.memory import keep_freed_memory
from storygen.pattern import Pattern
from storygen.rollout import rollout


@dataclass
class Args:
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    model: str = "artifacts/zeroshot"
    """Model folder made by pattern_learning.py."""
    out: Path = Path("artifacts/vs_trl")
    """Folder for the curves."""
    sides: list[str] = field(default_factory=lambda: ["ours", "grpo", "rloo"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 20
    prompts: int = 8
    """Prompts per step."""
    k: int = 8
    """Samples per prompt."""
    lr: float = 1.5e-4
    eval_every: int = 5
    eval_prompts: int = 128
    """Validation prompts, one sample each, always with the same seed."""
    max_new_tokens: int | None = None
    """Cap on a response; default: the context minus the longest prompt."""
    quick: bool = False
    """One seed, two steps of 2 x 4 samples of at most 200 tokens, ours and GRPO."""


def run_side(side: str, seed: int, args: Args, reward: Reward) -> list[dict[str, float]]:
    """One run: a point {step, samples, seconds, reward} before the first step and after every `eval_every` steps."""
    model, tokenizer = load_model(args.model, "cpu")
    pattern = Pattern(tokenizer)
    fits = [p for p in load_prompts(args.data, "train") if len(pattern.prefix(p)) <= 96]
    held_out = spread(load_prompts(args.data, "validation"), args.eval_prompts)
    most = args.max_new_tokens or context_length(model) - 96
    target, dtype = reward.calibration.quantile("story_words", 50), pick_dtype("auto", "cpu")
    settings = rl_train.Args(
        model=args.model, seed=seed, steps=args.steps, prompts=args.prompts, k=args.k, lr=args.lr, max_new_tokens=most,
        micro_tokens=rl_train.RECIPES["demo"].micro_tokens,
    )  # fmt: skip
    by_step = [rl_train.step_prompts(fits, step, settings) for step in range(1, args.steps + 1)]
    points: list[dict[str, float]] = []

    def rewards_of(samples: list[Sample]) -> list[float]:
        return [score.reward for score in reward(samples, target)]

    def look(step: int, policy) -> None:
        bar.update()
        if step % args.eval_every == 0 or step == args.steps:
            policy.eval()
            batch = rollout(policy, pattern, held_out, 1, seed=0, temperature=1.0, dtype=dtype, max_new_tokens=most)
            mean = statistics.fmean(rewards_of(rl_train.samples_of(batch)))
            points.append({"step": step, "samples": step * args.prompts * args.k, "reward": mean})
            bar.set_postfix(held_out=f"{mean:.3f}")

    with tqdm(total=args.steps + 1, desc=f"{side}, seed {seed}", unit="step", disable=None) as bar:
        look(0, model)
        if side == "ours":
            mine, figures = Ours(settings, pattern, dtype), []
            for step, prompts in enumerate(by_step, 1):
                figures.append(mine.run(prompts, rewards_of))
                look(step, mine.model)
        else:
            with tempfile.TemporaryDirectory() as out:
                figures = run_trl(
                    side, args.model, [p for prompts in by_step for p in prompts], rewards_of, steps=args.steps, k=args.k,
                    minibatches=settings.minibatches, max_new_tokens=most, lr=args.lr, warmup=settings.warmup,
                    beta=settings.beta, seed=seed, out=out, dtype=dtype, after_step=look,
                )  # fmt: skip
    for point in points:
        point["seconds"] = sum(f["seconds"] for f in figures[: point["step"]])
    return points


def mean_curve(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Mean over seeds at every evaluation, with the standard error of the reward over seeds."""
    curve = []
    for points in zip(*runs, strict=True):
        rewards = [p["reward"] for p in points]
        error = statistics.stdev(rewards) / len(rewards) ** 0.5 if len(rewards) > 1 else 0.0
        seconds = statistics.fmean(p["seconds"] for p in points)
        curve.append(points[0] | {"reward": statistics.fmean(rewards), "error": error, "seconds": seconds})
    return curve


def seconds_to(curve: list[dict[str, float]], reward: float) -> float | None:
    """Seconds until a curve first reaches a reward, linear between its points; None if it never does."""
    for a, b in pairwise(curve):
        if b["reward"] >= reward:
            share = (reward - a["reward"]) / (b["reward"] - a["reward"]) if b["reward"] > a["reward"] else 0.0
            return a["seconds"] + max(0.0, share) * (b["seconds"] - a["seconds"])
    return None


def main(args: Args) -> None:
    keep_freed_memory()
    if args.quick:
        args = replace(
            args,
            sides=["ours", "grpo"],
            seeds=[0],
            steps=2,
            prompts=2,
            k=4,
            eval_every=2,
            eval_prompts=8,
            max_new_tokens=200,
            out=Path(tempfile.mkdtemp()),
        )
    reward, path = Reward.load(args.data), args.out / "curves.json"
    settings = {name: value for name, value in as_json(args).items() if name not in ("out", "sides", "seeds", "quick")}
    done = json.loads(path.read_text("utf-8")) if path.exists() else {"settings": settings, "runs": {}}
    if done["settings"] != settings:
        sys.exit(f"error: {path} holds runs with other settings: give another --out")
    for seed in args.seeds:
        for side in args.sides:
            if str(seed) not in done["runs"].setdefault(side, {}):
                done["runs"][side][str(seed)] = run_side(side, seed, args, reward)
                args.out.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(done, indent=1))
    runs = {side: [done["runs"][side][str(seed)] for seed in args.seeds] for side in args.sides}
    curves = {side: mean_curve(of_seeds) for side, of_seeds in runs.items()}
    print(f"{torch.get_num_threads()} threads, seeds {args.seeds}, {args.prompts} x {args.k} samples a step")
    print(f"{'':6} {'samples':>8} {'minutes':>8} {'held-out reward':>16} {'+- error over seeds':>20}")
    for side, curve in curves.items():
        for p in curve:
            print(f"{side:6} {p['samples']:8.0f} {p['seconds'] / 60:8.2f} {p['reward']:16.3f} {p['error']:20.3f}")
    peers = {side: curve for side, curve in curves.items() if side != "ours"}
    best = max(peers, key=lambda side: peers[side][-1]["reward"])
    goal = max(peers[best], key=lambda p: p["reward"])
    ours_s = seconds_to(curves["ours"], goal["reward"])
    print(json.dumps({
        "bench": "vs_trl",
        "reward_at_equal_samples_ours": curves["ours"][-1]["reward"],
        "reward_at_equal_samples_trl": peers[best][-1]["reward"],
        "speedup_to_equal_reward": goal["seconds"] / ours_s if ours_s else None,
        "trl_trainer": best,
        "start": curves["ours"][0]["reward"],
    }))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
