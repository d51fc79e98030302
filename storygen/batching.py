"""Token-budget batches: rows of similar length together, so that little of a batch is padding; and how long a row may be."""

import numpy as np
import torch
from transformers import PreTrainedModel


def token_budget_batches(lengths: list[int], budget: int, generator: np.random.Generator | None = None) -> list[list[int]]:
    """Row indices in batches of at most `budget` tokens, padding included (rows x longest row); a longer row stands alone.

    Without a generator the batches come longest first, so that running out of memory shows at once. With one, rows of
    nearly equal length are shuffled, then the batches: every call is a new epoch.
    """
    order = np.argsort(np.array(lengths), kind="stable")[::-1]
    if generator is not None:
        # Jitter of a few percent: neighbours in length change from epoch to epoch, and padding hardly grows.
        order = np.argsort(-np.array(lengths) * generator.uniform(0.95, 1.05, len(lengths)), kind="stable")
    batches: list[list[int]] = []
    longest = 0
    for index in order.tolist():
        longest = max(longest, lengths[index])
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    if generator is not None:
        generator.shuffle(batches)
    return batches


def pad_right(rows: list[list[int]], pad_id: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """(rows, longest) int64. On the right: causal attention then never sees padding, and positions stay 0, 1, 2, …"""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=device)


def context_length(model: PreTrainedModel) -> int:
    """The most tokens that a prompt and its response may have together."""
    return model.config.max_position_embeddings
