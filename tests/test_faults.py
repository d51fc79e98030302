"""Every write of a checkpoint fails in turn: the last good state is never lost."""

import errno
import os
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from storygen import checkpoint
from storygen.checkpoint import checkpoints, load_state, save_model, save_state
from storygen.cli import write_atomically
from tests.conftest import tiny_gpt2

WRITES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


class Faults:
    """Raises an OSError at the n-th write below a folder, which Python's audit events announce before it happens."""

    def __init__(self):
        self.folder, self.left, self.error, self.seen = "", None, 0, 0
        sys.addaudithook(self)  # permanently: a hook cannot be removed

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.left is None or event not in WRITES or self.folder not in str(arguments[0]):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR) or os.path.isdir(arguments[0])):
            return
        self.seen += 1
        if self.seen == self.left:
            raise OSError(self.error, os.strerror(self.error), str(arguments[0]))

    @contextmanager
    def at(self, folder, number: int, error: int):
        self.folder, self.left, self.error, self.seen = str(folder), number, error, 0
        try:
            yield
        finally:
            self.left = None


FAULTS = Faults()


@pytest.fixture
def trained():
    """A model and its optimizer after `steps` steps, and a fingerprint of both."""
    model, tokenizer = tiny_gpt2(context=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step() -> None:
        model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def fingerprint() -> tuple[float, float]:
        moments = sum(state["exp_avg_sq"].double().sum().item() for state in optimizer.state.values())
        return sum(p.detach().double().sum().item() for p in model.parameters()), moments

    return model, tokenizer, optimizer, step, fingerprint


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_failing_write_costs_at_most_the_checkpoint_that_was_being_written(tmp_path, trained, error):
    model, _, optimizer, step, fingerprint = trained
    prints, failed, number = {}, 0, 0
    for number in range(1, 200):
        folder = tmp_path / str(number)
        for good in (1, 2):
            step()
            prints[good] = fingerprint()
            save_state(folder, good, model, optimizer, {"length_target": 100.0 + good}, keep=1)
        step()
        prints[3] = fingerprint()
        try:
            with FAULTS.at(folder, number, error):
                save_state(folder, 3, model, optimizer, {"length_target": 103.0}, keep=1)
        except OSError as told:
            assert told.errno == error
            failed += 1
        state = load_state(folder, model, optimizer)
        assert state["step"] in (2, 3) and state["length_target"] == 100 + state["step"]
        assert fingerprint() == prints[state["step"]]
        save_state(folder, 4, model, optimizer, {"length_target": 104.0}, keep=1)  # and the run goes on
        assert load_state(folder, model, optimizer)["step"] == 4 and len(checkpoints(folder)) == 1
        if FAULTS.seen < number:
            break
    assert 8 < failed < 199 and number < 199


@pytest.mark.parametrize("short", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("told", [True, False])
def test_a_short_write_is_told_or_found_when_it_is_read(tmp_path, trained, monkeypatch, short, told):
    """A file that ends early: with an error, or silently and after its checksum was taken."""
    model, _, optimizer, step, fingerprint = trained
    step()
    save_state(tmp_path, 1, model, optimizer, {}, keep=2)
    before = fingerprint()
    step()

    def cut(tensors, path):
        save_file(tensors, path)
        if told and path.name == "optimizer.safetensors":
            os.truncate(path, int(path.stat().st_size * short))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", cut)
    if told:
        with pytest.raises(OSError):
            save_state(tmp_path, 2, model, optimizer, {}, keep=2)
    else:
        save_state(tmp_path, 2, model, optimizer, {}, keep=2)
        torn = tmp_path / "step_000002/optimizer.safetensors"
        os.truncate(torn, int(torn.stat().st_size * short))
    assert load_state(tmp_path, model, optimizer)["step"] == 1 and fingerprint() == before


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_a_model_folder_is_the_old_one_or_the_new_one(tmp_path, trained, error):
    model, tokenizer, _, step, fingerprint = trained
    for number in range(1, 60):
        folder = tmp_path / str(number) / "final"
        save_model(model, tokenizer, folder)
        old = fingerprint()[0]
        step()
        try:
            with FAULTS.at(folder.parent, number, error):
                save_model(model, tokenizer, folder)
        except OSError:
            pass
        loaded, _ = checkpoint.load_model(folder)
        assert sum(p.detach().double().sum().item() for p in loaded.parameters()) in (old, fingerprint()[0])
        if FAULTS.seen < number:
            break
    assert number > 8


def test_a_text_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "run.json"
    for number in range(1, 20):
        write_atomically(path, "old")
        try:
            with FAULTS.at(tmp_path, number, errno.ENOSPC):
                write_atomically(path, "new")
        except OSError:
            pass
        assert path.read_text() in ("old", "new")
        if FAULTS.seen < number:
            break
    assert number > 2
