"""Models and training states on disk: written whole or not at all, verified when read."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation

from storygen.attention import PLAIN
from storygen.batching import context_length
from storygen.cli import InputError, file_sha256, put_in_place

# On a CPU with bf16 multiplication, plain products are 1.6 to 4 times faster than its fused attention, forward and backward.
# They keep (heads, length, length) weights per row, which would not fit for a longer context.
PLAIN_ATTENTION = 1024


def load_model(
    source: str | Path,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    flag: str = "--model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal model in fp32, in evaluation mode, and its tokenizer, from a folder or the hub (there at `revision`).

    dtype: of the computation to come, which decides the attention implementation; the weights are fp32 in any case. flag:
    what named the source on the command line. Raises `InputError` if there is no model, if it cannot be read, or if model
    and tokenizer do not belong together.
    """
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json: it is no model folder")
    if not folder.exists() and (str(source).startswith(("/", ".", "artifacts")) or str(source).count("/") > 1):
        raise InputError(f"{folder} does not exist: run the stage that makes it, or give another {flag}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        # Weights as safetensors only: a stranger's pickle can run code.
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # noqa: BLE001  transformers, safetensors, tokenizers and the hub client each raise their own
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load a model from {source} ({reason}): for {flag} give a folder on this machine") from None
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise InputError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the model {model.get_input_embeddings().weight.shape[0]} "
            "embedding rows: this checkpoint belongs to another tokenizer"
        )
    for module in model.modules():
        # The same function (Hendrycks & Gimpel, arXiv 1606.08415) in one pass over memory, where GPT-2's takes eight.
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = torch.nn.GELU(approximate="tanh")
    on_cpu, short = torch.device(device).type == "cpu", context_length(model) <= PLAIN_ATTENTION
    if on_cpu and dtype == torch.bfloat16 and short and isinstance(model, GPT2LMHeadModel):
        model.set_attn_implementation(PLAIN)
    return model.to(device).eval(), tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face model folder, replaced as a whole."""
    with _whole_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling folder that takes the target's place if the block succeeds, and leaves no trace otherwise."""
    aside = target.with_name(target.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        put_in_place(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def save_state(
    folder: Path, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict, keep: int = 2
) -> None:
    """Write `folder/step_000200`: weights and optimizer moments as safetensors, `state` as JSON, and a sha256 of each.

    Once it is in place, all checkpoints but the newest `keep` are deleted, and any of a later step: a run that is behind one
    has found it damaged, and it must not outlive the good ones.
    """
    with _whole_folder(folder / f"step_{step:06d}") as aside:
        save_file({k: v.contiguous() for k, v in _own_parameters(model).items()}, aside / "model.safetensors")
        save_file(_moments(model, optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps({**state, "step": step}))
        sums = {file.name: file_sha256(file) for file in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps({"sha256": sums}, indent=1))
    kept = [path for path in checkpoints(folder) if _step_of(path) <= step][-keep:]
    for old in checkpoints(folder):
        if old not in kept:
            shutil.rmtree(old)


def load_state(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict | None:
    """Load the newest intact checkpoint into model and optimizer and return its `state`; None if there is none.

    A torn or altered checkpoint is reported on stderr and the one before it is used. Raises `InputError` if there are some
    and none can be read, or if they belong to another model.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            weights, moments, state = _read(path)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            print(f"warning: checkpoint {path} is damaged ({error}); trying the one before", file=sys.stderr)
            continue
        with torch.no_grad():
            for name, parameter in _own_parameters(model).items():
                if name not in weights or weights[name].shape != parameter.shape:
                    raise InputError(f"{path} belongs to another model ({name} differs): give another --out")
                parameter.copy_(weights[name])
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = names[parameter] + ":"
                own = {k.removeprefix(prefix): v for k, v in moments.items() if k.startswith(prefix)}
                # AdamW keeps its step count on the CPU unless it is fused or capturable; its own loader knows where.
                if own:
                    optimizer.state[parameter] = {
                        k: v.to(parameter.device) if k != "step" or group.get("fused") else v for k, v in own.items()
                    }
        return state
    if found:
        raise InputError(
            f"{folder} holds {len(found)} checkpoint{'s' if len(found) > 1 else ''} and none can be read: give another --out, or "
            "delete that folder to start from the beginning",
            one_process=True,
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name)]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Weights, moments and state of a checkpoint, none of which is parsed before its checksum is verified.

    Raises ValueError for a wrong checksum, else whatever reading a missing or malformed file raises.
    """
    sums = json.loads((path / "manifest.json").read_text())["sha256"]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        if file_sha256(path / name) != sums[name]:
            raise ValueError(f"{name} does not match its checksum")
    state = json.loads((path / "state.json").read_text())
    if not isinstance(state, dict):
        raise TypeError("state.json is no state")
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), state


def _own_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters by name, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _moments(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


class Stopped(Exception):
    """A stop was requested at a point where nothing is lost by it."""


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request to stop at the next safe point; a second Ctrl-C exits at once.

    `stop` holds the exit code to use (130 or 143), or None if no stop was requested.
    """

    def __init__(self):
        self.stop: int | None = None
        self._raises = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame) -> None:
        if self.stop is not None and number == signal.SIGINT:
            os._exit(130)  # files are written aside and then renamed, so nothing is torn
        self.stop = 128 + number
        if self._raises:
            raise Stopped
        print("\nstopping as soon as this step is done; Ctrl-C again leaves at once", file=sys.stderr)

    def wait(self) -> None:
        """State changes from here to the end of the `at_once` block: a request to stop waits for the next safe point."""
        self._raises = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that changes nothing and can be redone: a request to stop raises `Stopped` in the middle of it."""
        self._raises = True
        try:
            if self.stop is not None:
                raise Stopped
            yield
        finally:
            self._raises = False
