"""Does the correlation part tell true pairs from false ones? Every layer, tf mode and score, on held-out human rows.

    python benchmarks/discrimination.py --data artifacts/data [--quick]

easy    share of mismatched pairs that score below the true one: the same candidate with another row's reference (`ref`),
        the same reference with another row's candidate (`cand`)
hard    share of rows whose true outline scores above the same outline with one sentence replaced by another row's
        (`sentence`), its first two names (`names`) or two heaviest nouns (`nouns`) swapped with each other, or those nouns
        replaced by another row's (`replaced`); rows without two of a kind are left out. Last, the same by the clipped part
        and by the whole reward, at the default layer
length  Spearman's correlation of mismatched scores with the candidate's length in words: plain recall, recall over b(n) of
        human text of that length, and recall over the candidate's own chance level, which the reward uses
cost    seconds to encode all texts, relative to the last layer
"""

import json
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tyro
from scipy.stats import spearmanr

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root's reward.py, not benchmarks/reward.py
from reward import Reward, Sample, Score
from storygen.bertscore import Embedded, Panel, best_match, load_encoder, token_weights, weighted
from storygen.calibration import CAP, PAIRS, PANEL, TF
from storygen.idf import Idf
from storygen.textstats import STOP_WORDS, words

SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"')]*\s*")


@dataclass
class Args:
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    layers: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """Layers of the packaged MiniLM."""
    rows: int = 160
    """Held-out rows, at most."""
    seed: int = 0
    quick: bool = False
    """48 rows, layers 3 and 6."""


NOUN = re.compile(r"\b(?:the|a|an|his|her|their|its|my|your|our)\s+(?:[a-z]+\s+)??([a-z]{3,})\b")
HARD = ("sentence", "names", "nouns", "replaced")


def names_of(outline: str) -> list[str]:
    """Capitalised words within a sentence, each once."""
    return list(dict.fromkeys(re.findall(r"(?<![.!?] )(?<!^)\b[A-Z][a-z]+\b", outline)))


def nouns_of(outline: str, weight: Callable[[str], float]) -> list[str]:
    """Words after an article or possessive, perhaps with an adjective in between, heaviest first."""
    found = dict.fromkeys(word for word in NOUN.findall(outline) if word not in STOP_WORDS)
    return sorted(found, key=weight, reverse=True)


def replace_words(text: str, mapping: dict[str, str]) -> str:
    return re.sub(r"\b(" + "|".join(map(re.escape, mapping)) + r")\b", lambda m: mapping[m[0]], text)


def altered(rows: list[dict], i: int, kind: str, weight: Callable[[str], float], rng: random.Random) -> str | None:
    """Row i's outline with a fault that a careful reader would see; None if it lacks two words of the kind."""
    outline, other = rows[i]["think"], rows[(i + 1 + rng.randrange(len(rows) - 1)) % len(rows)]["think"]
    if kind == "sentence":
        mine, theirs = SENTENCE.findall(outline), SENTENCE.findall(other)
        mine[rng.randrange(len(mine))] = rng.choice(theirs)
        return "".join(mine)
    mine = names_of(outline) if kind == "names" else nouns_of(outline, weight)
    theirs = [w for w in nouns_of(other, weight) if w not in outline] if kind == "replaced" else mine[1::-1]
    return replace_words(outline, dict(zip(mine[:2], theirs[:2]))) if min(len(mine), len(theirs)) > 1 else None


def by_reward(data: Path, rows: list[dict], hard: dict[str, list[str | None]]) -> dict[str, dict[str, float]]:
    """{"correlation"|"reward": {kind: share of rows whose true outline is ahead}}, with each row's own length as the target.

    The part is full at the human mean, so two outlines may tie there.
    """
    reward = Reward.load(data)

    def scores(outlines: list[str]) -> list[Score]:
        samples = [Sample(row["prompt"], think, row["story"], True) for row, think in zip(rows, outlines)]
        return [reward.combine(raw, "ok", raw["story_words"]) for raw in reward.measure(samples)]

    true = scores([row["think"] for row in rows])
    found = {"correlation": {}, "reward": {}}
    for kind, outlines in hard.items():
        faulty = scores([outline or row["think"] for outline, row in zip(outlines, rows)])
        pairs = [(a, b) for a, b, outline in zip(true, faulty, outlines) if outline]
        found["correlation"][kind] = float(np.mean([b.parts["correlation"] < a.parts["correlation"] for a, b in pairs]))
        found["reward"][kind] = float(np.mean([b.reward < a.reward for a, b in pairs]))
    return found


def scores_of(x: list[Embedded], y: list[Embedded], table: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """{(tf, "R"|"P"|"F"): (references, candidates)} over all pairs of two lists of texts."""
    found = {(tf, kind): np.zeros((len(x), len(y))) for tf in TF for kind in "RPF"}
    w_x, w_y = ({tf: [token_weights(e.ids, table, tf) for e in texts] for tf in TF} for texts in (x, y))
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            near = a.vectors @ b.vectors.T
            to_a, to_b = near.amax(1).double().numpy(), near.amax(0).double().numpy()
            for tf in TF:
                r, p = weighted(to_a, w_x[tf][i]), weighted(to_b, w_y[tf][j])
                found[tf, "R"][i, j], found[tf, "P"][i, j] = r, p
                found[tf, "F"][i, j] = 2 * p * r / (p + r) if p + r > 0 else 0.0
    return found


def easy(scores: np.ndarray) -> tuple[float, float]:
    """Shares (ref, cand) of false pairs below the true one."""
    true, n = np.diag(scores), len(scores)
    below_ref = (scores < true[None, :]).sum() / (n * (n - 1))
    below_cand = (scores < true[:, None]).sum() / (n * (n - 1))
    return float(below_ref), float(below_cand)


def main(args: Args) -> None:
    rng = random.Random(args.seed)
    sft = pq.read_table(args.data / "sft.parquet").to_pylist()
    train = [row for row in sft if row["split"] == "train"]
    rows = [row for row in sft if row["split"] != "train"][: 48 if args.quick else args.rows]
    panel = rng.sample(train, PANEL)
    encoder = load_encoder()
    table = Idf.load(args.data / "idf.npz", encoder.tokenizer).weights

    def weight(word: str) -> float:
        return max(table[encoder.backend.encode(word, add_special_tokens=False).ids])

    hard = {kind: [altered(rows, i, kind, weight, rng) for i in range(len(rows))] for kind in HARD}
    texts = [row[field] for row in rows for field in ("prompt", "think", "story")]
    figures, costs = [], {}
    for layer in (3, 6) if args.quick else args.layers:
        encoder = load_encoder("minilm", layer)
        idf = Idf.load(args.data / "idf.npz", encoder.tokenizer)
        table = idf.capped(CAP)
        encoder.embed(texts[:30])
        clock = time.perf_counter()
        coded = encoder.embed(texts)
        costs[layer] = time.perf_counter() - clock
        mine = dict(zip(("prompt", "think", "story"), (coded[k::3] for k in range(3))))
        for pair in PAIRS:
            reference, candidate = pair.split("_")
            others = Panel.of(
                encoder.embed([row[reference] for row in panel]),
                lambda ids, table=table: {tf: token_weights(ids, table, tf) for tf in TF},
            )
            n = [len(words(row[candidate])) for row in rows]
            chance = [others.chance(best_match(others.tokens, y)) for y in mine[candidate]]
            own = {tf: np.array([by[tf] for by in chance]) for tf in TF}
            off = ~np.eye(len(rows), dtype=bool)
            lengths = np.broadcast_to(n, off.shape)[off]
            for (tf, kind), scores in scores_of(mine[reference], mine[candidate], table).items():
                row = {"layer": layer, "pair": pair, "tf": tf, "score": kind}
                row["ref"], row["cand"] = easy(scores)
                row["length"] = float(spearmanr(scores[off], lengths).statistic)
                if kind == "R":
                    over = scores - own[tf]
                    row["cand_over_chance"] = easy(over)[1]
                    row["length_over_chance"] = float(spearmanr(over[off], lengths).statistic)
                    if pair == "think_story":
                        for name, outlines in hard.items():
                            faulty = encoder.embed([outline or "" for outline in outlines])
                            lower = [
                                weighted(best_match(x, y), token_weights(x.ids, table, tf)) < scores[i, i]
                                for i, (x, y) in enumerate(zip(faulty, mine["story"]))
                                if outlines[i]
                            ]
                            row[name] = float(np.mean(lower))
                figures.append(row)
    show(figures, costs)
    by = by_reward(args.data, rows, hard)
    counts = {kind: sum(map(bool, outlines)) for kind, outlines in hard.items()}
    for name, shares in by.items():
        print(f"{name}, true outline ahead:  " + "  ".join(f"{kind} {shares[kind]:.3f} of {counts[kind]}" for kind in HARD))
    print(json.dumps({"bench": "discrimination", "rows": len(rows), "seconds": costs, "hard_rows": counts, **by,
                      "figures": figures}))  # fmt: skip


def show(figures: list[dict], costs: dict[int, float]) -> None:
    keys = ("ref", "cand", "cand_over_chance", "length", "length_over_chance", *HARD)
    print("layer  cost  pair          tf         score  " + "  ".join(f"{key:>18}" for key in keys))
    for row in figures:
        cells = "  ".join(f"{row[key]:18.4f}" if key in row else " " * 18 for key in keys)
        cost = costs[row["layer"]] / costs[max(costs)]
        print(f"{row['layer']:5}  {cost:4.2f}  {row['pair']:12}  {row['tf']:9}  {row['score']:5}  {cells}")


if __name__ == "__main__":
    main(tyro.cli(Args))
