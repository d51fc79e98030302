"""Rows: where they come from, which split they fall in, and how later scripts read the prepared data."""

import csv
import gzip
import hashlib
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from storygen.cli import InputError

Item = TypeVar("Item")
CORPUS = Path(__file__).resolve().parents[1] / "corpus"
ROLES = {"prompt": ("prompt",), "think": ("think", "outline", "plan"), "story": ("story", "completion", "text")}
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet", ".wp_source", ".txt")
SPLITS = ("train", "validation", "test")


def split_of(prompt: str) -> str:
    """Split by content: "test", "validation" or "train" (1/10, 1/10, 8/10). A row keeps its split wherever it is read."""
    bucket = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


@dataclass(frozen=True)
class Columns:
    """Names of a dataset's columns; None finds one by its role (prompt; think, outline or plan; story, completion or text).

    flags: what the command line puts before "prompt-column", for messages.
    """

    prompt: str | None = None
    think: str | None = None
    story: str | None = None
    flags: str = ""

    def find(self, names: Iterable[Any], where: str) -> dict[str, str]:
        """{role: column} for the columns that are there. InputError if the prompt column or a named one is missing."""
        names = [name for name in names if isinstance(name, str)]
        by_lower = {name.strip().lower(): name for name in reversed(names)}
        found = {}
        for role, candidates in ROLES.items():
            wanted = getattr(self, role)
            if wanted is not None and wanted not in names:
                raise InputError(f"{where}: no column {wanted!r}, there are: {_listed(names)}")
            column = wanted or next((by_lower[name] for name in candidates if name in by_lower), None)
            if column is not None:
                found[role] = column
        if "prompt" not in found:
            raise InputError(
                f"{where}: no prompt column (name one with --{self.flags}prompt-column), there are: {_listed(names)}"
            )
        return found


def read_rows(source: str | Path, columns: Columns = Columns(), dropped: Counter | None = None) -> Iterator[dict]:
    """Stream rows {"prompt", "think", "story"} from a file, a folder of files, or "corpus" (the embedded one).

    Files: jsonl (also .gz), csv, parquet, a `.wp_source`/`.wp_target` pair (either name, or the prefix before the dot), txt
    (one prompt per line). A role without a column is None. Rows with a value that is not text are counted in
    `dropped["wrong_type"]`. InputError names file and line of what cannot be read.
    """
    dropped = Counter() if dropped is None else dropped
    for path in _files(CORPUS if str(source) == "corpus" else Path(source)):
        names, found = None, {}
        for where, record in _records(path):
            if record.keys() != names:
                names, found = record.keys(), columns.find(record, where)
            yield from _typed(record, found, dropped)
        if names is None:
            raise InputError(f"{path}: holds no rows")


def read_hub(
    name: str, revision: str, flag: str, columns: Columns = Columns(), dropped: Counter | None = None
) -> tuple[str, Iterator[dict]]:
    """(commit that `revision` points at, stream of rows of all splits) of a Hugging Face dataset.

    The commit is pinned before the first row, so the manifest can say what was read. `flag` ("--source") is what the
    InputError for an unreachable hub tells the user to set.
    """
    import datasets
    from huggingface_hub import HfApi

    def unreachable(error: Exception) -> InputError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        return InputError(
            f"cannot read {name} ({revision}) from the Hugging Face hub ({reason}); "
            f"offline, use `{flag} PATH` for a local copy or `--preset demo`"
        )

    dropped = Counter() if dropped is None else dropped
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our own error says it in one line
    try:
        commit = HfApi().dataset_info(name, revision=revision, timeout=20).sha or revision
        splits = datasets.load_dataset(name, revision=commit, streaming=True)
    # The client libraries raise some twenty unrelated types (network, login, missing, offline mode), here and while reading.
    except Exception as error:  # noqa: BLE001
        raise unreachable(error) from None

    def rows() -> Iterator[dict]:
        for split, records in splits.items():
            stream, found = iter(records), {}
            while True:
                try:
                    record = next(stream, None)
                except Exception as error:  # noqa: BLE001
                    raise unreachable(error) from None
                if record is None:
                    break
                found = found or columns.find(record, f"{name}, {split}")
                yield from _typed(record, found, dropped)

    return commit, rows()


def load_manifest(data_dir: Path | str) -> dict:
    """The manifest of a data folder. InputError if the folder was not made by data_prep.py."""
    path = Path(data_dir) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: run `python data_prep.py --out {data_dir}` first") from None
    except (OSError, ValueError):
        raise InputError(f"{path} cannot be read: run `python data_prep.py --out {data_dir}` again") from None
    if not isinstance(manifest, dict) or manifest.get("preset") not in ("demo", "gpt2") or "hashes" not in manifest:
        raise InputError(f"{path} is not a manifest: run `python data_prep.py --out {data_dir}` again")
    return manifest


def load_sft(data_dir: Path | str, split: str) -> list[dict]:
    """Rows {prompt, think, story} of one split, in file order. InputError as for `load_manifest`."""
    return _load(data_dir, "sft.parquet", ["prompt", "think", "story"], split)


def load_prompts(data_dir: Path | str, split: str) -> list[str]:
    """Unique prompts of one split, in file order. InputError as for `load_manifest`."""
    return [row["prompt"] for row in _load(data_dir, "prompts.parquet", ["prompt"], split)]


def spread(rows: Sequence[Item], n: int) -> list[Item]:
    """`n` evenly spaced rows, in order; all if there are fewer. Not the first n: a file's first rows are of one kind."""
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def _load(data_dir: Path | str, name: str, columns: list[str], split: str) -> list[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(data_dir) / name
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}, there are: {', '.join(SPLITS)}")
    if not path.is_file():
        raise InputError(f"{path} is missing: run `python data_prep.py --out {data_dir}` first")
    try:
        table = pq.ParquetFile(path).read(columns=None)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read ({reason}): run `python data_prep.py --out {data_dir}` again") from None
    missing = [name for name in ("split", *columns) if name not in table.column_names]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}: run `python data_prep.py --out {data_dir}` again")
    return [{c: row[c] for c in columns} for row in table.to_pylist() if row["split"] == split]


def _typed(record: dict, found: dict[str, str], dropped: Counter) -> Iterator[dict]:
    """The record as a row, or nothing and a count in `dropped` if its prompt or story is not text. No outline is no fault."""
    row = {role: record[found[role]] if role in found else None for role in ROLES}
    if not isinstance(row["think"], str):
        row["think"] = None
    if all(isinstance(row[role], str) for role in found if role != "think"):
        yield row
    else:
        dropped["wrong_type"] += 1


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"


def _files(path: Path) -> list[Path]:
    """The files to read for `path`: itself, a pair's source side, or everything known in a folder, in name order.

    Prompt-only files come last, so that a run over the first rows (--limit) has stories.
    """
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES) and not p.name.startswith(".")]
        found.sort(key=lambda p: (p.suffix == ".txt", p))
        if not found:
            raise InputError(f"{path}: no file that ends in {', '.join(SUFFIXES)}")
        return found
    if path.suffix == ".wp_target" or not path.exists():
        pair = path.with_suffix(".wp_source") if path.suffix == ".wp_target" else path.with_name(path.name + ".wp_source")
        if pair.is_file():
            return [pair]
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: unknown format, give one of {', '.join(SUFFIXES)} or a folder of them")
    return [path]


def _records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) of each row of one file; `where` is "file, line n" or "file, row n" for messages."""
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
    elif path.suffix == ".csv":
        yield from _csv_records(path)
    elif path.suffix == ".wp_source":
        target = path.with_suffix(".wp_target")
        if not target.is_file():
            raise InputError(f"{target}: the stories that belong to {path.name} are missing")
        prompts, stories = _lines(path), _lines(target)
        for number, prompt in prompts:
            story = next(stories, None)
            if story is None:
                raise InputError(f"{target}: has {number - 1} lines, {path.name} has more")
            yield f"{path}, line {number}", {"prompt": prompt, "story": story[1]}
        if next(stories, None) is not None:
            raise InputError(f"{target}: has more lines than {path.name}")
    elif path.suffix == ".txt":
        for number, line in _lines(path):
            if line.strip():
                yield f"{path}, line {number}", {"prompt": line}
    else:
        for number, line in _lines(path):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{where}: not valid JSON") from None
            if not isinstance(record, dict):
                raise InputError(f"{where}: not a JSON object")
            yield where, record


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines. Split on newlines alone: a story may hold U+2028 and the like."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise InputError(f"{path}, line {number}: not UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}, after line {number}: cannot be read ({error})") from None


def _csv_records(path: Path) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Strict: otherwise a stray quote would swallow every row up to the next one.
    reader = csv.DictReader((line + "\n" for _, line in _lines(path)), strict=True)
    try:
        for record in reader:
            yield f"{path}, line {reader.line_num}", record
    except csv.Error as error:
        raise InputError(f"{path}, the row from line {reader.line_num + 1}: not valid CSV ({error})") from None


def _parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}, after row {number}: cannot be read ({str(error).splitlines()[0]})") from None
