"""Can edits that no reader would call an improvement raise the reward? Hill climbing, to see what it finds.

    python benchmarks/attack.py --data artifacts/data [--samples artifacts/rl/samples.jsonl] [--quick]

Every row is edited for `--steps` steps: a sentence is deleted, doubled, swapped with another or taken from another row,
words of the outline are inserted, or the prompt is spliced in. An edit is kept if the reward rises; what remains is what a
policy could learn. The length target is the row's initial length, so growing longer earns nothing.
"""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tyro
from tqdm import tqdm

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root's reward.py, not benchmarks/reward.py
from reward import Reward, Sample
from storygen.textstats import STOP_WORDS, words

SENTENCE = re.compile(r"[^.!?]+[.!?]*[\"')]*\s*")


@dataclass
class Args:
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py: the human rows of its validation and test splits."""
    samples: Path | None = None
    """samples.jsonl of a run: its held-out samples are attacked too."""
    rows: int = 16
    """Rows of each kind."""
    steps: int = 500
    """Edits tried on each row."""
    seed: int = 0
    show: int = 2
    """Rows of each kind to show: those that gained most."""
    quick: bool = False
    """4 rows, 40 steps."""


def edit(story: str, row: Sample, other: str, rng: random.Random) -> tuple[str, str]:
    """One random edit: its kind, and the edited story."""
    sentences = SENTENCE.findall(story) or [story]
    at, kind = rng.randrange(len(sentences)), rng.choice(("delete", "double", "swap", "other", "outline", "prompt"))
    if kind == "delete" and len(sentences) > 1:
        del sentences[at]
    elif kind == "double":
        sentences.insert(at, sentences[at].rstrip() + " ")
    elif kind == "swap":
        to = rng.randrange(len(sentences))
        sentences[at], sentences[to] = sentences[to], sentences[at]
    elif kind == "other":
        sentences.insert(at, rng.choice(SENTENCE.findall(other)).strip() + " ")
    elif kind == "prompt":
        sentences.insert(at, row.prompt.strip() + " ")
    elif kind == "outline":
        content = [w for w in words(row.think) if w not in STOP_WORDS]
        parts = sentences[at].split(" ")
        spot = rng.randrange(len(parts))
        sentences[at] = " ".join(parts[:spot] + rng.choices(content, k=rng.randint(1, 4)) + parts[spot:])
    return kind, "".join(sentences)


def attack(reward: Reward, rows: list[Sample], steps: int, rng: random.Random, name: str) -> dict:
    """Climb on all rows at once, so that each step is one encoder batch."""
    targets = [float(len(words(row.story))) for row in rows]

    def score(samples: list[Sample]) -> np.ndarray:
        raws = reward.measure(samples)
        return np.array([reward.combine(raw, "ok", target).reward for raw, target in zip(raws, targets, strict=True)])

    best, now = list(rows), score(rows)
    start, kept = now.copy(), Counter()
    for _ in tqdm(range(steps), desc=f"attacking {name}", unit="step", disable=None):
        tried = [edit(one.story, one, rng.choice(rows).story, rng) for one in best]
        candidates = [replace(one, story=story) for one, (_, story) in zip(best, tried, strict=True)]
        after = score(candidates)
        for i in np.flatnonzero(after > now + 1e-9):
            best[i], now[i] = candidates[i], after[i]
            kept[tried[i][0]] += 1
    return {"rows": rows, "best": best, "start": start, "end": now, "kept": kept}


def main(args: Args) -> None:
    count, steps = (4, 40) if args.quick else (args.rows, args.steps)
    rng = random.Random(args.seed)
    reward = Reward.load(args.data)
    held = [row for row in pq.read_table(args.data / "sft.parquet").to_pylist() if row["split"] != "train"]
    kinds = {"human": [Sample(r["prompt"], r["think"], r["story"], True) for r in rng.sample(held, count)]}
    if args.samples:
        logged = [json.loads(line) for line in args.samples.read_text("utf-8").splitlines()]
        formed = [r for r in logged if r["verdict"] == "ok" and r["split"] == "validation" and r["reward"] > 0]
        kinds["model"] = [Sample(r["prompt"], r["think"], r["story"], True) for r in rng.sample(formed, count)]
    figures = {}
    for name, rows in kinds.items():
        found = attack(reward, rows, steps, rng, name)
        gain = found["end"] - found["start"]
        for i in np.argsort(-gain)[: args.show]:
            print(f"\n{name}: {found['start'][i]:.3f} -> {found['end'][i]:.3f}\n  prompt   {rows[i].prompt}")
            print(f"  outline  {rows[i].think}\n  before   {rows[i].story}\n  after    {found['best'][i].story}")
        print(f"\n{name}: {len(rows)} rows, {steps} steps: reward {found['start'].mean():.3f} -> {found['end'].mean():.3f}, "
              f"largest gain {gain.max():.3f}; edits kept: {dict(found['kept'].most_common())}")  # fmt: skip
        figures[name] = {"start": float(found["start"].mean()), "end": float(found["end"].mean()),
                         "gain_max": float(gain.max()), "kept": dict(found["kept"])}  # fmt: skip
    print(json.dumps({"bench": "attack", "steps": steps, "rows": count, **figures}))


if __name__ == "__main__":
    main(tyro.cli(Args))
