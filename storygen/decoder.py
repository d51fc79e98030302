"""GPT-2's forward pass over a preallocated KV cache, and the draw of a token from its logits."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

BLOCK = 128  # tokens of the vocabulary that are summed at once in a draw


def linear(weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """x (n, in) -> x @ weight + bias, for weight (in, out) in the same dtype, with n up to about `rows`.

    On a processor the weight is laid out once as oneDNN's kernels read it, as torch's compiler does for a frozen model. A plain
    product of a few rows spends most of its time on doing that anew in every call, and in fp32 it is another library's.
    """
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and _onednn_multiplies(weight.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    weight = weight.contiguous()
    return (lambda x: x @ weight) if bias is None else (lambda x: torch.addmm(bias, x, weight))


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Decoder:
    """GPT-2's forward pass over slots of a KV cache, with its weights in one dtype."""

    def __init__(self, model: GPT2LMHeadModel, slots: int, length: int, dtype: torch.dtype, vocabulary: int | None):
        config = model.config
        self.heads, self.eps = config.n_head, config.layer_norm_epsilon
        self.activation = model.transformer.h[0].mlp.act

        def to(module) -> tuple[torch.Tensor, torch.Tensor]:
            return module.weight.detach().to(dtype), module.bias.detach().to(dtype)

        def product(module) -> Callable[[torch.Tensor], torch.Tensor]:
            return linear(*to(module), slots)

        self.blocks = [
            (
                to(b.ln_1),
                product(b.attn.c_attn),
                product(b.attn.c_proj),
                to(b.ln_2),
                product(b.mlp.c_fc),
                product(b.mlp.c_proj),
            )
            for b in model.transformer.h
        ]
        self.final_norm = to(model.transformer.ln_f)
        self.tokens = model.transformer.wte.weight.detach().to(dtype)
        self.positions = model.transformer.wpe.weight.detach().to(dtype)
        table = model.lm_head.weight.detach()[:vocabulary].to(dtype)
        self.vocabulary, self.head = len(table), linear(table.t(), None, slots)
        self.on_cpu = model.device.type == "cpu"
        shape = (slots, self.heads, length, config.n_embd // self.heads)
        self.keys = [self._cache(shape, dtype, model.device, keys=True) for _ in self.blocks]
        self.values = [self._cache(shape, dtype, model.device, keys=False) for _ in self.blocks]

    def _cache(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, keys: bool) -> torch.Tensor:
        """Zeros (slots, heads, length, head width): what is masked out is multiplied by zero, so it must be a number."""
        if not self.on_cpu:
            return torch.zeros(shape, dtype=dtype, device=device)
        # fp32 whatever the dtype, and keys with the length innermost: see _attend.
        slots, heads, length, width = shape
        inner = (width, length) if keys else (length, width)
        cache = torch.from_numpy(np.zeros((slots, heads, *inner), dtype=np.float32))  # what is not used is never touched
        return cache.transpose(2, 3) if keys else cache

    def _norm(self, x: torch.Tensor, parameters: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], *parameters, self.eps)

    def _blocks(self, x: torch.Tensor, attend) -> torch.Tensor:
        """(rows, time, width) through every block; `attend(layer, q, k, v)` has (rows, heads, time, head width) tensors."""
        rows, time, width = x.shape
        for layer, (norm_1, qkv, out, norm_2, up, down) in enumerate(self.blocks):
            states = self._norm(x, norm_1).view(-1, width)
            q, k, v = qkv(states).view(rows, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = attend(layer, q, k, v).transpose(1, 2).reshape(-1, width)
            x = x + out(mixed).view_as(x)
            states = self.activation(up(self._norm(x, norm_2).view(-1, width)))
            x = x + down(states).view_as(x)
        return self._norm(x, self.final_norm)

    def prefill(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One prompt: logits (vocabulary,) after its last token, its keys and values (layers, heads, tokens, head width)."""
        keys, values = [], []

        def attend(layer, q, k, v):
            keys.append(k[0])
            values.append(v[0])
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        x = self.tokens[torch.tensor(ids, device=self.tokens.device)] + self.positions[: len(ids)]
        x = self._blocks(x[None], attend)
        return self.head(x[0, -1:])[0].float(), torch.stack(keys), torch.stack(values)

    def place(self, slots: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """A prefill's keys and values into the start of each of `slots`."""
        for cache, new in ((self.keys, keys), (self.values, values)):
            for layer, one in enumerate(cache):
                one[slots, :, : new.shape[2]] = new[layer].to(one.dtype)

    def move(self, source: int, target: int, length: int) -> None:
        for cache in (*self.keys, *self.values):
            cache[target, :, :length] = cache[source, :, :length]

    def _attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attention of one query a row, (rows, heads, 1, head width)."""
        if not self.on_cpu:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        # The processor's fused kernel is made for many queries: with one it is 3 times slower than two plain products in fp32,
        # and in bf16 5 times. A product of one row runs at the speed of memory where the other factor's rows are long.
        rows, heads, _, width = keys.shape
        queries, keys, values = q.float().reshape(rows * heads, 1, width), keys.flatten(0, 1), values.flatten(0, 1)
        weights = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=width**-0.5).softmax(-1)
        return torch.bmm(weights, values).view_as(q).to(q.dtype)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """One token for each of the first n slots, at its own position: logits (n, vocabulary). `longest` = max position + 1."""
        n = len(tokens)
        device = tokens.device
        slots = torch.arange(n, device=device)
        mask = torch.zeros(n, 1, 1, longest, dtype=self.keys[0].dtype, device=device)
        mask.masked_fill_((torch.arange(longest, device=device) > positions[:, None])[:, None, None], -torch.inf)
        if self.on_cpu:
            mask = mask[:, 0].repeat_interleave(self.heads, 0)  # (rows x heads, 1, longest), as _attend adds it

        def attend(layer, q, k, v):
            for cache, new in ((self.keys[layer], k), (self.values[layer], v)):
                cache[slots, :, positions] = new[:, :, 0].to(cache.dtype)
            return self._attend(q, self.keys[layer][:n, :, :longest], self.values[layer][:n, :, :longest], mask)

        x = self.tokens[tokens] + self.positions[positions]
        return self.head(self._blocks(x[:, None], attend)[:, 0]).float()


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling, one token a row from one uniform a row, and its log-probability under the law drawn from."""
    if temperature != 1.0:
        logits = logits / temperature
    if top_p < 1.0:
        ordered, index = logits.log_softmax(-1).sort(-1, descending=True)
        mass = ordered.exp().cumsum(-1)
        # The nucleus (Holtzman et al., arXiv 1904.09751) holds the token that crosses top_p.
        ordered = ordered.masked_fill(mass - ordered.exp() >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, index, ordered)
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    # In two steps, which block and where in it: a running sum over the whole vocabulary adds one number at a time.
    missing = -logits.shape[-1] % BLOCK
    weights = (F.pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, BLOCK))
    upto = weights.sum(-1).cumsum(-1)
    target = uniforms[:, None] * upto[:, -1:]
    # right=True: the first entry above the draw, which a token of probability zero never is.
    block = torch.searchsorted(upto, target, right=True).clamp_(max=upto.shape[1] - 1)
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1)
    before = upto.gather(1, block) - inside[:, -1:]
    # Rounding must not carry the draw out of the block.
    rest = torch.minimum((target - before).clamp_(min=0), inside[:, -1:] * (1 - 2**-23))
    chosen = block * BLOCK + torch.searchsorted(inside, rest, right=True)
    return chosen[:, 0], (logits.gather(-1, chosen) - top - upto[:, -1:].log())[:, 0]
