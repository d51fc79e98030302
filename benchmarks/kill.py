"""Is anything lost when a run is killed? SIGKILL at random moments of RL must lead to the same bytes.

    python benchmarks/kill.py --data artifacts/data --model artifacts/zeroshot [--kills 50] [--quick]

A short RL run is made once without interruption. Then runs with the same settings are killed at random moments, in each
phase in turn (sampling, reward, update, evaluation, checkpoint), and restarted with --resume until they finish. A finished
run must have the same weights, metrics (except times) and samples as the one that was never killed, byte for byte, and must
have started each time from the newest checkpoint that existed. Every start is a fork of this process, which has loaded the
libraries and nothing else.

kills         processes killed, in total and (table) by phase
differences   finished runs whose weights, metrics or samples differ from the reference's, plus starts that lost a whole
              checkpoint
"""

import contextlib
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root's reward.py, not benchmarks/reward.py
import rl_train
from reward import Reward
from storygen.checkpoint import checkpoints
from storygen.corpus import spread

PHASES = ("sampling", "reward", "update", "evaluation", "checkpoint")
LONGEST = {"sampling": 1.0, "reward": 0.3, "update": 1.0, "evaluation": 1.0, "checkpoint": 0.1}  # longest delay, seconds


@dataclass
class Args:
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    model: str = "artifacts/zeroshot"
    """Model folder made by pattern_learning.py."""
    kills: int = 50
    """Processes to kill, at minimum."""
    steps: int = 4
    """Steps per run."""
    new_tokens: int = 200
    """Longest response."""
    seed: int = 0
    """Draws the moments of the kills."""
    quick: bool = False
    """2 kills of runs of 2 steps, responses of at most 60 tokens."""


class Told:
    """The phase a child is in: a byte that it writes and its parent reads."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 1)

    def phase(self) -> str | None:
        return ([None, *PHASES])[self.memory[0]]

    def wrap(self, phase: str, function: Callable) -> Callable:
        """The function, reporting its phase while it runs (sampling and scoring in an evaluation count as evaluation)."""

        def told(*args, **kwargs):
            before = self.memory[0]
            if before != PHASES.index("evaluation") + 1:
                self.memory[0] = PHASES.index(phase) + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.memory[0] = before

        return told


def start(settings: rl_train.Args, told: Told) -> int:
    """Start a child process that makes or continues the run; returns its pid."""
    told.memory[0] = 0
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        held_out = spread(rl_train.load_prompts(settings.data, "validation"), settings.eval_prompts)
        plain = rl_train.rollout

        def rollout(model, pattern, prompts, *args, **kwargs):
            phase = "evaluation" if prompts == held_out else "sampling"
            return told.wrap(phase, plain)(model, pattern, prompts, *args, **kwargs)

        rl_train.rollout = rollout
        human = rl_train.load_sft
        rl_train.load_sft = lambda *where: human(*where)[:8]  # scored at the start of every run: not what is killed here
        Reward.__call__ = told.wrap("reward", Reward.__call__)
        rl_train.learn = told.wrap("update", rl_train.learn)
        rl_train.save_state = told.wrap("checkpoint", rl_train.save_state)
        rl_train.main(replace(settings))
        code = 0
    os._exit(code)


def kill_in(pid: int, phase: str, told: Told, skip: int, delay: float) -> bool:
    """Kill the child `delay` seconds after it enters `phase` for the (skip + 1)th time; False if it ended first."""
    inside, entered = False, 0
    while True:
        done, _ = os.waitpid(pid, os.WNOHANG)
        if done:
            return False
        now = told.phase() == phase
        if now and not inside:
            entered += 1
            if entered > skip:
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                return os.WIFSIGNALED(status)
        inside = now
        time.sleep(0.0005)


def outcome(out: Path) -> dict[str, object]:
    """What a run leaves behind, except times."""

    def rows(name: str) -> list[dict]:
        lines = (out / name).read_text("utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]

    return {
        "weights": (out / "final/model.safetensors").read_bytes(),
        "metrics": rows("metrics.jsonl"),
        "samples": rows("samples.jsonl"),
    }


def main(args: Args) -> None:
    if args.quick:
        args = replace(args, kills=2, steps=2, new_tokens=60)
    torch.set_num_threads(1)  # a fork has no other threads
    rng, told, killed, differences, ended = random.Random(args.seed), Told(), Counter(), Counter(), 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.kills, unit="kill", disable=None) as bar:
        settings = rl_train.Args(
            data=args.data, model=args.model, out=Path(folder) / "reference", steps=args.steps, prompts=2, k=2, eval_every=1,
            eval_prompts=2, save_every=1, max_new_tokens=args.new_tokens, resume=True, device="cpu", show_every=10**6,
        )  # fmt: skip
        _, status = os.waitpid(start(settings, told), 0)
        if status:
            sys.exit("error: the run that nobody kills did not end well: try rl_train.py with the same --data and --model")
        expected = outcome(settings.out)
        while sum(killed.values()) < args.kills or not ended:
            run = replace(settings, out=Path(folder) / f"run_{ended}")
            while True:
                phase = PHASES[sum(killed.values()) % len(PHASES)]
                stood = [path.name for path in checkpoints(run.out / "checkpoints")]
                enough = sum(killed.values()) >= args.kills
                skip = 10**6 if enough else rng.randrange(3)
                if not kill_in(start(run, told), phase, told, skip, rng.random() * LONGEST[phase]):
                    break
                killed[phase] += 1
                bar.update()
                lost = stood and checkpoints(run.out / "checkpoints")[-1].name < stood[-1]
                differences["checkpoint lost"] += bool(lost)
            ended += 1
            try:
                found = outcome(run.out)
                for name in expected:
                    differences[name] += found[name] != expected[name]
            except (OSError, ValueError):
                differences["no outcome"] += 1
    print(f"{sum(killed.values())} kills, {ended} runs brought to their end")
    for phase in PHASES:
        print(f"  {phase:12} {killed[phase]:4}")
    for name, count in differences.items():
        print(f"  {name + ' differ' if name in expected else name:24} {count:4}")
    print(
        json.dumps({"bench": "kill", "kills": sum(killed.values()), "differences": sum(differences.values()), "runs": ended})
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
