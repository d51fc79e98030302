"""Several processes as one via accelerate, started by `torchrun` or `accelerate launch`; a plain start is a group of one."""

import atexit
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

from storygen.cli import InputError


def join(device: str) -> tuple[PartialState, str]:
    """This process's place among all, and its device. All but the first, the chief, print nothing from here on."""
    # Without a GPU, accelerate takes torchrun's processes for a single one unless `cpu` is given.
    state = PartialState(cpu=device == "cpu")
    # gloo's threads still release Python objects after the last exchange: while the interpreter shuts down, that aborts.
    atexit.register(state.destroy_process_group)
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open as long as the process
    return state, str(state.device) if state.num_processes > 1 else device


def share(count: int) -> range:
    """This process's share of `count` things: contiguous, as even as possible, earlier processes taking one more."""
    state = PartialState()
    each, more = divmod(count, state.num_processes)
    start = state.process_index * each + min(state.process_index, more)
    return range(start, start + each + (state.process_index < more))


def deal(items: list) -> list:
    """This process's items, dealt out one by one: neighbours, which have similar cost, go to different processes."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def gather(items: list) -> list:
    """The processes' lists, concatenated, in every process."""
    return gather_object(items)


def same(value: object) -> bool:
    """Whether every process has this value."""
    return len(set(gather([value]))) == 1


def check_shared(step: int | None, checkpoints: Path) -> None:
    """Raises `InputError`, in all processes, unless each has found the checkpoint of the same step, or none."""
    if not same(step):
        raise InputError(
            f"not every process finds the same checkpoint in {checkpoints}: all machines have to share the disk of --out"
        )


def add(*values: float) -> list[float]:
    """Each value summed over the processes, in every process."""
    state = PartialState()
    if state.num_processes == 1:
        return list(values)
    return reduce(torch.tensor(values, dtype=torch.float64, device=state.device), "sum").tolist()


def add_gradients(model: torch.nn.Module) -> None:
    """Replace every gradient by its sum over the processes: each has divided its loss by the token count of all.

    Called by every process, with or without a backward pass of its own. DistributedDataParallel would average instead, and
    at every micro-batch.
    """
    if PartialState().num_processes == 1:
        return
    for parameter in model.parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = reduce(own, "sum")
