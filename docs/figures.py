"""Draw the figures of docs/learning.md from run folders of rl_train.py, and base_model's learning curve from its log.

    python docs/figures.py curves --out docs/advantages.svg loo=runs/loo_0,runs/loo_1 raw=runs/raw_0,runs/raw_1
    python docs/figures.py length --out docs/length.svg runs/long
    python docs/figures.py vs-trl --out docs/vs_trl.svg artifacts/vs_trl/curves.json
    python docs/figures.py pretraining --out docs/pretraining.svg base_model/training_log.jsonl
    python docs/figures.py sizes --out docs/sizes.svg base_model/sizes.jsonl

A line is the mean over a group's runs (seeds); its band is one standard error of that mean.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

matplotlib.use("svg")
import matplotlib.pyplot as plt

plt.rcParams.update({
    "svg.hashsalt": "story-gen", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e2dfd6", "figure.facecolor": "white", "legend.frameon": False, "lines.linewidth": 1.6,
    "axes.prop_cycle": plt.cycler(color=["#2563a8", "#c2620e", "#1b8a72", "#8a4bb0", "#b0324f", "#7a7416"]),
})  # fmt: skip
SCALARS = {
    "eval/reward": "held-out reward",
    "eval/parts/correlation": "held-out correlation",
    "eval/length/median": "held-out story, median words",
    "objective/kl": "KL to the reference, nats a token",
    "objective/entropy": "entropy, nats a token",
    "policy/grad_norm": "gradient norm",
}


@dataclass
class Curves:
    """Scalars of metrics.jsonl by step, one line per group."""

    groups: tyro.conf.Positional[tuple[str, ...]]
    """NAME=RUN,RUN,… for each line."""
    out: Path = Path("curves.svg")
    steps: int | None = None
    """Leave out everything after this step."""


@dataclass
class Length:
    """Length target against the length of each step's samples, and their reward."""

    run: tyro.conf.Positional[Path]
    out: Path = Path("length.svg")


@dataclass
class VsTrl:
    """Held-out reward against samples and against minutes, from benchmarks/vs_trl.py."""

    curves: tyro.conf.Positional[Path]
    out: Path = Path("vs_trl.svg")


@dataclass
class Pretraining:
    """Validation losses of base_model/pretrain.py by tokens."""

    log: tyro.conf.Positional[Path]
    out: Path = Path("pretraining.svg")


@dataclass
class Sizes:
    """Validation losses of base models of several sizes, by tokens and by time: rows {size, minutes, tokens, val_simple, …}."""

    log: tyro.conf.Positional[Path]
    out: Path = Path("sizes.svg")


def read(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def band(axis, x: np.ndarray, runs: np.ndarray, label: str) -> None:
    """Plot the mean over runs (runs, points) with its standard error."""
    mean, error = runs.mean(0), runs.std(0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else np.zeros(runs.shape[1])
    (line,) = axis.plot(x, mean, label=label, marker="o" if len(x) < 12 else None, markersize=3)
    axis.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0)


def smooth(values: np.ndarray, window: int = 5) -> np.ndarray:
    """Mean of the last `window` values along the last axis, fewer at the start."""
    sums = np.cumsum(values, axis=-1)
    sums[..., window:] = sums[..., window:] - sums[..., :-window]
    return sums / np.minimum(np.arange(1, values.shape[-1] + 1), window)


def curves(args: Curves) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.2), layout="constrained")
    for group in args.groups:
        name, folders = group.split("=")
        runs = [read(Path(folder) / "metrics.jsonl") for folder in folders.split(",")]
        for axis, scalar in zip(axes.flat, SCALARS, strict=True):
            points = [
                {r["step"]: r[scalar] for r in run if scalar in r and r["step"] <= (args.steps or r["step"])} for run in runs
            ]
            x = sorted(set.intersection(*map(set, points)))
            values = np.array([[by_step[step] for step in x] for by_step in points])
            band(axis, np.array(x), values if scalar.startswith("eval/") else smooth(values), name)
            axis.set_title(SCALARS[scalar], loc="left")
    axes[0, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel("step (policy's figures: mean of the last five)")
    figure.savefig(args.out, metadata={"Date": None})


def length(args: Length) -> None:
    rows = [r for r in read(args.run / "metrics.jsonl") if "length/target" in r]
    step = [r["step"] for r in rows]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained", height_ratios=[3, 2])
    above.plot(step, [r["length/target"] for r in rows], color="black", label="target")
    for scalar, label in (("length/median", "median"), ("length/p90", "90th percentile")):
        (line,) = above.plot(step, [r[scalar] for r in rows], alpha=0.25)
        above.plot(step, smooth(np.array([r[scalar] for r in rows])), color=line.get_color(), label=f"{label}, of 5 steps")
    above.set_title("words of a story", loc="left")
    above.legend()
    for scalar, label in (("objective/reward", "reward"), ("parts/correlation", "correlation")):
        below.plot(step, smooth(np.array([r[scalar] for r in rows])), label=f"{label}, of 5 steps")
    below.legend()
    below.set_xlabel("step")
    figure.savefig(args.out, metadata={"Date": None})


def vs_trl(args: VsTrl) -> None:
    runs = json.loads(args.curves.read_text(encoding="utf-8"))["runs"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for side, by_seed in runs.items():
        of_seeds = list(by_seed.values())
        rewards = np.array([[point["reward"] for point in points] for points in of_seeds])
        for axis, key, unit in zip(axes, ("samples", "seconds"), (1, 60), strict=True):
            x = np.mean([[point[key] for point in points] for points in of_seeds], axis=0) / unit
            band(axis, x, rewards, side)
    axes[0].set_xlabel("samples")
    axes[1].set_xlabel("minutes of training")
    axes[0].set_title("held-out reward", loc="left")
    axes[0].legend()
    figure.savefig(args.out, metadata={"Date": None})


def pretraining(args: Pretraining) -> None:
    rows = read(args.log)
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for key, label in (("val_prose", "prose"), ("val_corpus", "corpus"), ("val_simple", "simple stories")):
        points = [(row["tokens"] / 1e6, row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
    axis.set_title("validation loss, nats a token", loc="left")
    axis.set_xlabel("million tokens")
    axis.legend()
    figure.savefig(args.out, metadata={"Date": None})


def sizes(args: Sizes) -> None:
    rows = read(args.log)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for size in dict.fromkeys(row["size"] for row in rows):
        own = [row for row in rows if row["size"] == size]
        for axis, x in zip(axes, ("tokens", "minutes"), strict=True):
            scale = 1e-6 if x == "tokens" else 1
            axis.plot(
                [row[x] * scale for row in own], [row["val_simple"] for row in own], label=size, marker="o", markersize=3
            )
    axes[0].set_title("validation loss on simple stories, nats a token", loc="left")
    axes[0].set_xlabel("million tokens")
    axes[1].set_xlabel("minutes of one core")
    axes[1].legend(title="layers x width")
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    command = tyro.cli(Annotated[Curves, tyro.conf.subcommand("curves")] | Length | VsTrl | Pretraining | Sizes)
    {Curves: curves, Length: length, VsTrl: vs_trl, Pretraining: pretraining, Sizes: sizes}[type(command)](command)
