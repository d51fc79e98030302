"""Critic-free PPO as pure functions: advantages, the clipped loss with its KL term, and the two controllers.

Token tensors are flat: all response tokens of a batch one after the other, (tokens,), so there is no mask to get wrong.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Advantage = Literal["loo", "group", "batch", "raw", "decoupled"]


def advantages(
    rewards: torch.Tensor,
    mode: Advantage = "loo",
    by_part: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    limit: float = 5.0,
) -> torch.Tensor:
    """Advantage of every sample, from rewards (prompts, samples of the prompt); same shape.

    loo    reward minus the mean of the prompt's other samples (RLOO, arXiv 2402.14740), over one batch-wide scale
    group  reward minus the prompt's mean, over the prompt's own standard deviation (GRPO, arXiv 2402.03300)
    batch  reward minus the batch's mean, over the batch's standard deviation
    raw    the reward itself
    decoupled  GDPO (arXiv 2601.05242): each part of the reward normalised by the prompt's own mean and deviation, then
           their sum, weighted by `weights` (parts,), by the batch's; `by_part` (parts, prompts, samples) holds what a
           sample earns from each part

    loo divides by the batch-wide deviation from the prompts' means: a prompt whose samples nearly tie keeps small
    advantages, where its own deviation would blow noise up to full size. All but raw are clipped to +-`limit`.
    Raises `ValueError` for another mode, and for loo, group and decoupled with a single sample per prompt.
    """
    samples = rewards.shape[1]
    if mode not in get_args(Advantage):
        raise ValueError(f"there is no advantage {mode!r}, there are: {', '.join(get_args(Advantage))}")
    if mode == "raw":
        return rewards
    if mode == "batch":
        return ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).clamp(-limit, limit)
    if samples < 2:
        raise ValueError(f"advantage {mode} compares samples of one prompt: it needs at least 2, not {samples}")
    if mode == "decoupled":
        normal = (by_part - by_part.mean(2, keepdim=True)) / (by_part.std(2, keepdim=True) + 1e-4)
        total = torch.einsum("w,wps->ps", weights, normal)
        return advantages(total, "batch", limit=limit)
    centred = rewards - rewards.mean(1, keepdim=True)
    if mode == "group":
        return (centred / (rewards.std(1, keepdim=True) + 1e-4)).clamp(-limit, limit)
    # The mean of the others differs from the group's mean by the factor K / (K - 1).
    leave_one_out = centred * samples / (samples - 1)
    return (leave_one_out / (centred.pow(2).mean().sqrt() + 1e-4)).clamp(-limit, limit)


@dataclass(frozen=True)
class LossStats:
    """Sums over response tokens, to be added over micro-batches and divided by their token count."""

    loss: float
    approx_kl: float
    """KL(old || new) by the k3 estimator, nats."""
    kl: float
    """KL(new || reference) by the ratio-weighted k3 estimator, nats."""
    clipped: float
    """Tokens whose ratio left the clip range on the side where the gradient stops."""


def policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    token_advantages: torch.Tensor,
    total_tokens: int,
    *,
    beta: float,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 3.0,
) -> tuple[torch.Tensor, LossStats]:
    """PPO's clipped objective (arXiv 1707.06347) per token, plus `beta` times the KL to the reference.

    All tensors are (tokens,) in nats; `total_tokens` counts the response tokens of the whole minibatch, over all its
    micro-batches and processes, so that the micro-batch losses sum to the minibatch's loss however it is split.
    Asymmetric clipping as in DAPO (arXiv 2503.14476), the dual clip at negative advantages as in arXiv 1912.09729. The KL
    is k3 (http://joschu.net/blog/kl-approx.html) times the ratio: on policy its gradient is that of the true KL,
    whereas plain k3's saturates as the policy drifts.
    """
    log_ratio = (logps - old_logps).clamp(-20, 20)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * token_advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * token_advantages)
    surrogate = torch.where(token_advantages < 0, torch.maximum(surrogate, dual_clip * token_advantages), surrogate)
    drift = (logps - ref_logps).clamp(-20, 20)
    kl = ratio * (torch.exp(-drift) - 1 + drift)
    loss = (beta * kl - surrogate).sum() / total_tokens
    with torch.no_grad():
        clipped = ((ratio > 1 + clip_high) & (token_advantages > 0)) | ((ratio < 1 - clip_low) & (token_advantages < 0))
        stats = LossStats(
            loss=loss.item(),
            approx_kl=(ratio - 1 - log_ratio).sum().item(),
            kl=kl.sum().item(),
            clipped=clipped.sum().item(),
        )
    return loss, stats


def adapt_beta(beta: float, kl: float, target: float, low: float = 1e-4, high: float = 1.0) -> float:
    """The KL coefficient for the next step: up by a tenth above 1.5 times the target, down by a tenth below 2/3 of it.

    It stays within [low, high]; 0 stays 0, for a run without the KL term. `kl` and `target` are nats per token. After PPO's
    adaptive penalty (arXiv 1707.06347, section 4), in smaller steps, because one step's estimate is noisy.
    """
    if beta == 0:
        return 0.0
    if kl > 1.5 * target:
        beta *= 1.1
    elif kl < target / 1.5:
        beta /= 1.1
    return min(max(beta, low), high)


def next_length_target(target: float, reached: float, worse: bool, low: float, high: float) -> float:
    """The length target (words) after a step in which a share `reached` of the samples came near the current one.

    Rises by 2% at a share of 0.7 or more, unless the text got `worse`; falls by 2% below 0.3; stays within [low, high].
    """
    if reached >= 0.7 and not worse:
        target *= 1.02
    elif reached < 0.3:
        target /= 1.02
    return min(max(target, low), high)
