"""Compare checkpoints on held-out prompts.

    python evaluate.py artifacts/zeroshot artifacts/rl/final
    python evaluate.py MODEL [MODEL …] --data DIR --out DIR --reference base_model

Every model answers the same prompts with the same seed and is scored by the same reward. Intervals are 95% bootstrap
intervals over prompts; each model is compared with the first, prompt by prompt. The files are written anew after every model.
"""

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from rew_config import RewardConfig
from reward import Reward, Sample, Score
from storygen.batching import context_length, token_budget_batches
from storygen.checkpoint import load_model
from storygen.cli import InputError, as_json, check_flags, check_folder, pick_device, run, write_atomically
from storygen.corpus import load_prompts, load_sft
from storygen.diversity import Copies, distinct, nearest, self_bleu
from storygen.logprobs import best_dtype, response_logps
from storygen.pattern import Pattern, add_pattern_tokens
from storygen.report import write_comparison
from storygen.rollout import rollout
from storygen.sampler import sample
from storygen.textstats import repeated_share, words

RESAMPLES = 10_000
DISTINCT_SIZE = 1_000  # bigrams: few enough that 64 short stories of one model hold them
BLEU_REFERENCES = 32
TOKENS = 8192  # of one forward pass, padding included


@dataclass
class Args:
    models: tyro.conf.Positional[tuple[str, ...]]
    """Model folders made by pattern_learning.py or rl_train.py; each is compared with the first. A plain language model,
    such as base_model, gets the pattern's tokens untrained: what it writes shows what learning the pattern brings."""
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    out: Path = Path("artifacts/evaluation")
    """Where evaluation.json and samples.jsonl are written."""
    json: bool = False
    """Print one JSON object as the last line."""
    num: int = 4
    """Samples per prompt."""
    prompts: int = 64
    """Number of prompts to draw from the split with the seed; all if it has fewer."""
    split: str = "test"
    """Split of the prompts: test, validation or train."""
    seed: int = 0
    """Seed of the prompts, the samples and the bootstrap."""
    temperature: float = 1.0
    """Divides the logits."""
    length_target: float | None = None
    """Words at which the reward's length part is 1. Default: the human median."""
    unplanned: bool = True
    """Also let every model write with the outline forced empty, to see what planning is worth; doubles the sampling."""
    reference: str | None = None
    """A plain language model, such as base_model: the stories' negative log-likelihood under it is reported."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    reward: RewardConfig = field(default_factory=RewardConfig)


def check(args: Args) -> None:
    if not args.models:
        raise InputError("give at least one model folder")
    if len(set(args.models)) < len(args.models):
        raise InputError("a model folder is given twice")
    check_flags(args, {"num": 1, "prompts": 1, "seed": 0}, ("temperature", "length_target"))
    check_folder(args.out, "evaluation.json")


def load_policy(folder: str, device: str) -> tuple[PreTrainedModel, Pattern]:
    """A model to evaluate and its pattern, whose tokens are added to the tokenizer if it lacks them."""
    model, tokenizer = load_model(folder, device, dtype=best_dtype(device), flag="MODEL")
    add_pattern_tokens(model, tokenizer)
    return model, Pattern(tokenizer)


@torch.no_grad()
def mean_logps(model, rows: list[list[int]], starts: list[int], vocabulary: int | None = None) -> np.ndarray:
    """Mean log-probability per token, in nats, of each row from its start on, over the first `vocabulary` tokens."""
    means = np.zeros(len(rows))
    for batch in token_budget_batches([len(row) for row in rows], TOKENS):
        part, part_starts = [rows[i] for i in batch], [starts[i] for i in batch]
        # Padding may be any id: it is on the right, after every token that is scored.
        logps = response_logps(model, part, part_starts, 0, dtype=best_dtype(model.device), vocabulary=vocabulary)
        sizes = [len(row) - start for row, start in zip(part, part_starts, strict=True)]
        means[batch] = [piece.double().mean().item() for piece in logps.split(sizes)]
    return means


def outline_worth(model, pattern: Pattern, samples: list[Sample], seed: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """How much an outline helps its own story: nats per story token given that outline, minus those under another condition.

    Returns {"other": minus an outline of another prompt, "none": minus no outline at all}, one value per well-formed sample,
    and their prompts. Near 0, the model writes its story whatever the plan says. All conditions score the same story tokens,
    as many as fit the context after the longest.
    """
    draw = np.random.default_rng(seed)
    formed = [s for s in samples if s.verdict == "ok"]
    rows: dict[str, list] = {"own": [], "other": [], "none": []}
    kept = []
    for s in formed:
        others = [o.think for o in formed if o.prompt != s.prompt]
        if not others:
            continue
        outlines = {"own": s.think, "other": others[draw.integers(len(others))], "none": ""}
        rows_of = {}
        for condition, think in outlines.items():
            ids, start = pattern.row(s.prompt, think, s.story)
            rows_of[condition] = (ids, ids.index(pattern.story_id, start) + 1)
        room = context_length(model) - max(start for _, start in rows_of.values())
        if room < 1:
            continue
        for condition, (ids, start) in rows_of.items():
            rows[condition].append((ids[: start + room], start))
        kept.append(s.prompt)
    if not kept:
        return {"other": np.zeros(0), "none": np.zeros(0)}, []
    means = {
        condition: mean_logps(model, *map(list, zip(*pairs, strict=True)), pattern.size) for condition, pairs in rows.items()
    }
    return {condition: means["own"] - means[condition] for condition in ("other", "none")}, kept


def write_unplanned(model, pattern: Pattern, prompts: list[str], args: Args) -> list[str]:
    """`args.num` stories per prompt, written right after an empty outline; "" where the grammar rejects one."""
    empty = [*pattern.encode("")[1:], pattern.story_id]
    drawn = sample(
        model, [pattern.prefix(prompt) + empty for prompt in prompts], args.num, eos_id=pattern.eos_id,
        vocabulary=pattern.size, seed=args.seed, temperature=args.temperature, dtype=best_dtype(model.device), progress=True,
    )  # fmt: skip
    parsed = [pattern.parse(empty + one.ids) for completions in drawn for one in completions]
    return [p.story if p.verdict == "empty_think" else "" for p in parsed]


def story_rewards(reward: Reward, prompts: list[str], stories: list[str], length_target: float) -> list[float]:
    """Reward of each story from prompt and story alone; `malformed_score` for an empty one.

    The prompt stands in for the outline, and nothing that looks at an outline counts.
    """
    alone = Reward(reward.config.without_outline(), reward.calibration, reward.idf, reward.encoder)
    samples = [Sample(prompt, prompt, story, True) for prompt, story in zip(prompts, stories, strict=True)]
    return [score.reward for score in alone(samples, length_target)]


def reference_nll(reference, tokenizer, stories: list[str]) -> float | None:
    """Mean negative log-likelihood per token, in nats, of stories as plain text, each up to the reference's context."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError(f"--reference {tokenizer.name_or_path}: its tokenizer names no token to start a text with")
    cut = {"add_special_tokens": False, "truncation": True, "max_length": context_length(reference) - 1}
    rows = [[start, *tokenizer(story, **cut)["input_ids"]] for story in stories if story]
    if not rows:
        return None
    sizes = np.array([len(row) - 1 for row in rows])
    return float(-(mean_logps(reference, rows, [1] * len(rows)) * sizes).sum() / sizes.sum())


def by_prompt(values, prompts: list[str]) -> np.ndarray:
    """Mean over the samples of each prompt, with prompts in order of first appearance: the unit of the bootstrap."""
    groups: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        groups.setdefault(prompt, []).append(float(value))
    return np.array([np.mean(group) for group in groups.values()])


def bootstrap(values: np.ndarray, seed: int) -> dict[str, Any] | None:
    """Mean, 95% percentile interval, and the two-sided p-value of a mean of 0, from resampling the values.

    A single value says nothing about spread: no interval and no p. The least p is 2^(1 - n): n values of one sign by chance.
    """
    if not len(values):
        return None
    if len(values) == 1:
        return {"mean": float(values[0]), "ci95": None, "p_mean_zero": None, "prompts": 1}
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    means = values[picks].mean(1)
    tail = min((means <= 0).mean(), (means >= 0).mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return {
        "mean": float(values.mean()),
        "ci95": [float(low), float(high)],
        "p_mean_zero": float(min(1.0, max(2 * tail, 1 / RESAMPLES, 2.0 ** (1 - len(values))))),
        "prompts": len(values),
    }


def describe(samples: list[Sample], scores: list[Score], seed: int) -> dict[str, Any]:
    """The figures that need no model.

    Parts and guards cover well-formed samples (nothing is measured of the others), lengths and diversity all samples that
    have a story. Lengths are in words.
    """
    formed = [score for score in scores if score.verdict == "ok"]
    told = [s for s in samples if words(s.story)]
    stories = [words(s.story) for s in told]
    rep_2 = float(np.mean([repeated_share(text, 2) for text in stories])) if stories else None
    return {
        "reward": bootstrap(by_prompt([score.reward for score in scores], [s.prompt for s in samples]), seed),
        "samples": len(samples),
        "well_formed": len(formed) / len(samples),
        "finished": sum(s.finished for s in samples) / len(samples),
        "verdicts": dict(Counter(score.verdict for score in scores).most_common()),
        "parts": {k: float(np.mean([score.parts[k] for score in formed])) for k in (formed[0].parts if formed else ())},
        "guards_fired": {k: float(np.mean([s.guards[k] < 1 for s in formed])) for k in (formed[0].guards if formed else ())},
        "story_words": {f"p{q}": float(np.percentile([len(t) for t in stories], q)) if told else None for q in (10, 50, 90)},
        "outline_words_p50": float(np.median([len(words(s.think)) for s in told])) if told else None,
        "rep_2": rep_2,
        "distinct_2_story": None if rep_2 is None else 1 - rep_2,
        "distinct_2_set": distinct(stories, 2, DISTINCT_SIZE) if stories else None,
        "self_bleu_4": self_bleu(stories, 4, BLEU_REFERENCES, seed) if len(stories) > 1 else None,
    }


def novelty(samples: list[Sample], training: list[str], copies: Copies) -> dict[str, Any]:
    """How new the stories are compared with the training ones: longest copied run of words, tf-idf cosine to the nearest."""
    told = [s.story for s in samples if words(s.story)]
    if not told:
        return {"copied_run": None, "nearest_story": None}
    runs, cosines = [copies.longest(words(story)) for story in told], nearest(told, training)
    return {
        "copied_run": {f"p{q}": float(np.percentile(runs, q)) for q in (50, 95, 100)},
        "nearest_story": {f"p{q}": float(np.percentile(cosines, q)) for q in (50, 95, 100)},
    }


UNITS = "shares of samples, guards of well-formed ones; nats a token; intervals: 95%, bootstrap over prompts"


def table(results: list[dict[str, Any]]) -> Table:
    grid = Table(caption=UNITS, caption_justify="left")
    grid.add_column("")
    for result in results:
        grid.add_column(result["model"], justify="right", overflow="fold")
    for name, cells in measures(results):
        grid.add_row(name, *cells)
    return grid


def measures(results: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of the comparison: a measure's name, and a cell for each model."""
    rows: list[tuple[str, list[str]]] = []

    def number(value: float | None, digits: int = 3) -> str:
        return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"

    def interval(value: dict | None) -> str:
        if value is None:
            return "–"
        ends = f" [{', '.join(map(number, value['ci95']))}]" if value["ci95"] else ""
        return number(value["mean"]) + ends

    def add(name: str, show) -> None:
        rows.append((name, [show(result) for result in results]))

    add("reward", lambda r: interval(r["reward"]))
    if len(results) > 1:
        add("  less the first's", lambda r: interval(r["vs_first"]) if r["vs_first"] else "")
    add("well-formed", lambda r: number(r["well_formed"]))
    add("finished", lambda r: number(r["finished"]))
    for name in dict.fromkeys(name for r in results for name in r["parts"]):
        add(f"part {name}", lambda r, name=name: number(r["parts"].get(name)))
    for name in dict.fromkeys(name for r in results for name, share in r["guards_fired"].items() if share > 0):
        add(f"guard {name} fired", lambda r, name=name: number(r["guards_fired"].get(name)))
    add(
        "story words p10/p50/p90",
        lambda r: " / ".join(number(r["story_words"][k], 0) for k in ("p10", "p50", "p90")),
    )
    add("outline words p50", lambda r: number(r["outline_words_p50"], 0))
    add("rep-2 in a story", lambda r: number(r["rep_2"]))
    add("distinct-2 in a story", lambda r: number(r["distinct_2_story"]))
    add(f"distinct-2 of {DISTINCT_SIZE:,}", lambda r: number(r["distinct_2_set"]))
    add("self-BLEU-4", lambda r: number(r["self_bleu_4"]))
    for name, key, digits in (
        ("longest copied run, words", "copied_run", 0),
        ("cosine to the nearest story", "nearest_story", 2),
    ):
        add(
            f"{name}, p50/p95/max",
            lambda r, key=key, digits=digits: (
                " / ".join(number(r[key][q], digits) for q in ("p50", "p95", "p100")) if r[key] else "–"
            ),
        )
    if any(r["reference_nll"] is not None for r in results):
        add("reference NLL, nats", lambda r: number(r["reference_nll"]))
    add("outline's worth over another, nats", lambda r: interval(r["outline_worth"]["other"]))
    add("outline's worth over none, nats", lambda r: interval(r["outline_worth"]["none"]))
    if any(r["planned"] is not None for r in results):
        add("story alone, planned", lambda r: interval(r["planned"]))
        add("story alone, outline forced empty", lambda r: interval(r["unplanned"]))
        add("  planned less unplanned", lambda r: interval(r["planning_gain"]))
        # Where this is low, the two rows above compare forms, not stories: the model wrote its outline all the same.
        add("  well-formed with it empty", lambda r: number(r["unplanned_well_formed"]))
    return rows


def main(args: Args) -> None:
    check(args)
    config = as_json(args)
    print(json.dumps(config))
    device = pick_device(args.device)
    for folder in args.models:
        load_policy(folder, "cpu")  # reports an unusable folder before minutes go into the others
    reference = load_model(args.reference, device, dtype=best_dtype(device), flag="--reference") if args.reference else None
    pool = load_prompts(args.data, args.split)
    if not pool:
        raise InputError(f"{args.data} holds no prompt of the split {args.split}: give another --split")
    order = np.random.default_rng(args.seed).permutation(len(pool))[: args.prompts]
    prompts = [pool[i] for i in sorted(order)]
    reward = Reward.load(args.data, args.reward, device)
    length_target = args.length_target or reward.calibration.quantile("story_words", 50)

    training = [row["story"] for row in load_sft(args.data, "train")]
    copies = Copies([words(story) for story in training])

    report: dict[str, Any] = {
        "data": str(args.data), "split": args.split, "prompts": len(prompts), "num": args.num, "seed": args.seed,
        "temperature": args.temperature, "length_target": length_target, "reference": args.reference, "device": device,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "config": config, "models": [],
    }  # fmt: skip
    results, rows, first = report["models"], [], None
    for folder in args.models:
        model, pattern = load_policy(folder, device)
        batch = rollout(
            model, pattern, prompts, args.num, seed=args.seed, temperature=args.temperature, dtype=best_dtype(device),
            progress=True,
        )  # fmt: skip
        facts = zip(batch.prompts, batch.parsed, batch.room, strict=True)
        samples = [Sample(prompt, **vars(parsed), room=room) for prompt, parsed, room in facts]
        scores = reward(samples, length_target)
        result = {"model": folder, **describe(samples, scores, args.seed), **novelty(samples, training, copies)}
        per_prompt = by_prompt([score.reward for score in scores], [s.prompt for s in samples])
        first = per_prompt if first is None else first
        result["vs_first"] = bootstrap(per_prompt - first, args.seed) if results else None
        worths, of = outline_worth(model, pattern, samples, args.seed)
        result["outline_worth"] = {over: bootstrap(by_prompt(values, of), args.seed) for over, values in worths.items()}
        result |= {"planned": None, "unplanned": None, "planning_gain": None, "unplanned_well_formed": None}
        if args.unplanned:
            stories = [s.story if score.verdict == "ok" else "" for s, score in zip(samples, scores, strict=True)]
            unplanned = write_unplanned(model, pattern, prompts, args)
            by = {
                name: by_prompt(story_rewards(reward, batch.prompts, texts, length_target), batch.prompts)
                for name, texts in (("planned", stories), ("unplanned", unplanned))
            }
            result |= {name: bootstrap(values, args.seed) for name, values in by.items()}
            result["planning_gain"] = bootstrap(by["planned"] - by["unplanned"], args.seed)
            result["unplanned_well_formed"] = sum(map(bool, unplanned)) / len(unplanned)
        result["reference_nll"] = reference_nll(*reference, [s.story for s in samples]) if reference else None
        results.append(result)
        rows += [{"model": folder, **vars(s), **vars(score)} for s, score in zip(samples, scores, strict=True)]
        # After every model, so that a run that is stopped keeps those it finished.
        write_atomically(args.out / "evaluation.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        write_atomically(args.out / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        page = write_comparison(args.out, measures(results), UNITS)
        reached = f"reward {result['reward']['mean']:.3f}, well-formed {result['well_formed']:.1%}"
        print(f"{folder}: {reached} ({len(results)} of {len(args.models)} models)", file=sys.stderr)

    Console().print(table(results))
    print(f"{len(prompts)} {args.split} prompts, {args.num} samples of each; {page}, evaluation.json, samples.jsonl")
    if args.json:
        print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    run(main, Args)
