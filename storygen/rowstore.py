"""Cleaned rows of a whole data set on disk; memory holds only what tells them apart (some 300 bytes per row)."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storygen.cleaning import MOST_CHARACTERS, Bounds, clean_prompt, clean_row
from storygen.corpus import SPLITS, split_of
from storygen.duplicates import crossing_prompts, crossing_stories, key_of, story_sketch, text_key, words_of
from storygen.workers import in_processes


def _schema(*names: str) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


SCHEMA = _schema("origin", "split", "prompt", "think", "story")
FILES = {"sft": _schema("split", "prompt", "think", "story"), "prompts": _schema("split", "prompt")}
BATCH = 1024


class Tally:
    """What became of the rows of one origin: `kept` by split, `dropped` by reason and split ("unknown": none yet)."""

    def __init__(self) -> None:
        self.kept: Counter = Counter()
        self.dropped: defaultdict[str, Counter] = defaultdict(Counter)

    def as_dict(self) -> dict:
        dropped = {reason: dict(by_split) for reason, by_split in sorted(self.dropped.items()) if +by_split}
        gone = sum(sum(by_split.values()) for by_split in dropped.values())
        return {"read": self.kept.total() + gone, "kept": dict(self.kept), "dropped": dropped}


@dataclass(frozen=True)
class Prepared:
    """What can be known of a raw row by itself. row: cleaned, None if it is dropped for `reason`."""

    split: str
    reason: str | None = None
    row: dict | None = None
    key: bytes = b""
    """Equal for copies: of stories, whatever their prompts, and of prompts without a story."""
    sketch: np.ndarray | None = None
    """Of a story."""


def prepare(rows: list[dict], bounds: Bounds) -> list[Prepared]:
    """Nearly all of the work on raw rows; no row needs the others."""
    return [prepare_row(row, bounds) for row in rows]


def prepare_row(row: dict, bounds: Bounds) -> Prepared:
    clean, reason = clean_row(row, bounds)
    if clean is None:
        endless = len(row["prompt"]) > MOST_CHARACTERS * bounds.max_prompt
        prompt = "" if endless else clean_prompt(row["prompt"])
        return Prepared(split_of(prompt) if prompt else "unknown", reason)
    split, story = split_of(clean["prompt"]), clean["story"]
    if story is None:
        return Prepared(split, row=clean, key=b"p" + text_key(clean["prompt"]))
    words = words_of(story)
    return Prepared(split, row=clean, key=b"s" + key_of(words), sketch=story_sketch(words))


class RowStore:
    """Add raw rows, `settle` once, then read the kept ones back as often as needed, in the order they were added."""

    def __init__(self, path: Path, bounds: Bounds):
        self.path, self.bounds = path, bounds
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self.outlines: dict[int, str] = {}
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._pending: list[dict] = []
        self._origins: list[str] = []
        self._splits: list[str] = []
        self._prompts: list[str] = []
        self._sketches: list[np.ndarray | None] = []
        self._seen: set[bytes] = set()
        self._dropped: set[int] = set()

    def add(self, rows: Iterable[dict], origin: str) -> None:
        """Clean rows, in several processes if there are many, and keep each or count why not. A story is kept once,
        whatever prompt it comes with."""
        for batch in in_processes(partial(prepare, bounds=self.bounds), rows):
            for prepared in batch:
                self._keep(prepared, origin)

    def _keep(self, prepared: Prepared, origin: str) -> None:
        tally, split, row = self.tallies[origin], prepared.split, prepared.row
        if row is None or prepared.key in self._seen:
            tally.dropped[prepared.reason or "duplicate"][split] += 1
            return
        self._seen.add(prepared.key)
        tally.kept[split] += 1
        self._origins.append(origin)
        self._splits.append(split)
        self._prompts.append(row["prompt"])
        self._sketches.append(prepared.sketch)
        self._pending.append({"origin": origin, "split": split, **row})
        if len(self._pending) == BATCH:
            self._flush()

    def settle(self) -> None:
        """No more rows. Those with a near-duplicate prompt or story in another split leave the side nearer to training."""
        self._flush()
        self._writer.close()
        unique = list(dict.fromkeys(self._prompts))
        crossing = {unique[i] for i in crossing_prompts(unique, [split_of(prompt) for prompt in unique])}
        stories = [i for i, sketch in enumerate(self._sketches) if sketch is not None]
        if stories:
            sketches = np.stack([self._sketches[i] for i in stories])
            self._dropped = {stories[i] for i in crossing_stories(sketches, [self._splits[i] for i in stories])}
        self._dropped |= {i for i, prompt in enumerate(self._prompts) if prompt in crossing}
        for i in self._dropped:
            tally, split = self.tallies[self._origins[i]], self._splits[i]
            tally.kept[split] -= 1
            tally.dropped["near_duplicate"][split] += 1

    def rows(self) -> Iterator[tuple[int, dict]]:
        """(number, row) of every kept row: {origin, split, prompt, think, story}; `outlines[number]` replaces think."""
        number = 0
        for batch in pq.ParquetFile(self.path).iter_batches(batch_size=BATCH):
            for row in batch.to_pylist():
                if number not in self._dropped:
                    yield number, {**row, "think": self.outlines.get(number, row["think"])}
                number += 1

    def texts(self) -> Iterator[str]:
        """The documents of the IDF table: every story, and the outline of every story that has one."""
        for _, row in self.rows():
            yield from filter(None, (row["story"], row["story"] and row["think"]))

    def human(self, most: int, seed: int) -> tuple[list[dict], list[str]]:
        """Training rows {prompt, think, story}, and at most `most` other training stories (reservoir sampling)."""
        rng, rows, stories, count = random.Random(seed), [], [], 0
        for _, row in self.rows():
            if row["split"] != "train" or not row["story"]:
                continue
            if row["think"]:
                rows.append({key: row[key] for key in ("prompt", "think", "story")})
                continue
            count += 1
            if len(stories) < most:
                stories.append(row["story"])
            elif (i := rng.randrange(count)) < most:
                stories[i] = row["story"]
        return rows, stories

    def write(self, folder: Path) -> dict[str, dict[str, int]]:
        """sft.parquet: rows with an outline and a story. prompts.parquet: every prompt once. Returns row counts by split."""
        counts = {name: dict.fromkeys(SPLITS, 0) for name in FILES}
        pending: dict[str, list[dict]] = {name: [] for name in FILES}
        writers = {name: pq.ParquetWriter(folder / f"{name}.parquet", schema) for name, schema in FILES.items()}

        def flush(name: str) -> None:
            if pending[name]:
                writers[name].write_table(pa.Table.from_pylist(pending[name], FILES[name]))
                pending[name] = []

        seen: set[bytes] = set()
        for _, row in self.rows():
            key = text_key(row["prompt"])
            for name, wanted in (("sft", row["think"] and row["story"]), ("prompts", key not in seen)):
                if wanted:
                    counts[name][row["split"]] += 1
                    pending[name].append({column: row[column] for column in FILES[name].names})
                    if len(pending[name]) == BATCH:
                        flush(name)
            seen.add(key)
        for name, writer in writers.items():
            flush(name)
            writer.close()
        return counts

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_pylist(self._pending, SCHEMA))
            self._pending = []
