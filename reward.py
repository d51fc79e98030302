"""The reward of a sample, and its workbench.

    python reward.py score ROWS.jsonl --data DIR      rows {prompt, think, story, finished} -> the same with reward and parts
    python reward.py explain ROWS.jsonl --row 3       one row: each part, and which story word answered each outline word
    python reward.py rescore SAMPLES.jsonl --reward.… what a changed config would have preferred, without sampling again
    python reward.py audit                            does any cheap trick score higher than the honest row

`rew_config.py` documents every knob. `Reward.measure` needs the encoder; `Reward.combine` is arithmetic.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from rew_config import GUARDS, OWN_PARTS, PARTS, Floor, Guard, Power, RewardConfig
from storygen import textstats as ts
from storygen.bertscore import Embedded, Encoder, Panel, best_match, load_encoder, weighted
from storygen.calibration import (
    CAP,
    HOME_MEASURES,
    PAIRS,
    Calibration,
    chance_key,
    home_measures,
    recall_key,
    text_measures,
    token_weightings,
)
from storygen.cli import InputError, check_flags, pick_device, run, write_atomically
from storygen.corpus import load_sft, spread
from storygen.explain import write_page
from storygen.hacks import FAMILIES, hack
from storygen.idf import Idf
from storygen.pattern import text_verdict
from storygen.workbench import answered, answers, flipped, measures, misplaced, rank_correlation, read_rows

# Samples whose token vectors are held in memory at once: an RL batch, or 0.5 GB of vectors for a large file of long stories.
CHUNK = 256
DEFAULT = RewardConfig()


@dataclass(frozen=True)
class Sample:
    """A response to score. room: tokens left between its end and the context limit; None: unknown, no overlong penalty.
    verdict: the grammar's, if tokens were parsed; None: derived from the text, where a tag that is spelled out counts."""

    prompt: str
    think: str
    story: str
    finished: bool
    verdict: str | None = None
    room: int | None = None


@dataclass(frozen=True)
class Score:
    """reward: what is optimised. verdict: "ok" or why the grammar rejected it. parts, guards: in [0, 1], before weighting.
    raw: the measurements, enough for `Reward.combine` to rescore it under another config."""

    reward: float
    verdict: str
    parts: dict[str, float]
    guards: dict[str, float]
    raw: dict[str, float]


@dataclass
class Reward:
    """Made by `Reward.load`. `encoder` may be None if only `combine` is called."""

    config: RewardConfig
    calibration: Calibration
    idf: Idf | None = None
    encoder: Encoder | None = None

    def __post_init__(self):
        self.order = ts.WordOrder(self.calibration.pairs)
        self.weights = self.config.weights()
        if self.encoder is not None:
            self.panels = {
                field: Panel.of(self.encoder.embed(texts), self.weigh) for field, texts in self.calibration.panel.items()
            }

    @staticmethod
    def load(
        data_dir: Path | str, config: RewardConfig = DEFAULT, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Reward":
        """Load encoder, IDF table and calibration of a data folder. InputError if a file is missing or for another encoder.

        dtype: of the encoder's weights; bfloat16 changes a recall by at most 0.0004 and is faster where it is native.
        """
        data = Path(data_dir)
        try:
            named = json.loads((data / "manifest.json").read_text(encoding="utf-8"))["encoder"]
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{data / 'manifest.json'} is missing: run data_prep.py first") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{data / 'manifest.json'} names no encoder: run data_prep.py again") from None
        encoder = load_encoder(named["name"], named["layer"], device, dtype)
        calibration = Calibration.load(data / "calibration.json")
        mine = {"name": encoder.name, "layer": encoder.layer, "sha256": encoder.sha256}
        if calibration.encoder != mine:
            raise InputError(f"{data / 'calibration.json'} was measured with another encoder: run data_prep.py again")
        return Reward(config, calibration, Idf.load(data / "idf.npz", encoder.tokenizer), encoder)

    def __call__(self, samples: Sequence[Sample], length_target: float) -> list[Score]:
        """Score samples, their texts encoded in large batches. length_target: words at which the length part is 1."""
        verdicts = [verdict_of(sample) for sample in samples]
        raws = iter(self.measure([sample for sample, verdict in zip(samples, verdicts, strict=True) if verdict == "ok"]))
        return [self.combine(next(raws) if verdict == "ok" else {}, verdict, length_target) for verdict in verdicts]

    def measure(self, samples: Sequence[Sample]) -> list[dict[str, float]]:
        """What can be measured of each sample: recalls of the three pairs, text measures, own parts. Needs the encoder."""
        return [raw for i in range(0, len(samples), CHUNK) for raw in self._measure(samples[i : i + CHUNK])]

    def _measure(self, samples: Sequence[Sample]) -> list[dict[str, float]]:
        coded = self.encoder.embed([text for sample in samples for text in (sample.prompt, sample.think, sample.story)])
        raws = []
        for i, sample in enumerate(samples):
            text = dict(zip(("prompt", "think", "story"), coded[3 * i : 3 * i + 3], strict=True))
            raw = self.measure_text(sample)
            raw |= home_measures(self.calibration.probe, self.encoder, self.capped, text["think"], text["story"])
            for pair in PAIRS:
                reference, candidate = pair.split("_")
                answer = text[candidate]
                if pair == "think_story":  # words that were thrown in do not carry out a plan
                    answer = self.calibration.probe.discounted(answer, self.encoder)
                raw |= self.recalls(pair, text[reference], answer, self.panels[reference])
            raws.append(raw)
        return raws

    def recalls(self, pair: str, reference: Embedded, candidate: Embedded, panel: Panel) -> dict[str, float]:
        """Recall by a candidate of the sample's reference text, and of other rows' texts of that kind, under every tf.

        Every tf, as matching is the costly part: a logged sample can then be rescored under another tf without the encoder.
        For the outline, also the average recall by the story's two weaker thirds.
        """
        runs = 3 if pair == "think_story" else 1
        own = best_match(reference, candidate, runs).reshape(runs, -1)
        others = best_match(panel.tokens, candidate, runs).reshape(runs, -1)
        chance, by_run = panel.chance(others.max(axis=0)), [panel.chance(best) for best in others]
        raw = {}
        for kind, weights in self.weigh(reference.ids).items():
            key = recall_key(pair, *kind)
            raw[key], raw[chance_key(key)] = weighted(own.max(axis=0), weights), chance[kind]
            if runs == 3:
                thirds = [(weighted(best, weights), run[kind]) for best, run in zip(own, by_run, strict=True)]
                weaker = sorted(thirds, key=lambda both: both[0] - both[1])[:2]
                key = recall_key("think_third", *kind)
                raw[key], raw[chance_key(key)] = (sum(values) / 2 for values in zip(*weaker, strict=True))
        return raw

    def weigh(self, ids: np.ndarray) -> dict[tuple[str, bool], np.ndarray]:
        """Token weights (n,) of a text under every tf."""
        return token_weightings(ids, {self.config.correlation.idf_cap: self.token_table})

    @cached_property
    def capped(self) -> np.ndarray:
        return self.idf.capped(CAP)

    @cached_property
    def token_table(self) -> np.ndarray:
        return self.capped if self.config.correlation.idf_cap else self.idf.weights

    def recall_keys(self) -> list[str]:
        """Names in `raw` of the pairs' recalls under this config, then of the outline's by the story's two weaker thirds."""
        config = self.config.correlation
        return [recall_key(pair, config.tf, config.idf_cap) for pair in (*PAIRS, "think_third")]

    def measure_text(self, sample: Sample) -> dict[str, float]:
        """The measures that need no encoder."""
        story = ts.words(sample.story)
        raw = text_measures(sample.prompt, sample.think, sample.story)
        raw |= {f"repeated_{n}": ts.repeated_share(story, n) for n in (2, 4)}
        raw["ended"] = float(ts.is_ended(sample.story))
        raw |= {"order": self.order.score(sample.story), "think_order": self.order.score(sample.think)}
        if sample.room is not None:
            raw["room"] = float(sample.room)
        for part in OWN_PARTS:
            score, diagnostics = part.score(sample)
            raw |= {f"own:{part.name}": float(score)} | {f"own:{part.name}:{k}": float(v) for k, v in diagnostics.items()}
        return raw

    def combine(self, raw: dict[str, float], verdict: str, length_target: float) -> Score:
        """The reward from what was measured. Pure: needs neither encoder nor text."""
        config = self.config
        if verdict != "ok":
            zero = dict.fromkeys([*self.weights, *PAIRS], 0.0)
            return Score(config.malformed_score, verdict, zero, dict.fromkeys(GUARDS, 0.0), raw)
        parts = self.parts(raw, length_target)
        guards = self.guards(raw, parts)
        kept = np.prod([guards[name] for name in GUARDS if getattr(config.guards, name).on])
        overlong = config.overlong.penalty * clip(1 - raw.get("room", np.inf) / config.overlong.window)
        reward = kept * sum(weight * parts[name] for name, weight in self.weights.items()) - overlong
        return Score(float(reward), verdict, parts, guards, raw)

    def gain(self, raw: dict[str, float], key: str, scale: str, n: float) -> float:
        """How far a recall is above the same text's chance level, in human gains (of `scale`, at n words); in [0, 1]."""
        human = self.calibration.human[scale](n) - self.calibration.chance[scale](n)
        return clip((raw[key] - raw[chance_key(key)]) / (self.config.correlation.full_at * human))

    def parts(self, raw: dict[str, float], length_target: float) -> dict[str, float]:
        """Every part in [0, 1]: those with a weight, and the three pairs that make up the correlation."""
        config, human = self.config, self.calibration
        parts = {}
        for key, pair in zip(self.recall_keys(), PAIRS, strict=False):
            n = raw[f"{pair.split('_')[1]}_words"]
            parts[pair] = self.gain(raw, key, key, n)
        shares = {pair: getattr(config.correlation, pair) for pair in PAIRS}
        parts["correlation"] = sum(shares[pair] * parts[pair] for pair in PAIRS) / sum(shares.values())
        parts["length"] = min(1.0, raw["story_words"] / length_target)
        for name, n in (("repetition", "2"), ("repetition4", "4")):
            excess = raw[f"repeated_{n}"] - human.repetition[n]["p95"](raw["story_words"])
            parts[name] = clip(1 - excess / getattr(config, name).slack)
        full = min(human.quantile("dialogue", config.prose.level), config.prose.zero_at - 1e-6)
        parts["prose"] = clip((config.prose.zero_at - raw["dialogue"]) / (config.prose.zero_at - full))
        return parts | {part.name: clip(raw[f"own:{part.name}"]) for part in OWN_PARTS}

    def guards(self, raw: dict[str, float], parts: dict[str, float]) -> dict[str, float]:
        """Every guard's factor, switched on or not."""
        human, guards = self.calibration, self.config.guards

        plan, *_, third = self.recall_keys()

        def below(measure: str, guard: Guard) -> float:
            return clip(1 - (raw[measure] - human.quantile(measure, guard.level)) / guard.slack)

        def above(measure: str, guard: Guard) -> float:
            return clip(1 - (human.quantile(measure, 100 - guard.level) - raw[measure]) / guard.slack)

        def ratio(measure: str, guard: Guard) -> float:
            low, high = max(1.0, human.quantile(measure, 100 - guard.level)), human.quantile(measure, guard.level)
            return clip(1 - max(1 - raw[measure] / low, raw[measure] / high - 1) / guard.slack)

        def power(measure: str, guard: Power) -> float:
            return clip(raw[measure] / human.quantile(measure, guard.level)) ** guard.power

        def floor(part: float, guard: Floor) -> float:
            return guard.keep + (1 - guard.keep) * clip(part / guard.at)

        return {
            "copied": below("copied", guards.copied),
            "copied_short": below("copied_short", guards.copied_short),
            "think_copied": below("think_copied", guards.think_copied),
            "types": above("mattr", guards.types),
            "stop_words": below("stop_share", guards.stop_words) * above("stop_share", guards.stop_words),
            "think_stop_words": below("think_stop_share", guards.think_stop_words)
            * above("think_stop_share", guards.think_stop_words),
            "prompt_words": below("prompt_share", guards.prompt_words),
            "think_words": below("think_share", guards.think_words),
            "listing": below("densest", guards.listing),
            "dialogue": below("dialogue", guards.dialogue),
            "order": above("order", guards.order),
            "think_order": above("think_order", guards.think_order),
            "belongs": power("belongs", guards.belongs),
            "think_belongs": power("think_belongs", guards.think_belongs),
            "answers_belong": power("answers_belong", guards.answers_belong),
            "loops": clip(1 - (raw["repeated_4"] - human.repetition["4"]["p95"](raw["story_words"])) / guards.loops.slack),
            "think_length": ratio("think_words", guards.think_length),
            "ending": floor(raw["ended"], guards.ending),
            "on_plan": floor(parts["think_story"], guards.on_plan),
            "throughout": floor(self.gain(raw, third, plan, raw["story_words"] / 3), guards.throughout),
            "on_prompt": floor((parts["prompt_think"] + parts["prompt_story"]) / 2, guards.on_prompt),
        }


def clip(value: float) -> float:
    return float(min(1.0, max(0.0, value)))


def verdict_of(sample: Sample) -> str:
    return sample.verdict or text_verdict(sample.think, sample.story, sample.finished)


@dataclass
class Workbench:
    data: Path = Path("artifacts/data")
    """Data folder written by data_prep.py."""
    length_target: float | None = None
    """Words at which the length part is 1. Default: what a row was logged with (explain, rescore), else the human median."""
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class ScoreRows(Workbench):
    """Score the rows of a jsonl file: {prompt, think, story, finished}; other keys are kept."""

    rows: tyro.conf.Positional[Path] = tyro.MISSING
    """JSON lines."""
    out: Path | None = None
    """Where to write; default: standard output."""
    device: str = "cpu"
    """Where the encoder runs."""


@dataclass
class Explain(Workbench):
    """One row: each part with its human range, each outline word with the story word that answered it."""

    rows: tyro.conf.Positional[Path] = tyro.MISSING
    """JSON lines {prompt, think, story, finished}, such as samples.jsonl."""
    row: int = 1
    """Which row, counted from 1."""
    html: Path | None = None
    """Also write it as an HTML page: hover over an outline word to see its answer in the story."""


@dataclass
class Rescore(Workbench):
    """Rescore logged samples under a changed config: rank correlation with the logged reward, and the pairs that flip."""

    samples: tyro.conf.Positional[Path] = tyro.MISSING
    """samples.jsonl of a run: rows {prompt, think, story, finished, reward, raw}."""
    show: int = 5
    """How many flipped pairs to show."""


@dataclass
class Audit(Workbench):
    """Compare held-out human rows with every family of the hack zoo (storygen/hacks.py)."""

    samples: Path | None = None
    """samples.jsonl of a run: also compare the best well-formed sample of each prompt with every family, since PPO would
    have to prefer the hack to it."""
    json: bool = False
    """Print the JSON line only."""
    rows: int = 100
    """Maximum number of held-out rows, and of samples."""
    seed: int = 0
    """Seed for drawing the hacks and the samples."""


def target_of(args: Workbench, reward: Reward, row: dict[str, Any] | None = None) -> float:
    """The requested length target, else the one the row was logged with, else the human median; in words."""
    if args.length_target is not None:
        return args.length_target
    return (row or {}).get("length_target") or reward.calibration.quantile("story_words", 50)


def sample_of(row: dict[str, Any]) -> Sample:
    """A row's texts may have been edited since it was scored: of its verdict, only what no text can show still counts."""
    sample = Sample(**{key: row.get(key) for key in ("prompt", "think", "story", "finished", "verdict", "room")})
    lasting = sample.verdict in ("stray_token", "text_after_eos") or (
        sample.verdict == "no_story" and not sample.story.strip()
    )
    return sample if lasting else replace(sample, verdict=None)


def score_rows(args: ScoreRows) -> None:
    if args.out and args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder: name a file")
    rows = read_rows(args.rows)
    reward = Reward.load(args.data, args.reward, pick_device(args.device))
    scores = reward([sample_of(row) for row in rows], target_of(args, reward))
    lines = [json.dumps(row | asdict(score), ensure_ascii=False) for row, score in zip(rows, scores, strict=True)]
    text = "\n".join(lines) + "\n"
    write_atomically(args.out, text) if args.out else print(text, end="")


def explain(args: Explain) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = read_rows(args.rows)
    if not 1 <= args.row <= len(rows):
        raise InputError(f"{args.rows} holds rows 1 to {len(rows)}, not {args.row}")
    reward, sample, console = Reward.load(args.data, args.reward), sample_of(rows[args.row - 1]), Console()
    score = reward([sample], target_of(args, reward, rows[args.row - 1]))[0]
    off = {name for name in GUARDS if not getattr(args.reward.guards, name).on}
    probe, tf = reward.calibration.probe, args.reward.correlation.tf
    found = list(answered(reward.encoder, probe, sample.think, sample.story, reward.token_table, tf))
    console.print(f"reward {score.reward:.3f}   verdict {score.verdict}", style="bold")
    console.print(sample.prompt, style="italic", markup=False)
    if score.verdict == "ok":
        table = Table("part or guard", "score", "weight", title="* switched off")
        for name, value in score.parts.items():
            table.add_row(name, f"{value:.3f}", f"{reward.weights[name]:.2f}" if name in reward.weights else "")
        table.add_section()
        for name, value in score.guards.items():
            table.add_row(name + (" *" if name in off else ""), f"{value:.3f}", "")
        mine = {name for key in reward.recall_keys() for name in (key, chance_key(key))}  # not those of the other tfs
        raw = {k: v for k, v in score.raw.items() if ":" not in k or k.startswith("own:") or k in mine}
        console.print(table, measures(reward.calibration, raw), answers(found))
    if args.html:
        odd = {field: misplaced(reward.encoder, probe, getattr(sample, field)) for field in ("think", "story")}
        write_page(
            args.html, sample, score, found, misplaced=odd, weights=reward.weights, switched_off=off, recall_keys=reward.recall_keys(),
            calibration=reward.calibration,
        )  # fmt: skip
        print(f"wrote {args.html}")


def rescore(args: Rescore) -> None:
    rows = read_rows(args.samples, {"reward": float, "raw": dict})
    reward = Reward(args.reward, Calibration.load(args.data / "calibration.json"))
    needed = {name for key in reward.recall_keys() for name in (key, chance_key(key))} | set(HOME_MEASURES)
    missing = next((n for n, row in enumerate(rows, 1) if row["raw"] and not row["raw"].keys() >= needed), None)
    if missing:
        raise InputError(
            f"{args.samples}: row {missing} was logged under another idf_cap, or by an older version: encode it again "
            "with `reward.py score`"
        )
    scores = []
    for row in rows:
        sample = sample_of(row)
        verdict = row.get("verdict") or verdict_of(sample)  # as logged, like the measurements
        raw = row["raw"] | reward.measure_text(sample) if verdict == "ok" else {}
        scores.append(reward.combine(raw, verdict, target_of(args, reward, row)))
    old, new = np.array([row["reward"] for row in rows]), np.array([score.reward for score in scores])
    print(args.reward.effective())
    print(f"{len(rows)} samples: rank correlation {rank_correlation(old, new):.3f}")
    pairs, flips = flipped([(row.get("step"), row["prompt"]) for row in rows], old, new)
    print(f"{len(flips)} of {pairs} pairs of samples for one prompt flip")
    for was, now in flips[: args.show]:
        print(f"\n{rows[was]['prompt']}")
        for name, i in (("was better", was), ("is better", now)):
            moved = ", ".join(f"{k} {v:.2f}" for k, v in scores[i].parts.items() if k in PARTS)
            print(f"  {name}: {old[i]:.3f} -> {new[i]:.3f}  {moved}\n    {' '.join(rows[i]['story'].split()[:40])}")


def audit(args: Audit) -> None:
    held_out = [row for split in ("validation", "test") for row in load_sft(args.data, split)]
    honest = {"human rows": [row | {"finished": True} for row in spread(held_out, args.rows)]}
    if args.samples:
        honest["samples"] = best_of_prompts(read_rows(args.samples, {"reward": float}), args.rows, args.seed)
    for kind, rows in honest.items():
        if len(rows) < 2:
            raise InputError(
                f"{args.samples if kind == 'samples' else args.data} holds {len(rows)} {kind}; the audit needs 2"
            )
    reward = Reward.load(args.data, args.reward)
    target = target_of(args, reward)
    if not args.json:
        print(args.reward.effective())
    wins = {kind: wins_of(reward, kind, rows, target, args) for kind, rows in honest.items()}
    families = wins["human rows"]
    more = {"samples": wins["samples"]} if args.samples else {}
    print(json.dumps({"families": families, "worst": max(families, key=families.__getitem__), **more}))


def best_of_prompts(rows: list[dict[str, Any]], most: int, seed: int) -> list[dict[str, Any]]:
    """Per prompt and step, the well-formed row with the highest logged reward; at most `most` of them, drawn at random."""
    best: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = (row.get("step"), row["prompt"])
        if verdict_of(sample_of(row)) == "ok" and (key not in best or row["reward"] > best[key]["reward"]):
            best[key] = row
    return random.Random(seed).sample(list(best.values()), min(most, len(best)))


def wins_of(reward: Reward, kind: str, rows: list[dict[str, Any]], target: float, args: Audit) -> dict[str, float]:
    """{family: share of the rows whose hack scores higher than the row itself}."""
    from tqdm import tqdm

    scores = np.array([score.reward for score in reward([sample_of(row) for row in rows], target)])
    if not args.json:
        low, middle, high = np.percentile(scores, (5, 50, 95))
        print(f"{len(rows)} {kind}: reward median {middle:.3f}, 5th to 95th percentile {low:.3f} to {high:.3f}")
        print(f"{'hack':28} {'wins':>6} {'median':>8} {'highest':>8}   (upper bounds where the bound already loses)")
    wins = {}
    for family in tqdm(FAMILIES, desc=f"auditing {kind}", unit="family", disable=None, leave=False):
        hacks = [sample_of(hack(family, rows, i, args.seed)) for i in range(len(rows))]
        tricks = ceilings(reward, hacks, scores, target)
        wins[family] = float((tricks > scores + 1e-9).mean())
        if not args.json:
            tqdm.write(f"{family:28} {wins[family]:6.1%} {np.median(tricks):8.3f} {tricks.max():8.3f}")
    return wins


def ceilings(reward: Reward, samples: list[Sample], rivals: np.ndarray, target: float) -> np.ndarray:
    """Rewards of samples: exact if they may reach their rival's; if even perfect recall would lose, that upper bound.

    Most hacks lose on word counts alone, and encoding is nearly all of the cost.
    """
    perfect = {name: bound for key in reward.recall_keys() for name, bound in ((key, 1.0), (chance_key(key), 0.0))}
    perfect |= dict.fromkeys(HOME_MEASURES, np.inf)
    verdicts = [verdict_of(sample) for sample in samples]
    best = [
        reward.combine(reward.measure_text(sample) | perfect if verdict == "ok" else {}, verdict, target).reward
        for sample, verdict in zip(samples, verdicts, strict=True)
    ]
    close = [i for i, rival in enumerate(rivals) if verdicts[i] == "ok" and best[i] >= rival]
    for i, score in zip(close, reward([samples[i] for i in close], target), strict=True):
        best[i] = score.reward
    return np.array(best)


Args = (
    Annotated[ScoreRows, tyro.conf.subcommand("score")]
    | Annotated[Explain, tyro.conf.subcommand("explain")]
    | Annotated[Rescore, tyro.conf.subcommand("rescore")]
    | Annotated[Audit, tyro.conf.subcommand("audit")]
)
COMMANDS = {ScoreRows: score_rows, Explain: explain, Rescore: rescore, Audit: audit}


def main(args: Workbench) -> None:
    check_flags(args, {}, ("length_target",))
    COMMANDS[type(args)](args)


if __name__ == "__main__":
    run(main, Args)
