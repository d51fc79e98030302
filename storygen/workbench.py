"""What the reward's workbench shows: rows read from a file, which word answered which, which pairs of samples flip."""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from storygen import textstats as ts
from storygen.bertscore import Encoder, Tf, token_weights, weighted
from storygen.calibration import Calibration, chance_key
from storygen.cli import InputError
from storygen.replaced import Probe

MOST_CHARACTERS = 200_000  # a short novel; encoding it takes seconds
SURROGATE = re.compile("[\ud800-\udfff]")


def read_rows(path: Path, extra: dict[str, type] | None = None) -> list[dict[str, Any]]:
    """Rows of a jsonl file, each checked for the keys of a sample and `extra` ones; InputError names file and line."""
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{data[: error.start].count(10) + 1}: not UTF-8 text; convert the file first") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: not a JSON object")
        for key, kind in ({"prompt": str, "think": str, "story": str, "finished": bool} | (extra or {})).items():
            if not isinstance(row.get(key), (int, float) if kind is float else kind):
                raise InputError(f"{path}:{number}: {key!r} must be a {KINDS[kind]}")
        for key in ("prompt", "think", "story"):
            if len(row[key]) > MOST_CHARACTERS:
                raise InputError(f"{path}:{number}: {key!r} has {len(row[key])} characters, more than {MOST_CHARACTERS}")
            if not row[key].isascii() and SURROGATE.search(row[key]):
                raise InputError(f"{path}:{number}: {key!r} holds half a character (a lone surrogate), which is no text")
        if row.get("room") is not None and not isinstance(row["room"], int):
            raise InputError(f"{path}:{number}: 'room' must be a whole number")
        target = row.get("length_target")
        if target is not None and not (isinstance(target, int | float) and 0 < target < math.inf):
            raise InputError(f"{path}:{number}: 'length_target' must be a number above 0")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} holds no row")
    return rows


# About one word in 20 of human text is below it.
MISPLACED = 0.2
# The similarity that a word of another meaning earns, in a story where it belongs.
POOR = 0.35
KINDS = {str: "string", bool: "boolean", float: "number", dict: "JSON object"}


@dataclass(frozen=True)
class Answer:
    """An outline word and the story word that its heaviest piece matches best. Starts are character offsets.

    similarity: weighted mean over the word's pieces of the cosine with the best match, times how far that belongs. weight:
    the word's share of the outline's.
    """

    start: int
    word: str
    story_start: int | None
    story_word: str
    similarity: float
    weight: float


def answered(encoder: Encoder, probe: Probe, think: str, story: str, table: np.ndarray, tf: Tf) -> Iterator[Answer]:
    """Which story word answered each content word of the outline."""
    x, y = encoder.embed([think, story])
    y = probe.discounted(y, encoder)
    if not len(x.ids) or not len(y.ids):
        return
    near = (x.vectors @ y.vectors.T).max(dim=1)
    weights = token_weights(x.ids, table, tf)
    places, answers = word_of_token(encoder, think), word_of_token(encoder, story)
    for word in dict.fromkeys(place for place in places if place):
        mine = [i for i, place in enumerate(places) if place == word]
        if weights[mine].sum() > 0 and ts.words(word[1]) and ts.words(word[1])[0] not in ts.STOP_WORDS:
            best = max(mine, key=lambda i: weights[i])
            answer = answers[int(near.indices[best])] or (None, "(start or end)")
            similarity = weighted(near.values.double().cpu().numpy()[mine], weights[mine])
            yield Answer(*word, *answer, similarity, float(weights[mine].sum() / weights.sum()))


def misplaced(encoder: Encoder, probe: Probe, text: str) -> dict[int, tuple[str, float]]:
    """Words that seem not to belong where they are: {start: (word, lowest `belongs` of its pieces)}, all under MISPLACED."""
    [coded] = encoder.embed([text])
    lowest: dict[int, tuple[str, float]] = {}
    for place, value in zip(word_of_token(encoder, text), probe.belongs(coded, encoder).tolist(), strict=False):
        if place and ts.words(place[1]) and value < min(MISPLACED, lowest.get(place[0], ("", 1.0))[1]):
            lowest[place[0]] = (place[1], value)
    return lowest


def word_of_token(encoder: Encoder, text: str) -> list[tuple[int, str] | None]:
    """For each token of an `Embedded`, the word it is a piece of as (start, word); None for special tokens."""
    text = text.strip()
    spans = [(m.start(), m.end()) for m in ts.TOKEN.finditer(text)]
    ends = [b for _, b in spans]
    words: list[tuple[int, str] | None] = []
    for start, end in encoder.backend.encode(text, add_special_tokens=False).offsets:
        at = bisect_right(ends, start)  # the first span that ends behind the token's start
        span = spans[at] if at < len(spans) and spans[at][0] < end else (start, end)
        words.append((span[0], text[span[0] : span[1]]))
    return [*(None for _ in encoder.prefix), *words, *(None for _ in encoder.suffix)]


def measures(calibration: Calibration, raw: dict[str, float]) -> Table:
    """What was measured of a row, next to what human rows show."""
    table = Table("measured", "here", "human 5th to 95th percentile")
    for key, value in raw.items():
        table.add_row(key, f"{value:.3f}", human_range(calibration, raw, key))
    return table


def answers(found: list[Answer]) -> Table:
    """Each content word of the outline next to the story word that answered it; poor answers in red."""
    table = Table("outline word", "answered by", "similarity", "weight")
    for a in found:
        style = "" if a.similarity > POOR else "red"
        table.add_row(a.word, a.story_word, f"{a.similarity:.2f}", f"{a.weight:.1%}", style=style)
    return table


def human_range(calibration: Calibration, raw: dict[str, float], key: str) -> str:
    """What human rows show for a raw measure: 5th to 95th percentile, or this text's chance and the human level above it."""
    if key in calibration.quantiles:
        return f"{calibration.quantile(key, 5):.3f} to {calibration.quantile(key, 95):.3f}"
    if key in calibration.human:
        n = raw[f"{key.partition(':')[0].partition('_')[2]}_words"]
        chance, gain = raw[chance_key(key)], calibration.human[key](n) - calibration.chance[key](n)
        return f"chance {chance:.3f}, human {chance + gain:.3f}"
    return ""


def flipped(groups: Sequence[Hashable], old: np.ndarray, new: np.ndarray) -> tuple[int, list[tuple[int, int]]]:
    """Pairs within a group whose order under `old` is reversed under `new`, the widest reversal first.

    Returns how many pairs the old scores order at all, and (was better, is better) indices of those that flip.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    pairs = [(i, j) for group in members.values() for i in group for j in group if old[i] > old[j]]
    flips = [(i, j) for i, j in pairs if new[i] < new[j]]
    return len(pairs), sorted(flips, key=lambda pair: new[pair[0]] - new[pair[1]])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's correlation of the ranks, ties at their mean rank. NaN if one side is all ties."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    x, y = (rank - rank.mean() for rank in ranks)
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")
