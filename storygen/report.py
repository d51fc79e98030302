"""One self-contained HTML page of an RL run, finished or not (`python -m storygen.report RUN_DIR`), or of a comparison."""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jinja2 import Environment
from markupsafe import Markup

from storygen.cli import InputError, run, write_atomically

CURVE_POINTS = 600  # more than a chart has pixels
SAMPLES = 1500  # embedded at most; a browser filters this many without a pause
CHOICE = "the best and the worst of the run and of many steps, random ones of each step and verdict, and the held-out evaluations."
SAMPLE_BYTES = 10_000_000  # of embedded samples at most, however long the stories


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of an RL run (`metrics.jsonl`, and if they exist `samples.jsonl`, `run.json`) and return its path.

    `out` is `run_dir/report.html` by default. Of many samples only a selection is embedded, so that 100,000 stay under
    15 MB: the best and worst of each of many steps, random ones, and the held-out evaluations. Lines that are not JSON
    objects, such as a last line still being written, are skipped. Raises `InputError` if there is nothing to report on.
    """
    metrics = [row for _, row in _rows(run_dir / "metrics.jsonl") if _number(row.get("step"))]
    if not metrics:
        raise InputError(f"{run_dir} holds no metrics.jsonl with a step in it: give the output folder of rl_train.py")
    human = _human(metrics[0])
    metrics = [{key: value for key, value in row.items() if not key.startswith("human/")} for row in metrics]
    samples, total, spread = _samples(run_dir / "samples.jsonl")
    tiles, note = _tiles(metrics)
    page = {
        "by": "step",
        "name": run_dir.resolve().name,
        "summary": f"{metrics[-1]['step']:,} training steps, {total:,} samples",
        "tiles": tiles,
        "tiles_note": note,
        "samples_note": _samples_note(len(samples), total, CHOICE),
        "config": _flat(_config(run_dir / "run.json")),
        "data": _script_json({"by": "step", "human": human, "curves": _curves(metrics + spread), "samples": samples}),
    }
    return _render(page, out or run_dir / "report.html")


def write_comparison(folder: Path, rows: list[tuple[str, list[str]]], note: str) -> Path:
    """Write `folder/report.html` of an evaluation (its `evaluation.json` and `samples.jsonl`) and return its path.

    rows: what was measured, (name, one cell per model); note: its units. The embedded samples are those of the first
    prompts, as many as fit.
    """
    evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
    models = [result["model"] for result in evaluation["models"]]
    samples, size, total = [], 0, 0
    for _, row in _by_prompt(folder / "samples.jsonl"):
        total += 1
        sample = _sample(row | {"split": "validation"}) | {"step": row["model"]}
        size += len(_script_json(sample).encode())
        if size <= SAMPLE_BYTES and len(samples) < SAMPLES:
            samples.append(sample)
    rewards = [result["reward"]["mean"] for result in evaluation["models"]]
    page = {
        "by": "model",
        "name": "Models compared",
        "summary": f"{len(models)} models, {evaluation['prompts']:,} {evaluation['split']} prompts, {evaluation['num']} samples of each",
        "tiles": [_tile(model, rewards[0] if i else None, reward) for i, (model, reward) in enumerate(zip(models, rewards, strict=True))],
        "tiles_note": "Mean reward; change against the first model.",
        "columns": models,
        "rows": rows,
        "rows_note": note,
        "samples_note": _samples_note(len(samples), total, "those of the first prompts, of every model."),
        "config": _flat({key: value for key, value in evaluation.items() if key != "models"}),
        "data": _script_json({"by": "model", "human": {}, "curves": {}, "samples": samples}),
    }  # fmt: skip
    return _render(page, folder / "report.html")


def _by_prompt(path: Path) -> list[tuple[int, dict]]:
    """The rows, grouped by prompt: all models' samples of one prompt stand together."""
    rows = list(_rows(path))
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(row["prompt"] for _, row in rows))}
    return sorted(rows, key=lambda item: place[item[1]["prompt"]])


def _render(page: dict, out: Path) -> Path:
    template = Environment(autoescape=True).from_string((files("storygen") / "report.html").read_text("utf-8"))
    written = datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    write_atomically(out, template.render(page, written=written))
    return out


def _human(row: dict) -> dict[str, list[float]]:
    """{"reward" or a part: [10th, 90th percentile of human rows]}, from what a run logs about them at its start."""
    low = {
        key.removeprefix("human/").removesuffix("/p10"): key
        for key in row
        if key.startswith("human/") and key.endswith("/p10")
    }
    bands = {name.removeprefix("parts/"): [row[key], row.get(key[:-3] + "p90")] for name, key in low.items()}
    return {name: band for name, band in bands.items() if all(map(_number, band))}


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Byte offset and content of each line that is a JSON object; nothing if there is no file."""
    if not path.is_file():
        return
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # undecodable bytes raise it too
                row = None
            if isinstance(row, dict):
                yield offset, row
            offset += len(line)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curves(metrics: list[dict]) -> dict[str, tuple[list[float], list[float]]]:
    """{key: (steps, values)}; long curves as means over runs of neighbouring steps, as many as a chart can show."""
    curves: dict[str, dict[float, float]] = {}
    for row in metrics:
        for key, value in row.items():
            if key != "step" and _number(value):
                curves.setdefault(key, {})[row["step"]] = value
    thinned = {}
    for key, curve in curves.items():
        points = sorted(curve.items())
        width = math.ceil(len(points) / CURVE_POINTS)
        groups = [points[i : i + width] for i in range(0, len(points), width)]
        thinned[key] = (
            [round(sum(step for step, _ in group) / len(group), 1) for group in groups],
            [float(f"{sum(value for _, value in group) / len(group):.5g}") for group in groups],
        )
    return thinned


def _tiles(metrics: list[dict]) -> tuple[list[dict], str]:
    """The headline numbers: last against first evaluation, or, without any, the two ends of training."""
    evaluations = [row for row in metrics if _number(row.get("eval/reward"))]
    if evaluations:
        before, after = evaluations[0], evaluations[-1]
        note = f"On held-out prompts: step {after['step']:,}, compared with step {before['step']:,}."
        prefix = "eval/"
        names = {"eval/reward": "reward"}
    else:
        tenth = max(1, len(metrics) // 10)
        before, after = _mean(metrics[:tenth]), _mean(metrics[-tenth:])
        note = f"On training samples: mean of the last {tenth:,} steps, compared with the first {tenth:,}."
        prefix = ""
        names = {"objective/reward": "reward"}
    parts = prefix + "parts/"
    names |= {prefix + "samples/well_formed": "well formed", prefix + "well_formed": "well formed"}
    names |= {key: key.removeprefix(parts) for key in after if key.startswith(parts)}
    tiles = [_tile(name.replace("_", " "), before.get(key), after.get(key)) for key, name in names.items()]
    ends = {}
    for key, name in {"length/median": "story length, words", "objective/kl": "KL, nats a token"}.items():
        ends[name] = [row[key] for row in metrics if _number(row.get(key))]
    tiles += [_tile(name, values[0], values[-1], judged=False) for name, values in ends.items() if values]
    return [tile for tile in tiles if tile], note


def _mean(rows: list[dict]) -> dict[str, float]:
    columns: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if _number(value):
                columns.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in columns.items()}


def _tile(name: str, before: Any, after: Any, judged: bool = True) -> dict | None:
    """One headline number; `judged` ones are better when higher, and coloured accordingly."""
    if not _number(after):
        return None
    digits = 0 if abs(after) >= 100 else 3

    def show(value: float) -> str:
        return f"{value:,.{digits}f}".replace("-", "−")

    if not _number(before):
        return {"name": name, "value": show(after), "change": "", "before": ""}
    change = after - before
    trend = "" if not judged or abs(change) < 0.0005 else "up" if change > 0 else "down"
    sign = "+" if change >= 0 else ""
    return {"name": name, "value": show(after), "change": sign + show(change), "before": show(before), "trend": trend}


def _samples(path: Path) -> tuple[list[dict], int, list[dict]]:
    """The samples to embed, in file order; how many the file holds; and reward quantiles of each step's training samples.

    One pass to choose, one to read the chosen.
    """
    index = []
    for offset, row in _rows(path):
        reward = row.get("reward")
        reward = reward if _number(reward) else -math.inf
        index.append((offset, row.get("step", 0), row.get("split"), reward, str(row.get("prompt")), str(row.get("verdict"))))
    if not index:
        return [], 0, []
    by_step: dict[float, list[float]] = {}
    for _, step, split, reward, *_ in index:
        if split == "train" and math.isfinite(reward) and _number(step):
            by_step.setdefault(step, []).append(reward)
    spread = [{"step": step, **_quantiles(rewards, "reward")} for step, rewards in by_step.items()]
    chosen: dict[int, dict] = {}
    size = 0
    with open(path, "rb") as file:
        for offset in _preferred(index):
            file.seek(offset)
            sample = _sample(json.loads(file.readline()))
            text = _script_json(sample)
            size += len(text.encode())
            if size > SAMPLE_BYTES or len(chosen) == SAMPLES:
                break
            chosen[offset] = sample
    return [chosen[offset] for offset in sorted(chosen)], len(index), spread


def _quantiles(values: list[float], name: str) -> dict[str, float]:
    return {f"{name}/p{q}": float(value) for q, value in zip((10, 50, 90), np.percentile(values, (10, 50, 90)), strict=True)}


def _preferred(index: list[tuple]) -> list[int]:
    """Offsets of all samples, each once, those most worth embedding first."""
    draw = random.Random(0)
    held, train = ([r for r in index if (r[2] == "validation") == wanted] for wanted in (True, False))

    def spread(values: list, count: int) -> list:
        """Up to `count` of the sorted distinct values, evenly spaced, both ends among them."""
        values = sorted(set(values))
        if len(values) <= count:
            return values
        return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]

    order: list[tuple] = []
    evaluations = set(spread([r[1] for r in held], 5))
    prompts = set(list(dict.fromkeys(row[4] for row in held))[:64])
    seen: Counter[tuple] = Counter()
    for row in held:
        if row[1] in evaluations and row[4] in prompts:
            seen[row[1], row[4]] += 1
            # The same 64 prompts at each of these evaluations, two samples each: enough to compare, and bounded.
            if seen[row[1], row[4]] <= 2:
                order.append(row)
    by_reward = sorted(train, key=lambda r: r[3])
    order += by_reward[-25:] + by_reward[:25]
    by_step: dict[Any, list[tuple]] = {}
    for row in by_reward:
        by_step.setdefault(row[1], []).append(row)
    for step in spread(list(by_step), 50):
        rows = by_step[step]
        order += rows[-2:] + rows[:2] + draw.sample(rows, min(4, len(rows)))
    verdicts: dict[str, list[tuple]] = {}
    for row in train:
        verdicts.setdefault(row[5], []).append(row)
    for rows in verdicts.values():
        order += draw.sample(rows, min(20, len(rows)))
    order += draw.sample(index, len(index))
    return list(dict.fromkeys(row[0] for row in order))


def _sample(row: dict) -> dict:
    """What the page needs of a sample, each field of the type that it expects."""
    verdict = str(row.get("verdict") or "ok")

    def numbers(value: Any) -> dict:
        return {str(k): round(v, 4) for k, v in value.items() if _number(v)} if isinstance(value, dict) else {}

    return {
        **{key: str(row.get(key) or "") for key in ("prompt", "think", "story")},
        # Nothing was measured on a malformed sample: its parts and guards are 0 by definition, none of them "fired".
        **{key: numbers(row.get(key)) if verdict == "ok" else {} for key in ("parts", "guards", "raw")},
        **{key: round(row[key], 4) if _number(row.get(key)) else None for key in ("reward", "advantage")},
        "step": row.get("step") if _number(row.get("step")) else 0,
        "split": "validation" if row.get("split") == "validation" else "train",
        "verdict": verdict,
    }


def _samples_note(embedded: int, total: int, choice: str) -> str:
    return f"All {total:,} samples." if embedded == total else f"{embedded:,} of {total:,} samples: {choice}"


def _config(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    """A nested configuration as (dotted key, text) pairs."""
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in _flat(v, f"{key}.{k}" if key else str(k))]
    return [(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]


def _script_json(value: Any) -> Markup:
    """JSON that may stand inside a <script> element: no text in it can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate, which JSON can spell, cannot be written as UTF-8.
    text = text.encode("utf-8", "replace").decode()
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


@dataclass
class Args:
    """Write the HTML report of an RL run."""

    run_dir: tyro.conf.Positional[Path]
    """Output folder of rl_train.py."""
    out: Path | None = None
    """The page to write; run_dir/report.html by default."""


def main(args: Args) -> None:
    print(write_report(args.run_dir, args.out))


if __name__ == "__main__":
    run(main, Args)
