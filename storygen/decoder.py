"""GPT-2's forward pass over a preallocated KV cache, and sampling of a token from its logits."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

BLOCK = 128  # vocabulary tokens that are summed at once in a draw


def linear(weight: torch.Tensor, bias: torch.Tensor, rows: int, *, gelu: bool = False) -> Callable[..., torch.Tensor]:
    """x (n, in), plus (n, out) or none -> x @ weight + bias + plus; weight (in, out), same dtype; n up to about `rows`.

    gelu: apply GPT-2's GELU (the tanh one) to the result. On a CPU the weight is laid out once as oneDNN's kernels read it,
    as torch's compiler does for a frozen model, and what follows the product is applied while it is in registers. A plain
    product of a few rows spends most of its time on that layout in every call, and in fp32 uses another library.
    """
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and _onednn_multiplies(weight.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), rows)
        after = ("gelu", [], "tanh") if gelu else ("none", [], "")

        def product(x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
            if plus is None:
                return torch.ops.mkldnn._linear_pointwise(x, packed, bias, *after)
            return torch.ops.mkldnn._linear_pointwise.binary(x, plus, packed, bias, "add")

    else:
        weight = weight.contiguous()

        def product(x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
            x = torch.addmm(bias, x, weight)
            x = x if plus is None else x + plus
            return F.gelu(x, approximate="tanh") if gelu else x

    return product


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Decoder:
    """GPT-2's forward pass over slots of a KV cache, with its weights in one dtype."""

    def __init__(self, model: GPT2LMHeadModel, slots: int, length: int, dtype: torch.dtype, vocabulary: int | None):
        config = model.config
        self.heads, self.eps = config.n_head, config.layer_norm_epsilon
        # GPT-2's own activation is fused into the product before it; any other is applied separately.
        self.activation = None if config.activation_function == "gelu_new" else model.transformer.h[0].mlp.act
        self.on_cpu = model.device.type == "cpu"
        self.attends_in = torch.float32 if self.on_cpu else dtype

        def to(module) -> tuple[torch.Tensor, torch.Tensor]:
            return module.weight.detach().to(dtype), module.bias.detach().to(dtype)

        def product(module, gelu: bool = False) -> Callable[..., torch.Tensor]:
            return linear(*to(module), slots, gelu=gelu)

        self.blocks = [
            (
                to(b.ln_1),
                product(b.attn.c_attn),
                product(b.attn.c_proj),
                to(b.ln_2),
                product(b.mlp.c_fc, gelu=self.activation is None),
                product(b.mlp.c_proj),
            )
            for b in model.transformer.h
        ]
        self.final_norm = to(model.transformer.ln_f)
        self.tokens = model.transformer.wte.weight.detach().to(dtype)
        self.positions = model.transformer.wpe.weight.detach().to(dtype)
        # The head's rows, padded for `draw` with tokens of probability zero.
        table = model.lm_head.weight.detach()[:vocabulary].to(dtype)
        missing = -len(table) % BLOCK
        bias = F.pad(table.new_zeros(len(table)), (0, missing), value=-torch.inf)
        self.vocabulary, self.head = len(bias), linear(F.pad(table, (0, 0, 0, missing)).t(), bias, slots)
        # (blocks, slots, heads, length, head width). Zeros: what is masked out is multiplied by zero, so it must be finite.
        self.keys, self.values = self._cache(slots, length, config.n_embd // self.heads, model.device)
        # The same memory in the layout a step writes, (slots, length, heads, head width).
        self.by_place = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(self.keys, self.values, strict=True)]

    def _cache(self, slots: int, length: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (2, len(self.blocks), slots, self.heads, length, width)
        if not self.on_cpu:
            keys, values = torch.zeros(shape, dtype=self.attends_in, device=device)
            return keys, values
        # numpy's zeros are not touched before use, and a large array of them comes in huge pages.
        keys, values = torch.from_numpy(np.zeros(shape, dtype=np.float32))
        return keys.view(*keys.shape[:3], width, length).transpose(3, 4), values  # the length innermost: see _attend

    def _norm(self, x: torch.Tensor, parameters: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], *parameters, self.eps)

    def _blocks(self, x: torch.Tensor, attend: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """(tokens, width) through every block; `attend(layer, qkv)`: (tokens, 3, heads, head width) -> (tokens, width)."""
        for layer, (norm_1, qkv, out, norm_2, up, down) in enumerate(self.blocks):
            states = qkv(self._norm(x, norm_1)).to(self.attends_in)
            x = out(attend(layer, states.view(len(x), 3, self.heads, -1)).to(x.dtype), x)
            states = up(self._norm(x, norm_2))
            x = down(states if self.activation is None else self.activation(states), x)
        return self._norm(x, self.final_norm)

    def prefill(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One prompt: logits (vocabulary,) after its last token; keys and values (layers, heads, tokens, head width)."""
        keys, values = [], []

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = qkv.permute(1, 2, 0, 3)
            keys.append(k)
            values.append(v)
            mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)
            return mixed[0].transpose(0, 1).flatten(1)

        x = self.tokens[torch.tensor(ids, device=self.tokens.device)] + self.positions[: len(ids)]
        return self.head(self._blocks(x, attend)[-1:])[0].float(), torch.stack(keys), torch.stack(values)

    def place(self, slots: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy a prefill's keys and values into the start of each of `slots`."""
        for cache, new in ((self.keys, keys), (self.values, values)):
            for layer, one in enumerate(cache):
                one[slots, :, : new.shape[2]] = new[layer]

    def move(self, source: int, target: int, length: int) -> None:
        for cache in (*self.keys, *self.values):
            cache[target, :, :length] = cache[source, :, :length]

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """One token for each of the first n slots, at its position: logits (n, vocabulary). `longest` = max position + 1."""
        n, device = len(tokens), tokens.device
        at = torch.arange(n, device=device), positions
        mask = torch.zeros(n, 1, longest, dtype=self.attends_in, device=device)
        mask.masked_fill_((torch.arange(longest, device=device) > positions[:, None])[:, None], -torch.inf)
        if self.on_cpu:
            mask = mask.expand(n, self.heads, longest).reshape(n * self.heads, 1, longest)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = qkv.unbind(1)
            keys, values = self.by_place[layer]
            keys.index_put_(at, k)
            values.index_put_(at, v)
            return self._attend(q, self.keys[layer][:n, :, :longest], self.values[layer][:n, :, :longest], mask).view(n, -1)

        return self.head(self._blocks(self.tokens[tokens] + self.positions[positions], attend)).float()

    def _attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attention of one query per row, (rows, heads, head width); on a CPU the mask is (rows x heads, 1, length)."""
        if not self.on_cpu:
            return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask[:, None])
        # The CPU's fused kernel is made for many queries: with one it is 3 times slower than two plain products in fp32, and
        # 5 times in bf16. A one-row product runs at memory speed if the other factor's rows are long.
        queries, keys, values = q.flatten(0, 1)[:, None], keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
        weights = torch.baddbmm(mask, queries, keys, alpha=q.shape[2] ** -0.5).softmax(-1)
        return torch.bmm(weights, values)


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling, one token per row from one uniform per row, and its log-probability under the law drawn from.

    logits: (rows, vocabulary), with a vocabulary that is a multiple of `BLOCK`; a token at -inf is never drawn.
    """
    if temperature != 1.0:
        logits = logits / temperature
    if top_p < 1.0:
        ordered, index = logits.log_softmax(-1).sort(-1, descending=True)
        mass = ordered.exp().cumsum(-1)
        # The nucleus (Holtzman et al., arXiv 1904.09751) includes the token that crosses top_p.
        ordered = ordered.masked_fill(mass - ordered.exp() >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, index, ordered)
    law = logits.softmax(-1)
    # In two steps, first the block, then the place in it: a running sum over the whole vocabulary adds one number at a time.
    blocks = law.unflatten(-1, (-1, BLOCK))
    upto = blocks.sum(-1).cumsum(-1)
    target = uniforms[:, None] * upto[:, -1:]
    # right=True: the first entry above the draw, which a token of probability zero never is.
    block = torch.searchsorted(upto, target, right=True).clamp_(max=upto.shape[1] - 1)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1)
    before = upto.gather(1, block) - inside[:, -1:]
    # Rounding must not carry the draw out of the block.
    rest = torch.minimum((target - before).clamp_(min=0), inside[:, -1:] * (1 - 2**-23))
    # Clamped for NaN logits: their token is arbitrary, its log-probability NaN, so the caller can tell.
    chosen = block * BLOCK + torch.searchsorted(inside, rest, right=True).clamp_(max=BLOCK - 1)
    return chosen[:, 0], law.gather(-1, chosen)[:, 0].log()
