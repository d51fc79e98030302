"""Attention for forward and backward passes as plain matrix products, for CPUs with bf16 multiplication.

`model.set_attn_implementation(PLAIN)` selects it, like any implementation that transformers' AttentionInterface knows.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

PLAIN = "plain"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_,
) -> tuple[torch.Tensor, None]:
    """(rows, heads, time, head width) each -> (rows, time, heads, head width); like `eager`, all in the tensors' own dtype.

    attention_mask: (rows, 1, time, keys), true where a query sees a key; None: every key up to the query's own position.
    Autocast would cast the softmax to fp32 and back; a bf16 softmax is computed in fp32 anyway, but not stored in it.
    """
    rows, heads, time, width = query.shape
    keys = key.shape[2]
    if attention_mask is None:
        mask = torch.full((time, keys), -torch.inf, dtype=query.dtype, device=query.device).triu_(keys - time + 1)
    else:  # not -inf: a padded query may see nothing at all
        mask = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
        mask = mask.expand(rows, heads, time, keys).reshape(-1, time, keys)
    query = query * (width**-0.5 if scaling is None else scaling)
    query, key, value = (x.reshape(rows * heads, -1, width) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        weights = torch.baddbmm(mask, query, key.transpose(1, 2)).softmax(-1)
        mixed = torch.bmm(F.dropout(weights, dropout, module.training), value)
    return mixed.view(rows, heads, time, width).transpose(1, 2), None


AttentionInterface.register(PLAIN, attend)
AttentionMaskInterface.register(PLAIN, sdpa_mask)
