"""A run's peak memory, and how large its batches may be to fit.

`plan` computes it from the model's shape, in bytes; `peak_memory` measures it. docs/performance.md compares the two.
"""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from tqdm import tqdm

from storygen.attention import PLAIN
from storygen.cli import InputError
from storygen.logprobs import LOGITS_CHUNK

Result = TypeVar("Result")
MARGIN = 0.9  # share of the free memory to plan for: allocators keep a little more than is asked for
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
REWARD = int(0.4e9)  # encoder, its batch of texts, chance panels


@dataclass(frozen=True)
class Shape:
    """Shape of a GPT-like model: parameters (tied ones once), vocabulary size, layers, width (of all heads, and of those
    that have keys and values of their own), heads, context."""

    parameters: int
    vocabulary: int
    layers: int
    width: int
    kv_width: int
    heads: int
    context: int

    @staticmethod
    def of(model: torch.nn.Module) -> "Shape":
        config: Any = model.config
        parameters = sum(p.numel() for p in model.parameters())
        vocabulary = model.get_output_embeddings().weight.shape[0]
        width, heads = config.hidden_size, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads  # fewer with grouped queries
        head_width = getattr(config, "head_dim", None) or width // heads
        return Shape(
            parameters, vocabulary, config.num_hidden_layers, width, head_width * kv_heads, heads,
            config.max_position_embeddings,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """rows: sampled at once; micro_tokens: per forward and backward pass; held: bytes by purpose; available: bytes."""

    rows: int
    micro_tokens: int
    held: dict[str, int]
    available: int

    @property
    def peak(self) -> int:
        """Sampling and update never hold their memory at the same time."""
        return self.held["weights and AdamW"] + self.held["reward"] + max(self.held["sampling"], self.held["update"])

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.held.items() if size)
        return (
            f"memory, GB: {self.peak / 1e9:.2f} at the peak of {self.available / 1e9:.1f} free ({parts}); "
            f"{self.rows} rows sampled at once, passes of {self.micro_tokens} tokens"
        )


def activations(shape: Shape, tokens: int, longest: int, attention: str) -> int:
    """Kept from the forward for the backward pass over `tokens` tokens, padding included, in rows of at most `longest`.

    A GPT-2 block keeps 16 vectors of the model's width per token in fp32 and not many fewer under autocast: inputs and
    outputs of two norms and of the residual sums, queries, keys and values, the attention's output, and twice the fourfold
    inner width. Attention by plain products also keeps the weights of every head, in bf16.
    """
    weights = 2 * shape.heads * longest if attention == PLAIN else 0
    return tokens * shape.layers * (64 * shape.width + weights)


def plan(
    shape: Shape, *, rl: bool, rows: int, micro_tokens: int, longest_row: int, longest_sample: int, dtype: torch.dtype, on_cpu: bool, attention: str,
    available: int,
) -> Plan:  # fmt: skip
    """For training with AdamW and sampling in between, plus a frozen reference and the reward in RL (`rl`).

    `rows` and `micro_tokens` are the preferred sizes. Both are halved until they fit, micro_tokens down to a single row of
    `longest_row` tokens. longest_row, longest_sample: the most tokens that a row of an update, and one being sampled, may
    have. Raises `InputError` if that is not enough.
    """
    half = 2 if dtype == torch.bfloat16 else 4
    fixed = {"weights and AdamW": (4 + 8 + 4 * rl) * shape.parameters, "reward": REWARD * rl}
    cell = 2 * shape.layers * shape.kv_width * (4 if on_cpu else half)  # keys and values of a token; fp32 on a CPU

    def held(rows: int, micro_tokens: int) -> Plan:
        copies = half * (shape.parameters + shape.vocabulary * shape.width)  # the sampler's weights and its own head
        sampling = copies + rows * (longest_sample * cell + 16 * shape.vocabulary)
        casts = half * shape.parameters if half == 2 else 0
        chunk = min(LOGITS_CHUNK, micro_tokens) * shape.vocabulary * (12 + half)
        # A row of more than micro_tokens has a pass of its own.
        update = (
            4 * shape.parameters + casts + chunk + activations(shape, max(micro_tokens, longest_row), longest_row, attention)
        )
        return Plan(rows, micro_tokens, fixed | {"sampling": sampling, "update": update}, available)

    plan = held(rows, micro_tokens)
    while plan.peak > MARGIN * available:
        sampling_is_larger = plan.held["sampling"] >= plan.held["update"]
        if sampling_is_larger and plan.rows > 1:
            plan = held(plan.rows // 2, plan.micro_tokens)
        elif plan.micro_tokens > longest_row:
            plan = held(plan.rows, max(longest_row, plan.micro_tokens // 2))
        elif plan.rows > 1:
            plan = held(plan.rows // 2, plan.micro_tokens)
        else:
            raise InputError(
                f"the run needs {plan.peak / 1e9:.1f} GB with one row at a time, and {available / 1e9:.1f} GB are free: "
                f"take a smaller model{' or --max-new-tokens' if rl else ''}, or stop what else uses the memory",
                one_process=True,
            )
    return plan


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning each to the system and getting it back page by page.

    Saves a tenth of an update on a CPU. No effect with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**28)


def free_memory(device: str | torch.device) -> int:
    """Bytes that this process may use on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = min([psutil.virtual_memory().available, *free_in_container()])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes on this machine


def free_in_container(cgroup: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left under a container's own limit, which the machine's figures ignore: one value, or none without a limit."""
    second = (cgroup, "memory.max", "memory.current", "inactive_file")  # version of the cgroup interface
    first = (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder, limit, used, cache in (second, first):
        try:
            most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return [max(0, most - taken + int(counts[cache]))]  # the kernel drops inactive file pages when memory is short
        except (OSError, ValueError, KeyError):  # not there, or "max": no limit
            continue
    return []


def peak_memory(device: str | torch.device = "cpu") -> float:
    """Most GB that this process has held so far: of GPU memory, by its allocator, or else of the machine's memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which a child inherits from the process that started it
        return int(status.read_text("ascii").partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS: bytes


def halve_until_it_fits(settings: Any, name: str, least: int, work: Callable[[int], Result]) -> Result:
    """`work(settings.NAME)`; if it runs out of memory, the setting is halved for good and the same work is done again.

    `least`: the size at which halving stops helping; running out of memory there raises `InputError`.
    """
    while True:
        size = getattr(settings, name)
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Outside the handler, where the error's traceback would keep the failed work's tensors alive.
        if size <= least:
            raise InputError(
                f"out of memory at --{name.replace('_', '-')} {size}, the least there is: take a smaller model",
                one_process=True,
            )
        setattr(settings, name, max(least, size // 2))
        tqdm.write(f"warning: out of memory: {name} {size} -> {getattr(settings, name)}, same work again", file=sys.stderr)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """The GPU allocator has its own error type; the CPU allocator's is recognised by its message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
