"""How much faster are two processes than one? RL and fine-tuning under torchrun on this machine's CPU, one thread each.

    python benchmarks/scaling.py --data artifacts/data --model artifacts/zeroshot [--processes 1 2] [--quick]

The same run, with the same seed, with 1 process and with several; every process has one thread, so that the ratio shows what
sharing the work is worth, apart from how well one process uses many threads. Medians over the steps after the first.
Sampling and the update end when the slowest process is done: the wait for it counts towards the phase that follows.

speedup        in seconds per step (RL) or tokens/s (fine-tuning): several processes over one
gradients      seconds to sum the gradients of this model, and of one of GPT-2's size, over the processes (gloo)
same_stories   share of the first step's stories that several processes wrote word for word as one did: they draw with the
               same random numbers, but batches of other sizes round differently, and a draw at a boundary sends a story
               another way
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
PHASES = ("sample_s", "reward_s", "update_s", "step_s")


@dataclass
class Args:
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    model: Path = Path("artifacts/zeroshot")
    """Model folder made by pattern_learning.py."""
    processes: tuple[int, ...] = (1, 2)
    """How many to compare; the first is the baseline for the others."""
    steps: int = 5
    prompts: int = 12
    k: int = 8
    quick: bool = False
    """RL only, 2 steps of 4 prompts x 2 samples of up to 60 tokens."""


def launch(processes: int, *command: object) -> str:
    """What the first process prints."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, command)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def measure(processes: int, home: Path, args: Args) -> dict[str, float]:
    """Medians over the steps after the first."""
    few = ["--max-new-tokens", 60] if args.quick else []
    common = ["--data", args.data.resolve(), "--model", args.model.resolve(), "--device", "cpu", "--steps", args.steps]
    common += ["--track", "none"]
    launch(processes, ROOT / "rl_train.py", *common, "--out", home / f"rl_{processes}", "--prompts", args.prompts,
           "--k", args.k, "--eval-prompts", max(args.processes), *few)  # fmt: skip
    rl = [row for row in rows_of(home / f"rl_{processes}" / "metrics.jsonl") if row["step"] > 1]
    found = {name: statistics.median(row[f"time/{name}"] for row in rl) for name in PHASES}
    if args.quick:
        return found
    launch(processes, ROOT / "pattern_learning.py", *common, "--mode", "zeroshot", "--out", home / f"sft_{processes}",
           "--eval-prompts", max(args.processes))  # fmt: skip
    sft = rows_of(home / f"sft_{processes}" / "metrics.jsonl")[1:]
    return found | {"sft_tokens_per_second": statistics.median(row["tokens_per_second"] for row in sft)}


def gradients() -> None:
    """Run by each process: print the median seconds to sum all gradients, for a given number of values."""
    from storygen.processes import add_gradients, join

    join("cpu")
    for millions in (7, 124):
        parameters = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(1_000_000)) for _ in range(millions))
        times = []
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            clock = time.perf_counter()
            add_gradients(parameters)
            times.append(time.perf_counter() - clock)
        print(statistics.median(times))


def main(args: Args) -> None:
    if args.quick:
        args.steps, args.prompts, args.k = 2, 4, 2
    one, *several = args.processes
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        figures = {n: measure(n, home, args) for n in args.processes}
        for n in several:
            told = {
                m: [row["story"] for row in rows_of(home / f"rl_{m}" / "samples.jsonl") if row["step"] == 1]
                for m in (one, n)
            }
            figures[n] |= {
                "same_stories": statistics.fmean(a == b for a, b in zip(told[one], told[n], strict=True)),
                "rl_speedup": figures[one]["step_s"] / figures[n]["step_s"],
            }
            if args.quick:
                continue
            small, large = (float(line) for line in launch(n, __file__, "gradients").split())
            figures[n] |= {
                "gradients_7m_s": small,
                "gradients_124m_s": large,
                "sft_speedup": figures[n]["sft_tokens_per_second"] / figures[one]["sft_tokens_per_second"],
            }
    for n, row in figures.items():
        print(f"{n} processes: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()))
    print(json.dumps({"bench": "scaling", **{str(n): row for n, row in figures.items()}}))


if __name__ == "__main__":
    if sys.argv[1:] == ["gradients"]:
        gradients()
    else:
        main(tyro.cli(Args))
