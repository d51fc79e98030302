"""What a run leaves to look at: metrics.jsonl, samples.jsonl, trackers, a progress bar and, now and then, a story."""

import json
import os
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from storygen.cli import InputError
from storygen.textstats import words

TrackerName = Literal["auto", "none", "tensorboard", "wandb", "trackio"]


class Trackers:
    """accelerate's trackers of a run, fed with the numbers that go into metrics.jsonl, under the same names."""

    def __init__(self, wanted: Sequence[TrackerName], run: Path, config: dict[str, Any], done: int = 0):
        """wanted: "auto" is TensorBoard if installed. done: steps a resumed run has behind it; later ones are replaced.

        Raises `InputError` for a tracker that is not installed.
        """
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        here = {str(name) for name in get_available_trackers()}
        names = set(wanted) - {"auto", "none"}
        if "auto" in wanted and "tensorboard" in here:
            names.add("tensorboard")
        self.trackers = []
        for name in sorted(names):
            if name not in here:
                raise InputError(f"--track {name}: {name} is not installed: pip install {name}, or give --track none")
            if name == "tensorboard":
                tracker = LOGGER_TYPE_TO_CLASS[name](name, run, purge_step=done + 1, filename_suffix=f".after_{done}")
            else:
                tracker = LOGGER_TYPE_TO_CLASS[name]("story-gen", name=run.resolve().name)
            tracker.start()
            if name == "tensorboard":  # its own method makes another run of every configuration
                tracker.log({"config": f"    {json.dumps(config, indent=1)}".replace("\n", "\n    ")}, step=done)
            else:
                tracker.store_init_configuration(config)
            self.trackers.append(tracker)

    def log(self, row: dict[str, Any]) -> None:
        """Log the numbers in a row of metrics.jsonl, at its `step`."""
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for tracker in self.trackers:
            tracker.log(numbers, step=row["step"])

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


class Log:
    """An append-only JSON-lines file that a resumed run continues exactly where its checkpoint was taken."""

    def __init__(self, path: Path, size: int = 0):
        """Keep the first `size` bytes, as recorded in the checkpoint; rows after them will be written again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, min(size, path.stat().st_size))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  open as long as the run

    def write(self, *rows: dict) -> None:
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.file.flush()

    def size(self) -> int:
        """Bytes on disk, flushed: what a checkpoint records."""
        os.fsync(self.file.fileno())
        return self.file.tell()


def progress(total: int, start: int, description: str, show: bool = True) -> tqdm:
    """The stage's one bar; silent if stderr is not a terminal, or without `show`."""
    disable = None if show else True
    return tqdm(total=total, initial=start, desc=description, unit="step", disable=disable, dynamic_ncols=True)


def show_sample(title: str, prompt: str, think: str, story: str) -> None:
    """Print a story apart from its outline, without disturbing a running bar."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")

    def block(text: str) -> str:
        return "\n".join(
            textwrap.fill(line, 100, initial_indent="    ", subsequent_indent="    ") for line in text.splitlines()
        )

    tqdm.write(f"\n{title}\n  prompt\n{block(prompt)}\n  outline\n{dim}{block(think)}{plain}\n  story\n{block(story)}\n")


def describe(samples: Sequence, scores: Sequence) -> dict[str, float]:
    """Mean reward, shares of well-formed and finished rows, lengths in words; parts and guards over well-formed rows.

    `samples` and `scores` are what the reward takes and returns, in the same order. A malformed row has no parts: counted
    as zeros they would repeat the grammar's curve in every chart.
    """
    n = len(scores)
    row = {"reward": sum(s.reward for s in scores) / n}
    good = [s for s in scores if s.verdict == "ok"]
    for kind in ("parts", "guards"):
        for name in getattr(scores[0], kind):
            row[f"{kind}/{name}"] = sum(getattr(s, kind)[name] for s in good) / max(1, len(good))
    row["samples/well_formed"] = len(good) / n
    row["samples/finished"] = sum(s.finished for s in samples) / n
    lengths = [len(words(s.story)) for s in samples]
    row["length/median"], row["length/p90"] = (float(q) for q in np.percentile(lengths, (50, 90)))
    row["length/outline_median"] = statistics.median(len(words(s.think)) for s in samples)
    return row


def human_range(scores: Sequence) -> dict[str, float]:
    """10th and 90th percentile of the reward and each part over well-formed human rows' scores; empty without any."""
    good = [score for score in scores if score.verdict == "ok"]
    if not good:
        return {}
    values = {"reward": [score.reward for score in good]}
    values |= {f"parts/{name}": [score.parts[name] for score in good] for name in good[0].parts}
    return {
        f"human/{name}/p{q}": float(value)
        for name, each in values.items()
        for q, value in zip((10, 90), np.percentile(each, (10, 90)), strict=True)
    }


def sample_rows(
    step: int, split: str, samples: Sequence, scores: Sequence, advantages: Sequence, length_target: float
) -> list[dict]:
    """Rows of samples.jsonl: everything needed to look at a sample, and to score it again without sampling."""
    return [
        {"step": step, "split": split, "prompt": s.prompt, "think": s.think, "story": s.story, "finished": s.finished,
         "verdict": c.verdict, "room": s.room, "reward": c.reward, "parts": c.parts, "guards": c.guards, "raw": c.raw,
         "length_target": length_target, "advantage": a}
        for s, c, a in zip(samples, scores, advantages)
    ]  # fmt: skip


def alarms(row: dict[str, float], kl_target: float, entropy_start: float) -> list[str]:
    """What a reader of the curves would stop a run for, each with the figure that shows it and what to try.

    row: a step's metrics. kl_target: nats per token. entropy_start: the first step's, nats per token.
    """
    finished, kl, entropy = row["samples/finished"], row["objective/kl"], row["objective/entropy"]
    skipped = row["policy/skipped"]
    found = {
        f"only {finished:.0%} of the samples finished: stories run into the limit; see samples.jsonl, lower --lr": finished
        < 0.5,
        "all samples have the same reward: nothing to learn from; see samples.jsonl, raise --k or change the reward": (
            row["objective/reward_std"] < 1e-6
        ),
        f"KL to the reference is {kl:.2f} nats a token, over ten times its target: lower --lr or --kl-stop": kl
        > 10 * kl_target,
        f"entropy fell from {entropy_start:.2f} to {entropy:.2f} nats a token: the policy repeats itself; raise --beta": (
            entropy < entropy_start / 3
        ),
        f"{skipped} minibatches were left out, their gradients not finite: lower --lr": skipped > 0,
    }
    return [text for text, rings in found.items() if rings]
