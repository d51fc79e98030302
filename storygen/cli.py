"""The command line of every script: a dataclass read by tyro, bad input reported in one line with exit code 2."""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any


class InputError(Exception):
    """User input that cannot be used. The message is one line: what is wrong, where, and what to do.

    one_process: of several processes perhaps only this one has hit the error, so it must report it whatever its rank.
    """

    def __init__(self, message: str, one_process: bool = False) -> None:
        super().__init__(message)
        self.one_process = one_process


# The errors of a refused write.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


def disk_error(error: Exception) -> str | None:
    """What the disk refused, in one line; None for other errors. Those from Rust and Arrow hold only the message."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return os.strerror(error.errno) + (f", {error.filename}" if error.filename else "")
    found = (os.strerror(code) for code in DISK_ERRORS if os.strerror(code).lower() in str(error).lower())
    return next(found, None)


def lost_process(error: Exception) -> bool:
    """Whether a run of several processes cannot go on because one has ended. gloo's errors have no type of their own."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and (
        type(error).__name__.startswith("Dist") or "gloo" in str(error) or "Connection closed by peer" in str(error)
    )


def run(main: Callable[[Any], None], args_type: Any) -> None:
    """Parse the command line into `args_type`, call `main`, and turn an `InputError` into one line and exit code 2."""
    import huggingface_hub.utils.logging as hub_logging
    import tyro
    from transformers.utils import logging

    # Our own errors say in one line what these libraries would log about our inputs; their bars would clash with ours.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        main(tyro.cli(args_type, config=(tyro.conf.AvoidSubcommands,)))
    except InputError as error:
        rank = os.environ.get("RANK", "0")  # torchrun's variable for the process number
        if rank == "0" or error.one_process:
            print(f"error: {f'process {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; nothing half-written was left behind", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (a pager, `head`) has exited; Python would complain again while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if lost_process(error):
            say, code = "another process of this run has ended; start it again, rl_train.py with --resume, to go on", 1
        elif refused := disk_error(error):
            say, code = f"cannot write ({refused}): make room or allow it, or give another --out; what was whole still is", 2
        else:
            raise
        print(f"error: {say}", file=sys.stderr)
        sys.exit(code)


def as_json(value: Any) -> Any:
    """Dataclasses, paths and tuples as values that `json.dumps` accepts."""
    return json.loads(json.dumps(asdict(value) if is_dataclass(value) else value, default=str))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, even after a crash, sees the old content or the new, nothing in between."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"cannot write {path}: a folder of that path is a file") from None
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def put_in_place(aside: Path, target: Path) -> None:
    """Replace a folder with a finished one: a reader finds the old one, the new one, or for an instant none.

    The new files are flushed to disk first. If the folder cannot be moved into place, the old one stays.
    """
    for path in (*aside.rglob("*"), aside):
        flush(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(aside, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(out: Path, *own: str) -> None:
    """Raises `InputError` if an output folder is to be made where a file is, or where a folder holds none of the files `own`.

    A folder of another kind has files of the same names (metrics.jsonl, samples.jsonl, report.html), which would be lost.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give another --out, a folder")
    if (
        own
        and out.is_dir()
        and any(out.iterdir())
        and not any(one.name.removesuffix(".tmp") in own for one in out.iterdir())
    ):
        raise InputError(f"--out {out} holds something else than this script writes: give a new or empty folder")


def claim(out: Path) -> IO[str]:
    """Keep every other process from writing to an output folder for as long as the returned file stays open.

    The lock file is next to the folder, which may be replaced as a whole, and the kernel releases it however this process
    ends. Raises `InputError` with the holder's process id, or if `out` is a file.
    """
    check_folder(out)
    whole = out.absolute()  # "." has no name to build the lock's from
    whole.parent.mkdir(parents=True, exist_ok=True)
    file = open(whole.with_name(f".{whole.name}.lock"), "a+", encoding="ascii")  # noqa: SIM115  open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        raise InputError(f"{out} is being written by process {holder}: wait for it, or give another --out") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def fill(args: Any, recipe: Any) -> None:
    """Set every field of `args` that the user left at None to the value in the preset's recipe."""
    for name, value in vars(recipe).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_flags(args: Any, at_least: dict[str, float], above_zero: tuple[str, ...] = ()) -> None:
    """Raises `InputError` for the first of these flags that is too small, infinite or NaN; None is accepted."""
    bounds = [(name, "at least", bound) for name, bound in at_least.items()] + [(name, "above", 0) for name in above_zero]
    for name, relation, bound in bounds:
        value = getattr(args, name)
        finite = isinstance(value, int) or (
            value is not None and math.isfinite(value)
        )  # an int may be too large for a float
        if value is None or (finite and (value > bound or (relation == "at least" and value == bound))):
            continue
        shown = str(value)[:40] if isinstance(value, int) else f"{value:g}"
        raise InputError(f"--{name.replace('_', '-')} must be {relation} {bound:g}, not {shown}")


def pick_device(device: str) -> str:
    """Resolve "auto": the GPU if there is one. Raises `InputError` for an unknown name, or a GPU that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not (number or "0").isdecimal()):
        raise InputError(f"--device {device}: it is auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no GPU is visible here; use --device cpu")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: {torch.cuda.device_count()} GPUs are visible here, counted from 0")
    return device
