"""Batched sampling: from GPT-2 with a preallocated KV cache, from any other causal model by `plain_sampler`.

The K completions of a prompt share one prefill. A finished row leaves its slot at once and the next waiting completion takes
it, so no forward pass is spent on a row that has ended; on a GPU, whose loop is in `gpu_sampler`, this happens soon, not at
once. Every completion draws its tokens from its own random stream, keyed by (seed, prompt, completion): what is sampled does
not depend on how many rows run alongside, except for rounding.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from tqdm import tqdm
from transformers import GPT2LMHeadModel, PreTrainedModel

from storygen import gpu_sampler, plain_sampler
from storygen.batching import context_length
from storygen.cli import InputError
from storygen.decoder import Decoder, draw


@dataclass
class Completion:
    """`ids` include the end token if the row `finished`; `logps`, one per token, are nats under the distribution sampled."""

    ids: list[int]
    logps: list[float]
    finished: bool


def is_fast(model: PreTrainedModel) -> bool:
    """Whether the sampler has a forward pass of its own for this model: a GPT-2 that computes as OpenAI's do."""
    config = model.config
    return isinstance(model, GPT2LMHeadModel) and config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx


@cache
def say_slow(name: str) -> None:
    tqdm.write(
        f"note: {name} is sampled by transformers' own forward pass, several times slower than GPT-2", file=sys.stderr
    )


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
    on_token: Callable[[int, int, int], None] | None = None,
) -> list[list[Completion]]:
    """`num` completions of each prefix (token ids), up to `eos_id`, the context's end or `max_new_tokens`.

    first: index of the first prefix among all sampled with this seed, when several processes share them.
    vocabulary: number of tokens; rows of the embedding matrix beyond it are padding and never drawn. None: all rows.
    on_token(prompt, completion, token): called as each token is drawn; on a GPU this uses the slower sampler.
    Same seed, device and dtype: same tokens. Raises `InputError` for a prefix that fills the context.
    """
    context = context_length(model)
    for prefix in prefixes:
        if len(prefix) >= context:
            raise InputError(
                f"a prompt of {len(prefix)} tokens leaves no room in a context of {context}: shorten the prompt"
            )

    def room(prefix: list[int]) -> int:
        return min(context - len(prefix), max_new_tokens or context)

    key = (seed,) if isinstance(seed, int) else seed

    def stream(p: int, k: int) -> np.ndarray:
        return np.random.default_rng((*key, first + p, k)).random(room(prefixes[p]), dtype=np.float32)

    waiting = deque((p, k) for p in range(len(prefixes)) for k in range(num))
    slots = min(max_rows, len(waiting))
    results: list[list[Completion | None]] = [[None] * num for _ in prefixes]
    bar = tqdm(total=len(waiting), unit="sample", desc="sampling", disable=None if progress else True, leave=False)
    fast = is_fast(model)
    if not fast:
        say_slow(type(model).__name__)
    if waiting and (not fast or model.device.type == "cuda"):
        law = {"eos_id": eos_id, "vocabulary": vocabulary, "temperature": temperature, "top_p": top_p, "dtype": dtype}
        what = model, list(waiting), prefixes, [room(prefix) for prefix in prefixes], stream
        if fast and on_token is None:
            rows = gpu_sampler.sample_rows(*what, slots=slots, bar=bar, **law)
        else:
            rows = plain_sampler.sample_rows(*what, slots=slots, bar=bar, on_token=on_token, **law)
        bar.close()
        for (p, k), (ids, logps) in rows.items():
            results[p][k] = Completion(ids, logps, ids[-1] == eos_id)
        return results

    longest_row = max((len(prefix) + room(prefix) for prefix in prefixes), default=0)
    decoder = Decoder(model, slots, longest_row, dtype, vocabulary)
    prefilled: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    jobs: list[tuple[int, int]] = []  # of the active slots, 0 … n-1
    streams: list[np.ndarray] = []
    drawn: list[Completion] = []
    logits = torch.empty(0, decoder.vocabulary, device=model.device)
    while waiting or jobs:
        fresh = []
        while waiting and len(jobs) < slots:
            p, k = waiting.popleft()
            if p not in prefilled:
                prefilled = {p: decoder.prefill(prefixes[p])}  # completions of a prompt are neighbours: one is enough
            after, keys, values = prefilled[p]
            decoder.place([len(jobs)], keys, values)
            fresh.append(after)
            jobs.append((p, k))
            streams.append(stream(p, k))
            drawn.append(Completion([], [], False))
        if fresh:
            logits = torch.cat([logits, torch.stack(fresh)])

        uniforms = torch.tensor([s[len(c.ids)] for s, c in zip(streams, drawn)], device=model.device)
        tokens, logps = draw(logits, uniforms, temperature, top_p)
        for (p, k), completion, token, logp in zip(jobs, drawn, tokens.tolist(), logps.tolist()):
            if on_token:
                on_token(p, k, token)
            completion.ids.append(token)
            completion.logps.append(logp)
            completion.finished = token == eos_id

        # Fill the gaps left by ended rows with rows from the end, so that the active slots stay 0 … n-1.
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
