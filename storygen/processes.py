"""Several processes as one, over accelerate: `torchrun` or `accelerate launch` starts them, a plain start is a group of one."""

import atexit
import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce


def join(device: str) -> tuple[PartialState, str]:
    """This process's place among all, and the device it is to use. All but the first, the chief, print nothing from here on."""
    # accelerate takes torchrun's processes for one where there is no GPU and `cpu` is not said.
    state = PartialState(cpu=device == "cpu")
    # gloo's threads still let go of Python objects after the last exchange: in an interpreter that closes down they abort.
    atexit.register(state.destroy_process_group)
    if not state.is_main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open as long as the process
    return state, str(state.device) if state.num_processes > 1 else device


def share(count: int) -> range:
    """Which of `count` things are this process's: neighbours, as evenly as can be, the earlier processes one more."""
    with PartialState().split_between_processes(list(range(count))) as places:
        return range(places[0], places[-1] + 1) if places else range(0)


def deal(items: list) -> list:
    """This process's items where they are dealt out one by one: those of like cost, which are neighbours, go to different ones."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def gather(items: list) -> list:
    """The processes' lists, one after the other, in every process."""
    return gather_object(items)


def same(value: object) -> bool:
    """Whether every process has this value."""
    return len(set(gather([value]))) == 1


def add(*values: float) -> list[float]:
    """Each value's sum over the processes, in every process."""
    state = PartialState()
    if state.num_processes == 1:
        return list(values)
    return reduce(torch.tensor(values, dtype=torch.float64, device=state.device), "sum").tolist()


def add_gradients(model: torch.nn.Module) -> None:
    """Every gradient becomes the sum over the processes: each has divided its loss by the tokens of all.

    Called by every process, with or without a backward pass of its own. DistributedDataParallel would average, and at every
    micro-batch.
    """
    if PartialState().num_processes == 1:
        return
    for parameter in model.parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = reduce(own, "sum")
