"""A scored row as a standalone HTML page: which story word answered which outline word, and each part against human rows."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from storygen.calibration import PAIRS, Calibration, chance_key
from storygen.cli import write_atomically
from storygen.workbench import Answer


def write_page(
    out: Path,
    sample: Any,
    score: Any,
    answers: list[Answer],
    *,
    misplaced: dict[str, dict[int, tuple[str, float]]],
    weights: dict[str, float],
    switched_off: set[str],
    recall_keys: list[str],
    calibration: Calibration,
) -> None:
    """sample, score: a row in the reward's format and its score. recall_keys: names of the three pairs in `score.raw`.
    misplaced: {"think"|"story": `workbench.misplaced`}.

    A malformed row has only its texts and the verdict: nothing else is measured.
    """
    formed = score.verdict == "ok"
    ranges = _ranges(score.raw, recall_keys, calibration) if formed else {}
    page = {
        "reward": score.reward,
        "verdict": "well-formed" if formed else f"malformed: {score.verdict}",
        "prompt": sample.prompt,
        "parts": [
            {"name": f"{name}, weight {weights[name]:.2f}" if name in weights else name.replace("think", "outline").replace("_", " by "),
             "score": score.parts[name], **facts}
            for name, facts in ranges.items()
        ],
        "guards": [(n + (" (off)" if n in switched_off else ""), v) for n, v in score.guards.items() if v < 1],
        "think": _runs(sample.think.strip(), [(a.start, a.word, a) for a in answers], misplaced["think"]),
        "story": _runs(
            sample.story.strip(),
            [(a.story_start, a.story_word, None) for a in answers if a.story_start is not None],
            misplaced["story"],
        ),
    }  # fmt: skip
    template = (files("storygen") / "explain.html").read_text("utf-8")
    write_atomically(out, Environment(autoescape=True).from_string(template).render(page))


def _runs(text: str, marked: list[tuple[int, str, Answer | None]], odd: dict[int, tuple[str, float]]) -> list[dict]:
    """The text cut at the marked words. word: start of one that asks or answers; odd: how well a misplaced one belongs."""
    runs, at = [], 0
    heaviest = max((a.weight for _, _, a in marked if a), default=1.0)
    places = {start: (word, None, None) for start, (word, _) in odd.items()}
    places |= {start: (word, start, answer) for start, word, answer in marked}
    for start, (word, link, answer) in sorted(places.items()):
        runs.append({"text": text[at:start], "word": None})
        run = {"text": word, "word": link, "odd": odd[start][1] if start in odd else None}
        if answer:
            run |= {
                "story": -1 if answer.story_start is None else answer.story_start,
                "shade": f"{0.08 + 0.5 * answer.weight / heaviest:.2f}",
                "says": f"“{word}” ({answer.weight:.1%} of the weight) answered by “{answer.story_word}” "
                f"({answer.similarity:.2f})",
            }
        runs.append(run)
        at = start + len(word)
    return [*runs, {"text": text[at:], "word": None}]


def _ranges(raw: dict[str, float], recall_keys: list[str], human: Calibration) -> dict[str, dict]:
    """{part: where this row stands against the human range, in percent of a track's width, and in words}."""
    n = raw["story_words"]
    ranges = {}
    for key, pair in zip(recall_keys, PAIRS, strict=False):
        at = raw[f"{pair.partition('_')[2]}_words"]
        gain = human.human[key](at) - human.chance[key](at)
        own, chance = raw[key], raw[chance_key(key)]
        says = f"recall {own:.2f}; {chance:.2f} by chance, human rows {chance + gain:.2f}"
        ranges[pair] = _track(own - chance, 0.98 * gain, 1.02 * gain, says)  # the human mean: its spread is not kept
    low, high = (human.quantile("story_words", level) for level in (5, 95))
    ranges["length"] = _track(n, low, high, f"{n:.0f} words; human rows {low:.0f} to {high:.0f}")
    mean, p95 = (human.repetition["2"][which](n) for which in ("mean", "p95"))
    says = f"{raw['repeated_2']:.1%} of word pairs repeated; human mean {mean:.1%}, p95 {p95:.1%}"
    ranges["repetition"] = _track(raw["repeated_2"], 0, p95, says)
    low, high = (human.quantile("dialogue", level) for level in (5, 95))
    says = f"{raw['dialogue']:.0%} of the words are speech; human rows {low:.0%} to {high:.0%}"
    ranges["prose"] = _track(raw["dialogue"], low, high, says)
    return ranges


def _track(value: float, low: float, high: float, says: str) -> dict:
    full = 1.15 * max(value, high, 1e-9)
    at, low, high = (round(100 * max(0.0, x) / full, 1) for x in (value, low, high))
    return {"at": at, "low": low, "high": high, "says": says}
