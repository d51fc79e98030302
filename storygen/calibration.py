"""Measured statistics of human rows: the yardstick that the reward holds a sample against."""

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from storygen import textstats as ts
from storygen.bertscore import Embedded, Encoder, Panel, best_match, token_weights, weighted
from storygen.cli import InputError, write_atomically
from storygen.idf import Idf
from storygen.replaced import Probe, answering, fit_probe

PAIRS = ("think_story", "prompt_think", "prompt_story")
TF = ("raw", "sublinear", "binary")
CAP = 99.0
LEVELS = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
MAX_ROWS = 200
PANEL = 32
MAX_STORIES = 4000
PROBE_TEXTS = 800
HOME_MEASURES = ("belongs", "think_belongs", "answers_belong")
RESAMPLES = 200
METHODS = ("bertscore", "calibration", "replaced", "textstats")  # modules that a calibration's figures come from


@dataclass(frozen=True)
class Curve:
    """A value as a function of a length in words: linear in ln n between the knots, constant beyond the first and the last.

    band: half the width of a 95% interval at every knot, by bootstrap over the rows it was measured on.
    """

    words: tuple[float, ...]
    value: tuple[float, ...]
    band: tuple[float, ...] = ()

    def __call__(self, n: float) -> float:
        return float(np.interp(np.log(max(n, 1.0)), np.log(self.words), self.value))


def recall_key(pair: str, tf: str, capped: bool) -> str:
    """The name under which a pair's recall is logged and calibrated; it includes the token weights."""
    return f"{pair}:{tf}" + ("" if capped else ":uncapped")


def chance_key(key: str) -> str:
    """The name under which a recall's chance level is logged: what the same candidate earns on the panel."""
    return f"{key}:chance"


def token_weightings(ids: np.ndarray, tables: dict[bool, np.ndarray]) -> dict[tuple[str, bool], np.ndarray]:
    """Every weighting of a text's tokens that a config may ask for: {(tf, capped): (n,)}. tables: {capped: (vocab,)}."""
    return {(tf, capped): token_weights(ids, tables[capped], tf) for tf in TF for capped in tables}


def text_measures(prompt: str, think: str, story: str) -> dict[str, float]:
    """The text measures of one row whose human quantiles are kept. Word order needs a table and is measured separately."""
    p, t, s = ts.words(prompt), ts.words(think), ts.words(story)
    return {
        "story_words": float(len(s)),
        "think_words": float(len(t)),
        "dialogue": ts.dialogue_share(story),
        "copied": ts.copied_share(s, (p, t)),
        "copied_short": ts.copied_share(s, (t,), 3),
        "think_copied": ts.copied_share(t, (p,)),
        "mattr": ts.mattr(s),
        "think_mattr": ts.mattr(t),
        "stop_share": ts.stop_share(s),
        "think_stop_share": ts.stop_share(t),
        "prompt_share": ts.borrowed_share(s, p),
        "think_share": ts.borrowed_share(s, t),
        "densest": ts.densest_share(s, p + t),
        "think_prompt_share": ts.borrowed_share(t, p),
    }


def home_measures(probe: Probe, encoder: Encoder, table: np.ndarray, think: Embedded, story: Embedded) -> dict[str, float]:
    """How well the words of a row belong where they stand, by `Probe.home`. table: token weights (vocab,).

    belongs, think_belongs: of the story and of the outline. answers_belong: of the story's words that answer the outline, as
    a ratio to the story's own figure, so that a loose style is not mistaken for outline words thrown in.
    """
    story_home = probe.home(story, encoder, table[story.ids])
    answers = probe.home(story, encoder, answering(think, story, token_weights(think.ids, table)))
    return {
        "belongs": story_home,
        "think_belongs": probe.home(think, encoder, table[think.ids]),
        "answers_belong": answers / story_home if story_home > 0 else 0.0,
    }


@dataclass(frozen=True)
class Calibration:
    """Figures of human rows. Made by `calibrate`, stored as `calibration.json` in the data folder.

    n: rows and stories measured, and rows whose texts were encoded for the correlation curves. seed: drew those rows and
    the mismatched pairs. encoder: {"name", "layer", "sha256"} of the encoder that the curves belong to.
    repetition: {"2"|"4": {"mean"|"p95": Curve}}, share of repeated word n-grams by story length.
    quantiles: {measure: values at LEVELS percent}, of `text_measures`, `home_measures`, `order` and `think_order`.
    shuffled: {"order"|"think_order": mean score of the same texts with their words shuffled}, nats per pair.
    chance, human: {recall_key: Curve}, recall of mismatched and of true pairs by candidate length; the gap between
    them is the scale for a recall's excess over its own chance level.
    panel: {"prompt"|"think": PANEL texts of other rows}, on which each candidate's own chance level is measured.
    pairs: counts of `WordOrder`.
    probe: tells which tokens belong where they stand; the quantiles of `home_measures` come from it.
    inputs: `inputs_key` of what it was measured on.
    """

    n: dict[str, int]
    seed: int
    encoder: dict[str, str | int]
    repetition: dict[str, dict[str, Curve]]
    quantiles: dict[str, list[float]]
    shuffled: dict[str, float]
    chance: dict[str, Curve]
    human: dict[str, Curve]
    panel: dict[str, list[str]]
    pairs: dict[str, int]
    probe: Probe
    inputs: str

    def quantile(self, measure: str, level: float) -> float:
        """The human value of a measure at a percentile, linear between LEVELS."""
        return float(np.interp(level, LEVELS, self.quantiles[measure]))

    def summary(self) -> str:
        """The figures that the reward relies on most, at the human median lengths, with their bands."""

        def at(curve: Curve, text: str = "story") -> str:
            n = self.quantile(f"{text}_words", 50)
            return f"{curve(n):.3f} +- {np.interp(np.log(n), np.log(curve.words), curve.band):.3f}"

        parts = []
        for pair in PAIRS:
            key, (reference, candidate) = recall_key(pair, "sublinear", True), pair.split("_")
            levels = f"{at(self.human[key], candidate)}, by chance {at(self.chance[key], candidate)}"
            parts.append(f"recall of {reference} by {candidate} {levels}")
        parts.append(f"repeated 2-grams {at(self.repetition['2']['mean'])}, p95 {at(self.repetition['2']['p95'])}")
        return "; ".join(parts)

    def save(self, path: Path | str) -> None:
        write_atomically(Path(path), json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path | str) -> "Calibration":
        """Read what `save` wrote; InputError if the file is missing or is something else."""
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            curves = {key: {name: Curve(**curve) for name, curve in fields[key].items()} for key in ("chance", "human")}
            repetition = {n: {k: Curve(**curve) for k, curve in both.items()} for n, both in fields["repetition"].items()}
            made = Calibration(**{**fields, **curves, "repetition": repetition, "probe": Probe(**fields["probe"])})
            made.summary()  # reads what every use of it needs
            return made
        except FileNotFoundError:
            raise InputError(f"{path} is missing: run data_prep.py first") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{path} is not a calibration of this version: run data_prep.py again") from None


def inputs_key(rows: list[dict[str, str]], encoder: Encoder, idf: Idf, seed: int, stories: list[str]) -> str:
    """One hash of everything that `calibrate` depends on, its own code included."""
    methods = [Path(__file__).with_name(f"{name}.py").read_text("utf-8") for name in METHODS]
    facts = [rows, stories, encoder.sha256, encoder.layer, idf.fingerprint, idf.documents, seed, methods]
    return hashlib.sha256(json.dumps(facts).encode() + idf.df.tobytes()).hexdigest()


def calibrate(
    rows: list[dict[str, str]], encoder: Encoder, idf: Idf, seed: int, stories: list[str] | None = None
) -> Calibration:
    """Measure human rows {prompt, think, story}, and optionally more `stories` that have no outline.

    At most MAX_ROWS rows are encoded and MAX_STORIES stories counted, drawn with `seed`. Needs at least two rows.
    """
    rows = [row for row in rows if row["think"].strip() and row["story"].strip()]
    if len(rows) < 2:
        raise InputError(f"calibration needs at least 2 rows with outline and story, there are {len(rows)}")
    inputs = inputs_key(rows, encoder, idf, seed, stories or [])
    rng = random.Random(seed)
    rows = rng.sample(rows, min(len(rows), MAX_STORIES))
    paired = rows[:MAX_ROWS]
    texts = [row["story"] for row in rows] + rng.sample(stories or [], min(len(stories or []), MAX_STORIES))
    measured = [text_measures(row["prompt"], row["think"], row["story"]) for row in rows]
    values = {key: [m[key] for m in measured] for key in measured[0]}
    for text in texts[len(rows) :]:
        split = ts.words(text)
        values["story_words"].append(float(len(split)))
        values["dialogue"].append(ts.dialogue_share(text))
        values["mattr"].append(ts.mattr(split))
        values["stop_share"].append(ts.stop_share(split))
    order, thinks = ts.WordOrder.count([*texts, *(row["think"] for row in rows)]), [row["think"] for row in rows]
    values["order"], values["think_order"] = crossed_order(texts, thinks), crossed_order(thinks, texts)
    panel = rows[-PANEL:]
    tables = {True: idf.capped(CAP), False: idf.weights}
    # Beyond the encoded rows where there are enough, else with as many of those as it takes.
    unseen = rows[max(0, min(MAX_ROWS, len(rows) - PROBE_TEXTS // 2)) :][: PROBE_TEXTS // 2]
    probe = fit_probe([row[field] for row in unseen for field in ("think", "story")], encoder, tables[True], seed)
    coded = {field: encoder.embed([row[field] for row in paired]) for field in ("prompt", "think", "story")}
    homes = [home_measures(probe, encoder, tables[True], x, y) for x, y in zip(coded["think"], coded["story"], strict=True)]
    values |= {key: [home[key] for home in homes] for key in homes[0]}
    chance, human = correlation_curves(paired, coded, panel, encoder, probe, tables, rng)
    return Calibration(
        n={"rows": len(rows), "stories": len(texts), "encoded": len(paired)},
        seed=seed,
        encoder={"name": encoder.name, "layer": encoder.layer, "sha256": encoder.sha256},
        repetition={str(n): repetition_curves([ts.words(text) for text in texts], n) for n in (2, 4)},
        quantiles={key: [float(v) for v in np.percentile(value, LEVELS)] for key, value in values.items()},
        shuffled={
            "order": float(np.mean([order.score(shuffled(text, rng)) for text in texts])),
            "think_order": float(np.mean([order.score(shuffled(text, rng)) for text in thinks])),
        },
        chance=chance,
        human=human,
        panel={field: [row[field] for row in panel] for field in ("prompt", "think")},
        pairs=order.pairs,
        probe=probe,
        inputs=inputs,
    )


def shuffled(text: str, rng: random.Random) -> str:
    """The same words, punctuation attached, in random order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def crossed_order(texts: Sequence[str], more: Sequence[str]) -> list[float]:
    """Word-order score of each text under a table that has not seen it, counted on the other half of `texts` and `more`."""
    scores = []
    for half in (0, 1):
        table = ts.WordOrder.count([*texts[1 - half :: 2], *more])
        scores += [table.score(text) for text in texts[half::2]]
    return scores


def rising(values: Sequence[float]) -> tuple[float, ...]:
    """The closest non-decreasing sequence in the least-squares sense (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([float(value), 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, size = pools.pop()
            pools[-1] = [(pools[-1][0] * pools[-1][1] + mean * size) / (pools[-1][1] + size), pools[-1][1] + size]
    return tuple(mean for mean, size in pools for _ in range(int(size)))


def repetition_curves(texts: list[list[str]], n: int) -> dict[str, Curve]:
    """Mean and p95 of the share of repeated n-grams at a grid of lengths, over the prefixes of all stories long enough.

    Lengths that fewer than 20 stories reach (or not all, if there are fewer) are left out; beyond the last, its value holds.
    """
    enough = min(20, len(texts))
    grid = [length for length in np.geomspace(25, 4000, 23).round().astype(int)]
    grid = [length for length in grid if sum(len(text) >= length for text in texts) >= enough] or [25]
    shares = np.array([[ts.repeated_share(text[:m], n) if len(text) >= m else np.nan for m in grid] for text in texts])
    reached = np.where(np.isnan(shares).all(axis=0), 0.0, shares)  # a length no story reaches: no repetition known

    def curve(statistic: Callable[[np.ndarray], np.ndarray]) -> Curve:
        def value(places: np.ndarray) -> tuple[float, ...]:
            return rising(statistic(reached[places]))

        words = tuple(float(length) for length in grid)
        return Curve(words, value(np.arange(len(texts))), band(value, len(texts)))

    return {
        "mean": curve(lambda share: np.nanmean(share, axis=0)),
        "p95": curve(lambda share: np.nanpercentile(share, 95, axis=0)),
    }


def band(statistic: Callable[[np.ndarray], Sequence[float]], rows: int) -> tuple[float, ...]:
    """Half the width of a 95% interval of each figure `statistic` gives for row indices: normal, by bootstrap over rows."""
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():  # for lengths that no story in a resample reaches
        warnings.simplefilter("ignore", RuntimeWarning)
        draws = np.array([statistic(rng.integers(rows, size=rows)) for _ in range(RESAMPLES)])
        return tuple(np.nan_to_num(1.96 * np.nanstd(draws, axis=0)).tolist())


def correlation_curves(
    rows: list[dict[str, str]],
    coded: dict[str, list[Embedded]],
    panel: list[dict[str, str]],
    encoder: Encoder,
    probe: Probe,
    tables: dict[bool, np.ndarray],
    rng: random.Random,
) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Chance level b(n) and human level h(n) of each pair's recall by candidate length n in words.

    b: the reference of one row against texts of other rows, cut or joined to n words. h = b + g, where g is the human gain
    of true pairs over the panel's chance level, fitted as a line in ln n and constant outside the 5th to 95th percentile of
    human lengths: what a length that no human wrote should earn is unknown, so it earns as much as the nearest human one.
    coded: {field: texts of `rows`}. tables: {capped: (vocab,)}. The outline's recall is by the `probe`-discounted story.
    """
    others_text = {field: encoder.embed([row[field] for row in panel]) for field in ("prompt", "think")}
    chance, human = {}, {}
    for pair in PAIRS:
        reference, candidate = pair.split("_")
        x, y = coded[reference], coded[candidate]
        if pair == "think_story":
            y = [probe.discounted(text, encoder) for text in y]
        lengths = [len(ts.words(row[candidate])) for row in rows]
        tokens_per_word = sum(len(e.ids) for e in y) / max(1, sum(lengths))
        grid = np.unique(np.geomspace(5, 4 * max(lengths), 16).round().astype(int))
        mixed: dict[tuple[str, bool], list[list[float]]] = {}
        gains: dict[tuple[str, bool], list[float]] = {}
        others_panel = Panel.of(others_text[reference], lambda ids: token_weightings(ids, tables))
        for i, row in enumerate(x):
            cuts = running_match(row, others(y, i, grid[-1] * tokens_per_word, rng), grid * tokens_per_word)
            best, by_panel = best_match(row, y[i]), others_panel.chance(best_match(others_panel.tokens, y[i]))
            for kind, weights in token_weightings(row.ids, tables).items():
                mixed.setdefault(kind, []).append([weighted(cut, weights) for cut in cuts])
                own, by_chance = weighted(best, weights), by_panel[kind]
                if rows[i] in panel:  # in a small set the panel holds the row itself, whose recall is not chance
                    by_chance = (len(panel) * by_chance - own) / max(1, len(panel) - 1)
                gains.setdefault(kind, []).append(own - by_chance)
        for kind, levels in mixed.items():
            key = recall_key(pair, *kind)
            chance[key], human[key] = level_curves(grid, np.array(levels), np.array(lengths), np.array(gains[kind]))
    return chance, human


def others(embedded: list[Embedded], i: int, tokens: float, rng: random.Random) -> list[Embedded]:
    """Texts of rows other than i in random order, until they hold `tokens` tokens."""
    order = [j for j in range(len(embedded)) if j != i]
    rng.shuffle(order)
    taken, total = [], 0
    for j in order:
        taken.append(embedded[j])
        total += len(embedded[j].ids)
        if total >= tokens:
            break
    return taken


def running_match(x: Embedded, ys: list[Embedded], cuts: np.ndarray) -> list[np.ndarray]:
    """`best_match` of x against the first tokens of the joined texts `ys`, for each number of tokens in `cuts`."""
    import torch

    joined = torch.cat([y.vectors for y in ys])
    best = (x.vectors @ joined.T).cummax(dim=1).values.double().cpu().numpy()
    at = np.clip(cuts.round().astype(int), 1, best.shape[1]) - 1
    return list(best[:, at].T)


def level_curves(grid: np.ndarray, levels: np.ndarray, lengths: np.ndarray, gain: np.ndarray) -> tuple[Curve, Curve]:
    """Chance and human level, with bands, from levels (rows, grid), and lengths and gains (rows,) of the true pairs."""

    def fit(rows: np.ndarray) -> tuple[Curve, Curve]:
        chance = Curve(tuple(float(n) for n in grid), rising(np.mean(levels[rows], axis=0)))
        return chance, human_curve(chance, lengths[rows], gain[rows])

    chance, human = fit(np.arange(len(gain)))

    def figures(rows: np.ndarray) -> list[float]:
        drawn_chance, drawn_human = fit(rows)
        return [*drawn_chance.value, *map(drawn_human, human.words)]

    bands = band(figures, len(gain))
    return replace(chance, band=bands[: len(grid)]), replace(human, band=bands[len(grid) :])


def human_curve(chance: Curve, lengths: np.ndarray, gain: np.ndarray) -> Curve:
    low, high = np.percentile(lengths, (5, 95))
    if high > low:
        slope, level = np.polyfit(np.log(np.maximum(lengths, 1)), gain, 1)
    else:
        slope, level = 0.0, float(np.mean(gain))
    knots = sorted({*chance.words, float(max(low, 1)), float(max(high, 1))})
    fitted = [level + slope * np.log(np.clip(n, max(low, 1), max(high, 1))) for n in knots]
    # A gain of zero would lead to division by zero; an encoder that cannot tell pairs apart shows up as parts at random.
    return Curve(tuple(knots), rising([chance(n) + max(g, 0.01) for n, g in zip(knots, fitted, strict=True)]))
