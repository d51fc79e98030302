"""Stage 1: outlines, IDF table, human calibration, formatted data.

    python data_prep.py                                      # the preset that fits this machine -> artifacts/data
    python data_prep.py --preset demo                        # offline, from the embedded corpus
    python data_prep.py --source stories.csv --outlines teacher --teacher-url http://localhost:8000/v1 --teacher-model NAME

Rows are read, cleaned and split by the content of their prompt. Rows with an outline go to `sft.parquet`, all prompts to
`prompts.parquet`. The IDF table is counted over stories and outlines, the calibration measured on the human training rows.
The data set is built in a temporary folder and moved into place at the end: --out holds a whole one or the previous one.
"""

import heapq
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from storygen.bertscore import Encoder, fingerprint, load_encoder
from storygen.calibration import Calibration, calibrate, inputs_key
from storygen.cleaning import Bounds
from storygen.cli import (
    InputError,
    as_json,
    check_flags,
    check_folder,
    claim,
    file_sha256,
    fill,
    pick_device,
    put_in_place,
    run,
    write_atomically,
)
from storygen.corpus import Columns, read_hub, read_rows
from storygen.duplicates import text_key
from storygen.idf import Idf, build_idf
from storygen.memory import keep_freed_memory
from storygen.outlines import Teacher, ask
from storygen.rowstore import RowStore

LIBRARIES = ("datasets", "numpy", "pyarrow", "tokenizers", "torch", "transformers")
CALIBRATION_STORIES = 20_000


@dataclass
class Args:
    preset: Literal["auto", "demo", "gpt2"] = "auto"
    """demo: the embedded corpus, offline; gpt2: the full hub data sets; auto: gpt2 if a GPU is visible, else demo."""
    out: Path = Path("artifacts/data")
    """Folder to write. Refused if it holds anything but an earlier data set."""
    source: str | None = None
    """Stories and prompts: hub, corpus, or the path of a file or folder. Default by preset."""
    outlines: str | None = None
    """Rows with outlines: hub, corpus, teacher (asked about --source rows), or a path. Default by preset."""
    limit: int | None = None
    """Read at most this many rows from each of --source and --outlines."""
    seed: int = 0
    """Seed for drawing the calibration stories and the rows that the teacher is asked about."""

    source_hub: str = "euclaise/writingprompts"
    """Data set read by --source hub, all splits."""
    source_revision: str = "main"
    """Its branch, tag or commit; the resolved commit is recorded in the manifest."""
    outlines_hub: str = "hungq/outline-story-2000"
    """Data set read by --outlines hub."""
    outlines_revision: str = "main"
    """Its branch, tag or commit."""

    prompt_column: str | None = None
    """Column of --source with the prompt; found by name (prompt) unless set."""
    story_column: str | None = None
    """Column of --source with the story; found by name (story, completion, text) unless set."""
    outlines_prompt_column: str | None = None
    """Column of --outlines with the prompt."""
    outlines_think_column: str | None = None
    """Column of --outlines with the outline; found by name (think, outline, plan) unless set."""
    outlines_story_column: str | None = None
    """Column of --outlines with the story."""
    words: Bounds = field(default_factory=Bounds)
    """How long texts may be, in words."""

    teacher_url: str = "http://localhost:8000/v1"
    """OpenAI-compatible endpoint for --outlines teacher. Its key is read from OPENAI_API_KEY."""
    teacher_model: str = "default"
    """Name of the teacher model to request."""
    teacher_sample: int = 2000
    """Number of --source rows to ask about."""
    teacher_template: Path | None = None
    """Template of the question to the teacher, with {prompt} and {story} in it; prompts/outline_teacher.txt unless set."""
    teacher_cache: Path = Path("artifacts/outlines.jsonl")
    """File that the teacher's answers are appended to; an interrupted run continues from there."""
    teacher_concurrency: int = 8
    """Maximum concurrent requests."""

    encoder: str = "minilm"
    """Encoder for the IDF table and the calibration: minilm (offline), or a hub name or folder."""
    encoder_layer: int | None = None
    """Hidden layer of the encoder to match on, counted from 1; None: the encoder's default."""
    device: str = "auto"
    """Where the encoder runs: auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Recipe:
    source: str
    outlines: str


PRESETS = {"demo": Recipe(source="corpus", outlines="corpus"), "gpt2": Recipe(source="hub", outlines="hub")}


def main(args: Args) -> None:
    keep_freed_memory()
    preset, why = choose_preset(args.preset)
    print(f"preset {preset}: {why}")
    fill(args, PRESETS[preset])
    config = as_json(args) | {"preset": preset}
    print(json.dumps(config, separators=(",", ":")))
    check(args)
    args.device = pick_device(args.device)
    encoder = load_encoder(args.encoder, args.encoder_layer, args.device)

    out = args.out.resolve()
    lock = claim(out)  # noqa: F841  held until the process ends
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        store = RowStore(aside / "rows.parquet", args.words)
        sources = read(args, store)
        store.settle()
        asked = {"teacher": ask_teacher(args, store)} if args.outlines == "teacher" else {}
        rows = store.write(aside)
        # Progress bars only on a terminal; they would flood anything else.
        total = sum(1 for _ in store.texts()) if sys.stderr.isatty() else None
        idf = build_idf(encoder.tokenizer, store.texts(), total)
        idf.save(aside / "idf.npz")
        human, more = store.human(CALIBRATION_STORIES, args.seed)
        calibration = calibrated(human, encoder, idf, args.seed, more, out / "calibration.json")
        calibration.save(aside / "calibration.json")
        (aside / "rows.parquet").unlink()

        manifest = {
            "preset": preset,
            "sources": sources,
            "counts": {origin: tally.as_dict() for origin, tally in store.tallies.items()} | asked,
            "rows": rows,
            "idf_documents": idf.documents,
            "encoder": {
                "name": encoder.name,
                "layer": encoder.layer,
                "sha256": encoder.sha256,
                "fingerprint": fingerprint(encoder.tokenizer),
            },
            "hashes": {path.name: file_sha256(path) for path in sorted(aside.iterdir())},
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in LIBRARIES},
            "config": config,
        }
        write_atomically(aside / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        put_in_place(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    report(manifest, args.out)


def choose_preset(preset: str) -> tuple[str, str]:
    if preset != "auto":
        return preset, "asked for"
    import torch

    if torch.cuda.is_available():
        return "gpt2", f"a GPU is visible ({torch.cuda.get_device_name()})"
    return "demo", "no GPU is visible"


def check(args: Args) -> None:
    """Check what can be checked before hours of reading."""
    check_flags(args, {"limit": 1, "teacher_sample": 1, "teacher_concurrency": 1, "seed": 0})
    if args.source == "teacher":
        raise InputError("--source teacher: a teacher writes outlines, not stories; use --outlines teacher")
    out = args.out.resolve()
    check_folder(args.out, "manifest.json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: cannot be made ({error.strerror})") from None


def read(args: Args, store: RowStore) -> dict[str, dict]:
    """Fill the store, outlines first: if both sets hold a story, the row with the outline is kept. Returns what was read."""
    columns = {
        "outlines": Columns(
            args.outlines_prompt_column, args.outlines_think_column, args.outlines_story_column, "outlines-"
        ),
        "source": Columns(args.prompt_column, None, args.story_column),
    }
    hubs = {"outlines": (args.outlines_hub, args.outlines_revision), "source": (args.source_hub, args.source_revision)}
    places = {"outlines": args.outlines, "source": args.source}
    sources: dict[str, dict] = {}
    for origin, place in places.items():
        if place == "teacher":
            sources[origin] = {"from": "teacher", "url": args.teacher_url, "model": args.teacher_model}
            continue
        if origin == "source" and place != "hub" and place == args.outlines:
            sources[origin] = {"from": place, "same_as": "outlines"}
            continue
        wrong: Counter = Counter()
        if place == "hub":
            name, revision = hubs[origin]
            commit, rows = read_hub(name, revision, f"--{origin}", columns[origin], wrong)
            sources[origin] = {"from": "hub", "name": name, "revision": commit}
        else:
            rows = read_rows(place, columns[origin], wrong)
            sources[origin] = {"from": place}
        if origin == "source":
            # The outlines come from elsewhere: leave out any that this set may hold.
            rows = without_outlines(rows, unused := Counter())
        whole: Counter = Counter()
        rows = tqdm(islice(rows, args.limit), desc=f"reading {origin}", unit=" rows", total=args.limit, disable=None)
        store.add(counting_whole(rows, whole), origin)
        if origin == "source" and unused["outlines"]:
            where = f"hub --outlines-hub {args.source_hub}" if place == "hub" else place
            print(f"--source {place}: {unused['outlines']} rows have an outline, which only --outlines {where} would use")
        store.tallies[origin].dropped["wrong_type"]["unknown"] += wrong["wrong_type"]
        if origin == "outlines" and not whole["rows"]:
            raise InputError(
                f"--outlines {place}: no row has both an outline and a story; name its columns with --outlines-think-column "
                "and --outlines-story-column, or use --outlines teacher or --outlines corpus"
            )
    return sources


def without_outlines(rows: Iterable[dict], unused: Counter) -> Iterator[dict]:
    """Yield the rows without their outlines, counting those."""
    for row in rows:
        unused["outlines"] += bool(row["think"])
        yield row | {"think": None}


def counting_whole(rows: Iterable[dict], whole: Counter) -> Iterator[dict]:
    """Yield the rows, counting those with both an outline and a story."""
    for row in rows:
        whole["rows"] += bool(row["think"] and row["story"])
        yield row


def ask_teacher(args: Args, store: RowStore) -> dict:
    """Get an outline for each of a sample of the stored stories. Returns counts in the form of the store's."""
    path = args.teacher_template or Path(__file__).parent / "prompts" / "outline_teacher.txt"
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--teacher-template {path}: cannot be read") from None
    # Keyed by content, so that a longer source or another limit asks about the same rows again, answered from the cache.
    stories = ((text_key(f"{args.seed} {row['story']}"), i, row) for i, row in store.rows() if row["story"])
    chosen = heapq.nsmallest(args.teacher_sample, stories, key=lambda item: item[:2])
    teacher = Teacher(args.teacher_url, args.teacher_model, template, args.teacher_cache, args.teacher_concurrency)
    with tqdm(total=len(chosen), desc="asking the teacher", unit=" rows", disable=None) as bar:
        outlines, counts = ask([row for _, _, row in chosen], teacher, bar.update)
    answered = [(i, row, outline) for (_, i, row), outline in zip(chosen, outlines, strict=True) if outline]
    store.outlines |= {i: outline for i, _, outline in answered}
    kept = Counter(row["split"] for _, row, _ in answered)
    from_cache = counts.pop("from_cache", 0)
    dropped = {reason: {"unknown": count} for reason, count in counts.items()}
    return {"read": len(chosen), "kept": dict(kept), "dropped": dropped, "from_cache": from_cache}


def calibrated(rows: list[dict], encoder: Encoder, idf: Idf, seed: int, stories: list[str], earlier: Path) -> Calibration:
    """The calibration on human rows; the earlier one is reused if it was made from the same inputs by the same code."""
    key = inputs_key(rows, encoder, idf, seed, stories)
    try:
        calibration = Calibration.load(earlier)
    except InputError:
        calibration = None
    if calibration is None or calibration.inputs != key:
        print(f"calibrating on {len(rows)} rows and {len(stories)} more stories", flush=True)
        calibration = calibrate(rows, encoder, idf, seed, stories)
    else:
        print("calibration: as before, rows, encoder and code are the same")
    print(f"calibration, with 95% bands: {calibration.summary()}")
    return calibration


def report(manifest: dict, out: Path) -> None:
    for origin, counts in manifest["counts"].items():
        dropped = {reason: sum(by_split.values()) for reason, by_split in counts["dropped"].items()}
        print(f"{origin}: read {counts['read']}, kept {sum(counts['kept'].values())}, dropped {dropped}")
    for name, by_split in manifest["rows"].items():
        print(f"{name}.parquet: " + ", ".join(f"{split} {count}" for split, count in by_split.items()))
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main, Args)
