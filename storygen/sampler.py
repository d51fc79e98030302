"""Batched sampling from a GPT-2 with a preallocated KV cache.

The K completions of a prompt share one prefill. A finished row leaves its slot at once and the next waiting completion takes
it, so no forward pass is spent on a row that has ended. Every completion draws its tokens from a random stream of its own,
keyed by (seed, prompt, completion): what is sampled does not depend on how many rows ran beside it, but for rounding.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GPT2LMHeadModel, PreTrainedModel

from storygen.cli import InputError


@dataclass
class Completion:
    """`ids` hold the end token where the row `finished`; `logps` are nats, one a token, of the law that was sampled."""

    ids: list[int]
    logps: list[float]
    finished: bool


class _Decoder:
    """GPT-2's forward pass over slots of a KV cache, with its weights in one dtype."""

    def __init__(self, model: GPT2LMHeadModel, slots: int, length: int, dtype: torch.dtype, vocabulary: int | None):
        config = model.config
        self.heads, self.eps = config.n_head, config.layer_norm_epsilon
        self.activation = model.transformer.h[0].mlp.act

        def to(module) -> tuple[torch.Tensor, torch.Tensor]:
            return module.weight.detach().to(dtype), module.bias.detach().to(dtype)

        self.blocks = [
            (to(b.ln_1), to(b.attn.c_attn), to(b.attn.c_proj), to(b.ln_2), to(b.mlp.c_fc), to(b.mlp.c_proj))
            for b in model.transformer.h
        ]
        self.final_norm = to(model.transformer.ln_f)
        self.tokens = model.transformer.wte.weight.detach().to(dtype)
        self.positions = model.transformer.wpe.weight.detach().to(dtype)
        # A transposed copy: at a few rows the product is bound by memory, and this order reads it in one sweep.
        self.head = model.lm_head.weight.detach()[:vocabulary].to(dtype).t().contiguous()
        self.cells = (slots, self.heads, length)
        self.on_cpu = model.device.type == "cpu"
        self.keys = [self._cache(dtype, model) for _ in self.blocks]
        self.values = [self._cache(dtype, model) for _ in self.blocks]

    def _cache(self, dtype: torch.dtype, model: GPT2LMHeadModel) -> torch.Tensor:
        """Zeros (slots * heads * length, head width): what is masked out is multiplied by zero, so it must be a number."""
        slots, heads, length = self.cells
        shape = (slots * heads * length, model.config.n_embd // heads)
        if self.on_cpu:  # fp32 whatever the dtype: see _attend
            return torch.from_numpy(np.zeros(shape, dtype=np.float32))  # memory that is not used is never touched
        return torch.zeros(shape, dtype=dtype, device=model.device)

    def _cells(self, cache: torch.Tensor) -> torch.Tensor:
        """(slots, heads, length, head width)"""
        return cache.view(*self.cells, -1)

    def _norm(self, x: torch.Tensor, parameters: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], *parameters, self.eps)

    def _blocks(self, x: torch.Tensor, attend) -> torch.Tensor:
        """(rows, time, width) through every block; `attend(layer, q, k, v)` has (rows, heads, time, head width) tensors."""
        rows, time, width = x.shape
        for layer, (norm_1, qkv, out, norm_2, up, down) in enumerate(self.blocks):
            states = self._norm(x, norm_1).view(-1, width)
            q, k, v = torch.addmm(qkv[1], states, qkv[0]).view(rows, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = attend(layer, q, k, v).transpose(1, 2).reshape(-1, width)
            x = x + torch.addmm(out[1], mixed, out[0]).view_as(x)
            states = self.activation(torch.addmm(up[1], self._norm(x, norm_2).view(-1, width), up[0]))
            x = x + torch.addmm(down[1], states, down[0]).view_as(x)
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
        return (x[0, -1] @ self.head).float(), torch.stack(keys), torch.stack(values)

    def place(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for cache, new in ((self.keys, keys), (self.values, values)):
            for layer, one in enumerate(cache):
                self._cells(one)[slot, :, : new.shape[2]] = new[layer]

    def move(self, source: int, target: int, length: int) -> None:
        for cache in (*self.keys, *self.values):
            cells = self._cells(cache)
            cells[target, :, :length] = cells[source, :, :length]

    def _attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attention of one query a row, (rows, heads, 1, head width)."""
        if not self.on_cpu:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        # The processor's fused kernel is made for many queries: with one it is 3 times slower than two plain products in fp32,
        # which read the cache at the speed of memory, and in bf16 5 times.
        rows, heads, time, width = keys.shape
        scaled = (q.float() * width**-0.5).view(rows * heads, width, 1)
        weights = torch.bmm(keys.flatten(0, 1), scaled).view(rows, heads, 1, time).add_(mask).softmax(-1)
        return torch.bmm(weights.view(rows * heads, 1, time), values.flatten(0, 1)).view_as(q).to(q.dtype)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """One token for each of the first n slots, at its own position: logits (n, vocabulary). `longest` = max position + 1."""
        n = len(tokens)
        device = tokens.device
        _, heads, length = self.cells
        cell = (torch.arange(n, device=device)[:, None] * heads + torch.arange(heads, device=device)) * length
        cell = (cell + positions[:, None]).flatten()
        mask = torch.zeros(n, 1, 1, longest, dtype=self.keys[0].dtype, device=device)
        mask.masked_fill_((torch.arange(longest, device=device) > positions[:, None])[:, None, None], -torch.inf)

        def attend(layer, q, k, v):
            for cache, new in ((self.keys[layer], k), (self.values[layer], v)):
                cache.index_copy_(0, cell, new.reshape(n * heads, -1).to(cache.dtype))
            keys, values = (self._cells(cache[layer])[:n, :, :longest] for cache in (self.keys, self.values))
            return self._attend(q, keys, values, mask)

        x = self.tokens[tokens] + self.positions[positions]
        return (self._blocks(x[:, None], attend)[:, 0] @ self.head).float()


def _draw(
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
    shifted = logits - logits.amax(-1, keepdim=True)
    weights = shifted.exp()
    cdf = weights.cumsum(-1)
    # right=True: the first entry above the draw, which a token of probability zero never is.
    chosen = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
    return chosen[:, 0], shifted.gather(-1, chosen)[:, 0] - weights.sum(-1).log()


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prefixes: list[list[int]],
    num: int,
    *,
    eos_id: int,
    seed: int | tuple[int, ...],
    first: int = 0,
    vocabulary: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int | None = None,
    max_rows: int = 128,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> list[list[Completion]]:
    """`num` completions of each prefix (token ids), up to `eos_id`, the context's end or `max_new_tokens`.

    first: place of the first prefix among all that this seed samples, where several processes share them out.
    vocabulary: number of tokens; rows of the embedding matrix beyond it are its padding and never drawn. None: all rows.
    Same seed, device and dtype: same tokens. Raises `InputError` for a prefix that fills the context and for architectures
    other than GPT-2.
    """
    if not isinstance(model, GPT2LMHeadModel):
        raise InputError(f"sampling knows GPT-2 models, not {type(model).__name__}: give --model a GPT-2 folder")
    context = model.config.n_positions
    for prefix in prefixes:
        if len(prefix) >= context:
            raise InputError(
                f"a prompt of {len(prefix)} tokens leaves no room in a context of {context}: shorten the prompt"
            )

    def room(prefix: list[int]) -> int:
        return min(context - len(prefix), max_new_tokens or context)

    key = (seed,) if isinstance(seed, int) else seed
    waiting = deque((p, k) for p in range(len(prefixes)) for k in range(num))
    slots = min(max_rows, len(waiting))
    longest_row = max((len(prefix) + room(prefix) for prefix in prefixes), default=0)
    decoder = _Decoder(model, slots, longest_row, dtype, vocabulary)
    results: list[list[Completion | None]] = [[None] * num for _ in prefixes]
    prefilled: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    jobs: list[tuple[int, int]] = []  # of the active slots, 0 … n-1
    streams: list[np.ndarray] = []
    drawn: list[Completion] = []
    logits = torch.empty(0, decoder.head.shape[1], device=model.device)
    bar = tqdm(total=len(waiting), unit="sample", desc="sampling", disable=None if progress else True, leave=False)
    while waiting or jobs:
        fresh = []
        while waiting and len(jobs) < slots:
            p, k = waiting.popleft()
            if p not in prefilled:
                prefilled = {p: decoder.prefill(prefixes[p])}  # completions of a prompt are neighbours: one is enough
            after, keys, values = prefilled[p]
            decoder.place(len(jobs), keys, values)
            fresh.append(after)
            jobs.append((p, k))
            streams.append(np.random.default_rng((*key, first + p, k)).random(room(prefixes[p]), dtype=np.float32))
            drawn.append(Completion([], [], False))
        if fresh:
            logits = torch.cat([logits, torch.stack(fresh)])

        uniforms = torch.tensor([s[len(c.ids)] for s, c in zip(streams, drawn)], device=model.device)
        tokens, logps = _draw(logits, uniforms, temperature, top_p)
        for completion, token, logp in zip(drawn, tokens.tolist(), logps.tolist()):
            completion.ids.append(token)
            completion.logps.append(logp)
            completion.finished = token == eos_id

        # Close the gaps that ended rows leave with rows from the end, so that the active slots stay 0 … n-1.
        slot = 0
        while slot < len(jobs):
            (p, k), completion = jobs[slot], drawn[slot]
            if not completion.finished and len(completion.ids) < room(prefixes[p]):
                slot += 1
                continue
            results[p][k] = completion
            bar.update()
            last = len(jobs) - 1
            if slot < last:
                decoder.move(last, slot, len(prefixes[jobs[last][0]]) + len(drawn[last].ids))
                jobs[slot], streams[slot], drawn[slot] = jobs[last], streams[last], drawn[last]
            del jobs[last], streams[last], drawn[last]
        if jobs:
            lengths = [len(prefixes[p]) + len(c.ids) for (p, _), c in zip(jobs, drawn)]
            tokens = torch.tensor([c.ids[-1] for c in drawn], device=model.device)
            logits = decoder.step(tokens, torch.tensor(lengths, device=model.device) - 1, max(lengths))
        else:
            logits = logits[:0]
    bar.close()
    return results
