"""Log-probabilities of responses under a causal model: the one forward pass that fine-tuning and RL share."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from transformers import PreTrainedModel

from storygen.batching import pad_right
from storygen.cli import InputError

Precision = Literal["auto", "fp32", "bf16"]
LOGITS_CHUNK = 1536  # positions whose logits exist at once


def pick_dtype(precision: Precision, device: str | torch.device) -> torch.dtype:
    return best_dtype(device) if precision == "auto" else {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def best_dtype(device: str | torch.device) -> torch.dtype:
    """bf16 where the device multiplies it natively, else fp32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def autocast(device: str | torch.device, dtype: torch.dtype) -> AbstractContextManager:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def cast_once() -> torch.autocast:
    """Wraps the passes between two updates, all with gradients or all without: weights are cast in the first, not in each.

    PyTorch caches the casts of weights that require gradients until the outermost autocast context ends, whatever its device
    and even if it is disabled.
    """
    return torch.autocast("cpu", enabled=False)


class _TokenLogps(torch.autograd.Function):
    """Log-probabilities (tokens,) of `targets` under softmax(hidden @ table.T / temperature), products in `dtype`.

    The backward pass turns the softmax into the logits' gradient in place, so that of the (tokens, vocabulary) matrices, far
    larger than anything else here, at most one is kept and a second exists for a moment. keep: the forward pass saves
    its matrix for the backward pass, which otherwise recomputes the logits.
    """

    @staticmethod
    def forward(ctx, hidden, targets, table, temperature, dtype, keep):
        logps = _logits(hidden, table, temperature, dtype).log_softmax(-1)
        ctx.save_for_backward(hidden, targets, table, *([logps] if keep else []))
        ctx.temperature, ctx.dtype = temperature, dtype
        return logps.gather(-1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, grad):
        hidden, targets, table, *kept = ctx.saved_tensors
        softmax = kept[0].exp_() if kept else _logits(hidden, table, ctx.temperature, ctx.dtype).softmax(-1)
        grad = grad[:, None] / ctx.temperature
        # d logp_target / d logits = onehot(target) - softmax(logits)
        slope = softmax.mul_(-grad).scatter_add_(-1, targets[:, None], grad).to(ctx.dtype)
        to_hidden, to_table = slope @ table.to(ctx.dtype), slope.t() @ hidden.to(ctx.dtype)
        return to_hidden.to(hidden.dtype), None, to_table.to(table.dtype), None, None, None


def _logits(hidden: torch.Tensor, table: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    logits = (hidden.to(dtype) @ table.to(dtype).t()).float()
    return logits if temperature == 1 else logits.div_(temperature)


def response_logps(
    model: PreTrainedModel,
    rows: list[list[int]],
    starts: list[int],
    pad_id: int,
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    chunk: int = LOGITS_CHUNK,
) -> torch.Tensor:
    """Log-probability of every response token, (tokens,), in nats, under the distribution that `sample` draws from.

    Row i's response is `rows[i][starts[i]:]`; responses are concatenated without padding. The projection to the vocabulary
    runs over response positions only, `chunk` at a time, and again in the backward pass if there is more than one chunk: no
    more of the (tokens, vocabulary) matrix ever exists. vocabulary: as for `sample`, rows beyond it are left out.
    """
    device = model.device
    ids = pad_right(rows, pad_id, device)
    row_of = torch.tensor([r for r, row in enumerate(rows) for _ in range(starts[r], len(row))], device=device)
    place = torch.tensor([t for r, row in enumerate(rows) for t in range(starts[r], len(row))], device=device)
    table = model.get_output_embeddings().weight[:vocabulary]
    with autocast(device, dtype):
        # A mask of ones: padding is on the right, where a real token's causal attention never looks, and a plain causal
        # mask keeps the fast attention kernel.
        outputs = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    hidden, targets = outputs.last_hidden_state[row_of, place - 1], ids[row_of, place]
    keep = torch.is_grad_enabled() and len(targets) <= chunk
    chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([_TokenLogps.apply(*of, table, temperature, dtype, keep) for of in chunks])


@torch.no_grad()
def check_head(model: PreTrainedModel, ids: list[int], pad_id: int) -> None:
    """Raises `InputError` if `response_logps` disagrees with the model's logits: some models scale, cap or shift them."""
    ids = ids[:64]
    ours = response_logps(model, [ids], [1], pad_id)
    own = model(torch.tensor([ids], device=model.device)).logits[0, :-1].float().log_softmax(-1)
    gap = (ours - own.gather(1, torch.tensor(ids[1:], device=model.device)[:, None])[:, 0]).abs().max().item()
    if not gap <= 1e-3:
        raise InputError(
            f"{type(model).__name__} does more to its logits than multiply by its output embeddings (log-probabilities differ by "
            f"{gap:.1e}): take a model of another family"
        )


def check_forward(
    model: PreTrainedModel, reference: PreTrainedModel, rows: list[list[int]], starts: list[int], pad_id: int
) -> dict[str, float]:
    """What must hold before RL's first update, measured in fp32 on a few rows.

    padding      largest difference between padded and unpadded log-probabilities, nats
    kl           KL of the model to the reference it starts from, nats per token: not 0 if dropout is on
    micro_batch  relative difference between the gradients from one batch and from single rows

    Raises `InputError` if one exceeds its limit.
    """

    def logps_of(policy: PreTrainedModel, picked: slice) -> torch.Tensor:
        return response_logps(policy, rows[picked], starts[picked], pad_id)

    def gradient(size: int) -> torch.Tensor:
        for i in range(0, len(rows), size):
            logps_of(model, slice(i, i + size)).sum().backward()
        flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        model.zero_grad()
        return flat

    with torch.no_grad():
        padded = logps_of(model, slice(None))
        alone = torch.cat([logps_of(model, slice(i, i + 1)) for i in range(len(rows))])
        drift = padded - logps_of(reference, slice(None))
    whole = gradient(len(rows))
    found = {
        "check/padding": (padded - alone).abs().max().item(),
        "check/kl": (torch.exp(-drift) - 1 + drift).mean().item(),
        "check/micro_batch": ((whole - gradient(1)).norm() / whole.norm()).item(),
    }
    for (name, value), limit in zip(found.items(), (1e-3, 1e-6, 1e-3)):
        if not value <= limit:
            raise InputError(
                f"{name} is {value:.1e}, over {limit:.0e}: this model does not fit the plain causal forward",
                one_process=True,
            )
    return found
