"""Two processes sample and learn the same as one. Run by torchrun, this file is each of the two."""

import copy
import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from rl_train import Args, learn
from storygen.cli import InputError, run
from storygen.processes import add, gather, join, same, share
from storygen.rollout import rollout
from tests.conftest import ROOT, tiny_gpt2

PROMPTS = ["A dog.", "A lamp that was lit every night.", "Rain."]
ADVANTAGES = torch.tensor([[1.0, -0.5], [0.2, -1.5], [0.7, 0.0]])
ARGS = Args(prompts=3, k=2, lr=0.1, warmup=1, minibatches=2, micro_tokens=150, max_grad_norm=1e9, kl_stop=1e9)


def learnt() -> tuple[torch.Tensor, dict[str, float], list[list[int]]]:
    """Weights after two minibatches of plain gradient descent, metrics, and all rows that were sampled."""
    from storygen.pattern import Pattern

    model, tokenizer = tiny_gpt2()
    policy, mine = copy.deepcopy(model), share(len(PROMPTS))
    optimizer, law = torch.optim.SGD(policy.parameters(), lr=1.0), {"temperature": 1.0, "dtype": torch.float32}
    batch = rollout(
        policy, Pattern(tokenizer), [PROMPTS[i] for i in mine], 2, seed=3, first=mine.start, max_new_tokens=40, **law
    )
    own = ADVANTAGES[mine.start : mine.stop]
    stats = learn(policy, model, optimizer, batch, own, mine, 0.1, 1, ARGS, Pattern(tokenizer), torch.float32)
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), stats, gather(batch.rows)


@pytest.mark.parametrize("processes", [2, 3])
def test_samples_gradient_and_metrics_are_those_of_one_process(tmp_path, processes):
    """Two minibatches of three prompts: in one of them, one process has nothing to do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), __file__, str(tmp_path)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    weights, stats, rows = learnt()
    for rank in range(processes):
        theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert theirs["rows"] == rows and theirs["sum"] == [sum(range(processes)), processes]
        assert (theirs["weights"] - weights).abs().max() < 1e-5
        assert theirs["stats"] == pytest.approx(stats, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 64])
def test_shares_cover_everything_once_and_differ_by_one_at_most(monkeypatch, count, processes):
    shares = []
    for rank in range(processes):
        place = SimpleNamespace(process_index=rank, num_processes=processes)
        monkeypatch.setattr("storygen.processes.PartialState", lambda place=place: place)
        shares.append(share(count))
    assert [i for mine in shares for i in mine] == list(range(count))
    sizes = [len(mine) for mine in shares]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@dataclass
class NoFlags:
    pass


@pytest.mark.parametrize("alone, says", [(True, "error: process 1: no memory left\n"), (False, "")])
def test_what_one_process_alone_has_met_it_tells_itself(monkeypatch, capsys, alone, says):
    def failing(_):
        raise InputError("no memory left", one_process=alone)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["rl_train.py"])
    with pytest.raises(SystemExit) as stop:
        run(failing, NoFlags)
    assert stop.value.code == 2 and capsys.readouterr().err == says


def main(folder: str) -> None:
    state, _ = join("cpu")
    weights, stats, rows = learnt()
    facts = {"weights": weights, "stats": stats, "rows": rows, "sum": add(state.process_index, 1)}
    assert same("step 4") and not same(state.process_index)
    torch.save(facts, f"{folder}/{state.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
