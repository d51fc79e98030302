"""How long does data preparation take on all of WritingPrompts, and which stages take the time?

    python benchmarks/data_prep.py [--source FILE.jsonl] [--quick]

`data_prep.main` itself runs, with timers around the functions it calls, on raw rows made from --source: each row as it is,
then again with most lower-case words replaced by words of other rows (seeded), so that markup, lengths and word frequencies
stay the same and hardly any row is a near copy of another. Outline rows are made from the embedded corpus in the same way.
Every round runs it once without and once with the source rows; min, median, max and rows/s are of the difference, a stage's
time for the source rows alone.

The projection, for 272,600 rows, on this machine:
linear stages        the difference, scaled: rows (reading, cleaning, splitting, exact copies, sketches of stories, storing;
                     in processes on every core), files (writing what was kept) and idf (as if every row were kept)
near copies          of prompts: more than linear, so measured separately, on as many made prompts as there are rows (made
                     from few real ones, so they share more words than real ones do). --quick takes fewer and extrapolates
                     the power law through a quarter and all of them, which is too low by half
calibration, rest    of fixed sample size, or loading: taken as they are. With --quick the calibration uses few rows and is
                     scaled up to as many rows as it draws from a large set: a rough figure

projected_minutes    to prepare 272,600 rows already on disk; the outline set's own rows, some seconds, are left out
rows_per_s           of each stage whose time grows with the number of rows
peak_gb              peak memory of this process, including its own list of all prompts; cleaning processes come on top
calibration_s        seconds of the calibration in the projection
"""

import contextlib
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from itertools import cycle, islice
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root's data_prep.py, not this one
import data_prep
from storygen import rowstore
from storygen.calibration import PROBE_TEXTS
from storygen.cleaning import clean_prompt
from storygen.corpus import read_rows, split_of
from storygen.duplicates import crossing_prompts
from storygen.memory import peak_memory

WHOLE = 272_600  # rows of euclaise/writingprompts
WORD = re.compile(r"(?<= )[a-z]+(?= )")
REPLACED = 0.7
# Every timed function, and the stage that its own time counts towards; timed functions that it calls count towards theirs.
TIMED = (
    (data_prep, "main", "rest"),
    (data_prep, "read", "rows"),
    (rowstore, "crossing_stories", "rows"),
    (rowstore, "crossing_prompts", "near copies"),
    (rowstore.RowStore, "settle", "files"),
    (rowstore.RowStore, "write", "files"),
    (rowstore.RowStore, "human", "files"),
    (data_prep, "build_idf", "idf"),
    (data_prep, "calibrate", "calibration"),
)
LINEAR = ("rows", "files", "idf")
Row = dict[str, str]


@dataclass
class Args:
    source: str = "corpus"
    """Rows {prompt, story} that the source rows are made from: corpus, or the path of a file or folder."""
    rows: int = 20_000
    """Source rows of a run. The first 2,048 are cleaned before other processes start, and count as if all were."""
    outlines: int = 2_000
    """Outline rows per run."""
    prompts: int = WHOLE
    """Prompts that are searched for near copies."""
    rounds: int = 3
    """Rounds; in each, data preparation runs once without and once with the source rows."""
    seed: int = 0
    """Draws the words that are replaced."""
    quick: bool = False
    """1,000 source rows, 60 outline rows, 20,000 prompts, one round."""


def made(rows: list[Row], count: int, seed: int) -> Iterator[Row]:
    """`count` rows: the given ones, then over and over with most lower-case words replaced by others of the same column."""
    rng = random.Random(seed)
    words = {key: [w for row in rows for w in WORD.findall(row[key])] for key in rows[0]}

    def changed(text: str, others: list[str]) -> str:
        return WORD.sub(lambda match: rng.choice(others) if rng.random() < REPLACED else match[0], text)

    for i, row in enumerate(islice(cycle(rows), count)):
        yield row if i < len(rows) else {key: changed(row[key], words[key]) for key in row}


def write(path: Path, rows: Iterator[Row]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


class Clock:
    """Seconds spent in each stage itself: while a timed function calls another, only the inner one's clock runs."""

    def __init__(self) -> None:
        self.seconds: Counter = Counter()
        self.running: list[str] = []
        self.since = 0.0

    def switch(self) -> None:
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, function: Callable, stage: str) -> Callable:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.running.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.running.pop()

        return call


def prepare(source: Path, outlines: Path, out: Path) -> tuple[Counter, int]:
    """Seconds per stage of a run, and documents of its idf table; no calibration if there are only outline rows."""
    clock = Clock()
    with contextlib.ExitStack() as undo:
        for owner, name, stage in TIMED:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, clock.timed(getattr(owner, name), stage))
        if source == outlines:
            data_prep.calibrate = lambda *_: SimpleNamespace(save=Path.touch, summary=str)
        undo.enter_context(contextlib.redirect_stdout(sys.stderr))
        data_prep.main(data_prep.Args(preset="demo", source=str(source), outlines=str(outlines), out=out, device="cpu"))
    return clock.seconds, json.loads((out / "manifest.json").read_text("utf-8"))["idf_documents"]


def near_copies(prompts: list[str]) -> float:
    """Seconds to look for near copies across splits."""
    splits = [split_of(prompt) for prompt in prompts]
    clock = time.perf_counter()
    crossing_prompts(prompts, splits)
    return time.perf_counter() - clock


def main(args: Args) -> None:
    if args.quick:
        args = replace(args, rows=1_000, outlines=60, prompts=20_000, rounds=1)
    base = [{key: row[key] for key in ("prompt", "story")} for row in read_rows(args.source) if row["story"]]
    plans = [row for row in read_rows("corpus") if row["think"] and row["story"]]
    # All of them changed: with --source corpus, the source rows are these very stories.
    plans = list(islice(made(plans, len(plans) + args.outlines, args.seed), len(plans), None))
    alone: dict[str, list[float]] = {stage: [] for stage in LINEAR}
    fixed: dict[str, list[float]] = {"calibration": [], "rest": []}
    with tempfile.TemporaryDirectory() as folder:
        source, outlines, out = (Path(folder) / name for name in ("source.jsonl", "outlines.jsonl", "out"))
        write(source, made(base, args.rows, args.seed))
        write(outlines, iter(plans[:10]))
        warm, _ = prepare(outlines, outlines, out)
        write(outlines, iter(plans))
        for _ in range(args.rounds):
            before, fewer = prepare(outlines, outlines, out)
            after, documents = prepare(source, outlines, out)
            for stage in LINEAR:
                alone[stage].append(after[stage] - before[stage])
            for stage, times in fixed.items():
                times.append(after[stage])
    # From the first run: later ones find the libraries loaded.
    fixed["rest"] = [warm["rest"]]
    train = sum(split_of(clean_prompt(row["prompt"])) == "train" for row in plans)
    # Cleaned beforehand; replacing words keeps them clean.
    clean = [{"prompt": clean_prompt(row["prompt"])} for row in base]
    unique = list(dict.fromkeys(row["prompt"] for row in made(clean, args.prompts, args.seed)))
    quarter, whole = near_copies(unique[: len(unique) // 4]), near_copies(unique)
    power = max(1.0, log(whole / quarter) / log(4))

    kept = documents - fewer
    scale = dict.fromkeys(LINEAR, WHOLE / args.rows) | {"idf": WHOLE / kept}
    scale |= {"near copies": (WHOLE / args.prompts) ** power, "rest": 1.0}
    scale["calibration"] = max(1.0, PROBE_TEXTS / 2 / max(1, train))
    table = alone | {"near copies": [whole]} | fixed
    rows = dict.fromkeys(table, args.rows) | {"idf": kept, "near copies": args.prompts}
    minutes = {stage: statistics.median(times) * scale[stage] / 60 for stage, times in table.items()}
    print(
        f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, {args.rows} rows made of {len(base)}, "
        f"{kept} kept, {args.outlines} outline rows, {train} of them for training; {len(unique)} prompts, "
        f"near copies grow as n^{power:.2f}"
    )
    print(f"{'':12} {'min s':>8} {'median':>8} {'max':>8} {'rows/s':>9} {'of ' + format(WHOLE, ',') + ', min':>16}")
    rates = {}
    for stage, times in table.items():
        middle = statistics.median(times)
        if stage not in fixed:
            rates[stage] = rows[stage] / max(middle, 1e-9)
        rate = f"{rates[stage]:9.0f}" if stage in rates else f"{'fixed':>9}"
        print(f"{stage:12} {min(times):8.3f} {middle:8.3f} {max(times):8.3f} {rate} {minutes[stage]:16.2f}")
    total = sum(minutes.values())
    print(f"{'all':12} {'':36} {total:16.2f}")
    print(json.dumps({
        "bench": "data_prep",
        "projected_minutes": total,
        "rows_per_s": {stage.replace(" ", "_"): rate for stage, rate in rates.items()},
        "calibration_s": statistics.median(fixed["calibration"]) * scale["calibration"],
        "peak_gb": peak_memory(),
    }))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
