"""How fast is the reward, and how fast is its BERTScore compared with the bert-score package?

    python benchmarks/reward.py --data artifacts/data [--quick]

Both sides score the same pairs in this process, in turn, with the packaged MiniLM in fp32 and the same threads; the library
at its best batch size. Texts are made from the embedded corpus: outlines of 100 words, stories of 400, prompts as they are.

ratio_unique         outlines by stories, every text new, last layer on both sides
ratio_shared         the reward's three pairs for K samples per prompt, which share prompt and outline, scored and then
                     rescored under another tf: ours measures every tf in one pass, the library is called again; last layer
ratio_shared_once    the same without the rescoring
ratio_default_layer  as ratio_unique, with ours at its default layer
ratio_rescore        the samples of ratio_shared under other weights: ours from the logged measurements, the library from
                     scratch
samples_per_s        the whole reward, including measures and guards, on samples with the corpus's own lengths
peak_gb              peak memory of this process, both sides included
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import pyarrow.parquet as pq
import torch
import tyro

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root's reward.py, not this one
from rew_config import Length
from reward import Reward, Sample
from storygen.bertscore import MINILM_LAYER, Encoder, Tf, load_encoder, minilm_folder, precision_recall_f1
from storygen.memory import peak_memory

LAST_LAYER = 6
BATCH_SIZES = (8, 16, 32, 64)


@dataclass
class Args:
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    pairs: int = 64
    """Pairs scored in every round."""
    k: int = 8
    """Samples per prompt, where texts are shared."""
    rounds: int = 5
    """Rounds; every contender runs once in each, and the median counts."""
    quick: bool = False
    """16 pairs, one round."""


def of_words(texts: list[str], n: int, count: int) -> list[str]:
    """`count` texts of n words each, taken one after another from the given ones."""
    stream = cycle(word for text in texts for word in text.split())
    return [" ".join(islice(stream, n)) for _ in range(count)]


def ours(encoder: Encoder, references: list[str], candidates: list[str]) -> list[tuple[float, float, float]]:
    coded, weights = encoder.embed(references + candidates), encoder.flat_weights()
    n = len(references)
    return [precision_recall_f1(x, y, weights, "raw") for x, y in zip(coded[:n], coded[n:], strict=True)]


def seconds(call: Callable[[], object]) -> float:
    clock = time.perf_counter()
    call()
    return time.perf_counter() - clock


def main(args: Args) -> None:
    from bert_score import BERTScorer

    count, rounds = (16, 1) if args.quick else (args.pairs, args.rounds)
    rows = pq.read_table(args.data / "sft.parquet").to_pylist()
    outlines, stories = (of_words([row[key] for row in rows], n, count) for key, n in (("think", 100), ("story", 400)))
    encoder, cheap = load_encoder(layer=LAST_LAYER), load_encoder(layer=MINILM_LAYER)
    scorer = BERTScorer(model_type=str(minilm_folder()), num_layers=LAST_LAYER, device="cpu")
    few = count // 4
    warm = lambda size: scorer.score(stories[:few], outlines[:few], batch_size=size)
    warm(8)
    batch = min(BATCH_SIZES, key=lambda size: seconds(lambda: warm(size)))
    theirs = lambda x, y: scorer.score(y, x, batch_size=batch)

    reward = Reward.load(args.data)
    prompts = [row["prompt"] for row in rows][: count // args.k]
    shared = [Sample(prompts[i // args.k], outlines[i // args.k], story, True) for i, story in enumerate(stories)]
    columns = {key: [getattr(sample, key) for sample in shared] for key in ("prompt", "think", "story")}

    def library_shared() -> None:
        for reference, candidate in (("think", "story"), ("prompt", "think"), ("prompt", "story")):
            theirs(columns[reference], columns[candidate])

    def ours_shared(*tfs: Tf) -> None:
        coded = encoder.embed([text for sample in shared for text in (sample.prompt, sample.think, sample.story)])
        weights = encoder.flat_weights()
        for i in range(0, len(coded), 3):
            prompt, think, story = coded[i : i + 3]
            for x, y in ((think, story), (prompt, think), (prompt, story)):
                for tf in tfs:
                    precision_recall_f1(x, y, weights, tf)

    logged = reward.measure(shared[: args.k]) * (count // args.k)
    other = Reward(replace(reward.config, length=Length(weight=0.5)), reward.calibration)
    contenders = {
        "library, new texts": lambda: theirs(outlines, stories),
        "ours, new texts": lambda: ours(encoder, outlines, stories),
        f"ours, new texts, layer {MINILM_LAYER}": lambda: ours(cheap, outlines, stories),
        "library, shared texts": library_shared,
        "ours, shared texts": lambda: ours_shared("raw"),
        "ours, shared texts, two tfs": lambda: ours_shared("raw", "sublinear"),
        "ours, rescored": lambda: [other.combine(raw, "ok", 400.0) for raw in logged],
    }
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            took[name].append(seconds(call))
    middle = {name: statistics.median(times) for name, times in took.items()}
    print(f"{count} pairs, {torch.get_num_threads()} threads, library at batch size {batch}, median of {rounds}")
    for name, value in middle.items():
        print(f"{name:28} {value:8.3f} s  {count / value:9.1f} pairs/s")

    samples = [Sample(r["prompt"], r["think"], r["story"], True) for r in rows if r["split"] != "train"][:count]
    reward(samples[:4], 200.0)
    rate = count / statistics.median(seconds(lambda: reward(samples, 200.0)) for _ in range(rounds))
    print(f"{'the whole reward':28} {count / rate:8.3f} s  {rate:9.1f} samples/s (corpus lengths, layer {MINILM_LAYER})")
    new = middle["library, new texts"]
    print(json.dumps({
        "bench": "reward",
        "ratio_unique": new / middle["ours, new texts"],
        "ratio_shared": 2 * middle["library, shared texts"] / middle["ours, shared texts, two tfs"],
        "ratio_shared_once": middle["library, shared texts"] / middle["ours, shared texts"],
        "ratio_default_layer": new / middle[f"ours, new texts, layer {MINILM_LAYER}"],
        "ratio_rescore": middle["library, shared texts"] / middle["ours, rescored"],
        "samples_per_s": rate,
        "library_batch_size": batch,
        "peak_gb": peak_memory(),
    }))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
