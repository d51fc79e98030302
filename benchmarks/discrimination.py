"""Does the correlation part tell true pairs from false ones? Every layer, tf mode and score, by held-out human rows.

    python benchmarks/discrimination.py --data artifacts/data [--quick]

easy    share of mismatched pairs that score below the true one: the same candidate with another row's reference (`ref`),
        the same reference with another row's candidate (`cand`)
hard    share of rows whose true outline scores above the same outline with one sentence of another row's (`sentence`), two
        names or key nouns swapped with each other (`swapped`), two replaced by another row's (`replaced`)
length  Spearman's correlation of mismatched scores with the candidate's length in words: plain recall, recall over b(n) of
        human text of that length, and recall over the candidate's own chance level, which the reward uses
cost    seconds to encode all texts, relative to the last layer
"""

import json
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tyro
from scipy.stats import spearmanr

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
    """Held-out rows at most."""
    seed: int = 0
    quick: bool = False
    """48 rows, layers 3 and 6."""


def key_words(outline: str) -> list[str]:
    """Names, and words that carry content, each once, the rarer kind (capitalised within a sentence) first."""
    found = dict.fromkeys(re.findall(r"(?<![.!?] )(?<!^)\b[A-Z][a-z]+\b", outline))
    nouns = [w for w in re.findall(r"\b[a-z]{4,}\b", outline) if w not in STOP_WORDS]
    return [*found, *dict.fromkeys(nouns)]


def replace_words(text: str, mapping: dict[str, str]) -> str:
    return re.sub(r"\b(" + "|".join(map(re.escape, mapping)) + r")\b", lambda m: mapping[m[0]], text)


def altered(rows: list[dict], i: int, kind: str, rng: random.Random) -> str:
    """Row i's outline with a fault that a careful reader would see."""
    outline, other = rows[i]["think"], rows[(i + 1 + rng.randrange(len(rows) - 1)) % len(rows)]["think"]
    if kind == "sentence":
        mine, theirs = SENTENCE.findall(outline), SENTENCE.findall(other)
        mine[rng.randrange(len(mine))] = rng.choice(theirs)
        return "".join(mine)
    mine, theirs = key_words(outline), [w for w in key_words(other) if w not in outline]
    names = [w for w in mine if w[0].isupper()]
    a, b = names[:2] if len(names) > 1 else rng.sample([w for w in mine if w[0].islower()], 2)
    return replace_words(outline, {a: b, b: a} if kind == "swapped" else dict(zip((a, b), rng.sample(theirs, 2))))


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
    hard = {kind: [altered(rows, i, kind, rng) for i in range(len(rows))] for kind in ("sentence", "swapped", "replaced")}
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
            panels = {tf: Panel.of(encoder.embed([row[reference] for row in panel]), table, tf) for tf in TF}
            n = [len(words(row[candidate])) for row in rows]
            own = {tf: np.array([panels[tf].chance(y) for y in mine[candidate]]) for tf in TF}
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
                            faulty = encoder.embed(outlines)
                            lower = [
                                weighted(best_match(x, y), token_weights(x.ids, table, tf)) < scores[i, i]
                                for i, (x, y) in enumerate(zip(faulty, mine["story"]))
                            ]
                            row[name] = float(np.mean(lower))
                figures.append(row)
    show(figures, costs)
    print(json.dumps({"bench": "discrimination", "rows": len(rows), "seconds": costs, "figures": figures}))


def show(figures: list[dict], costs: dict[int, float]) -> None:
    keys = ("ref", "cand", "cand_over_chance", "length", "length_over_chance", "sentence", "swapped", "replaced")
    print("layer  cost  pair          tf         score  " + "  ".join(f"{key:>18}" for key in keys))
    for row in figures:
        cells = "  ".join(f"{row[key]:18.4f}" if key in row else " " * 18 for key in keys)
        cost = costs[row["layer"]] / costs[max(costs)]
        print(f"{row['layer']:5}  {cost:4.2f}  {row['pair']:12}  {row['tf']:9}  {row['score']:5}  {cells}")


if __name__ == "__main__":
    main(tyro.cli(Args))
