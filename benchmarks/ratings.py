"""Does the reward prefer what people prefer? Pairs of stories for one prompt, the first of which people preferred.

    python benchmarks/ratings.py --pairs pairs.jsonl --data artifacts/data

Rows of the file: {"prompt", "story_a", "story_b"}. The stories have no outline, so what needs one is left out: the
correlation is the prompt's recall by the story, and guards on the outline do not count. The length target is the human
median of the data. Agreement is the share of pairs in which the preferred story scores higher, a tie counting half, with 95%
bootstrap intervals over pairs. Stories are cleaned as in data preparation. `words` is the agreement of length alone, for
comparison.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root's reward.py, not benchmarks/reward.py
from rew_config import GUARDS, Correlation, RewardConfig
from reward import Reward, Sample
from storygen.cleaning import clean_prompt, clean_story

WITHOUT_OUTLINE = [
    name for name in GUARDS if not name.startswith("think") and name not in ("on_plan", "throughout", "answers_belong")
]
BATCH = 32


@dataclass
class Args:
    pairs: Path
    """JSON lines {"prompt", "story_a", "story_b"}, story_a preferred."""
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    seed: int = 0
    quick: bool = False
    """The first 40 pairs."""


def measures(reward: Reward, rows: list[dict], which: str, target: float) -> dict[str, np.ndarray]:
    """All parts and guards and the whole, each (pairs,), for one story of each pair."""
    found: dict[str, list[float]] = {}
    for start in tqdm(range(0, len(rows), BATCH), desc=which, unit="batch", disable=None):
        # The prompt's own words as the outline keep the row well-formed; nothing that looks at the outline is used.
        samples = [
            Sample(
                clean_prompt(r["prompt"]),
                clean_prompt(r["prompt"]),
                clean_story(r[which].replace("<\\newline>", "\n")),
                True,
            )
            for r in rows[start : start + BATCH]
        ]
        for raw in reward.measure(samples):
            score = reward.combine(raw, "ok", target)
            weights = {"correlation": score.parts["prompt_story"]} | {
                name: score.parts[name] for name in ("length", "repetition", "prose")
            }
            whole = sum(reward.weights[name] * value for name, value in weights.items())
            guards = {name: score.guards[name] for name in WITHOUT_OUTLINE}
            row = {"whole": whole * np.prod(list(guards.values())), **weights, "words": raw["story_words"], **guards}
            for name, value in row.items():
                found.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in found.items()}


def main(args: Args) -> None:
    rows = [json.loads(line) for line in args.pairs.read_text("utf-8").splitlines() if line.strip()]
    rows = rows[:40] if args.quick else rows
    reward = Reward.load(args.data, RewardConfig(correlation=Correlation(think_story=0, prompt_think=0)))
    target = reward.calibration.quantile("story_words", 50)
    a, b = (measures(reward, rows, which, target) for which in ("story_a", "story_b"))
    picks = np.random.default_rng(args.seed).integers(len(rows), size=(10_000, len(rows)))
    figures = {}
    print(f"{len(rows)} pairs\n{'':16} {'agreement':>9}  95% interval      differs")
    for name in a:
        wins = np.where(np.isclose(a[name], b[name]), 0.5, a[name] > b[name])
        low, high = np.percentile(wins[picks].mean(1), (2.5, 97.5))
        figures[name] = {"agreement": float(wins.mean()), "ci95": [float(low), float(high)],
                         "differs": float((wins != 0.5).mean())}  # fmt: skip
        print(f"{name:16} {wins.mean():9.3f}  {low:.3f} to {high:.3f}  {figures[name]['differs']:8.1%}")
    print(json.dumps({"bench": "ratings", "pairs": len(rows), "figures": figures}))


if __name__ == "__main__":
    main(tyro.cli(Args))
