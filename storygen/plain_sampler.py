"""Sampling from any causal model, with transformers' own forward pass and cache: as exact as the sampler's, but slower.

Only rows whose prompts have the same number of tokens share a batch, so that nothing is padded: what a model does with
padding, and how it counts positions, is its own affair.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from storygen.decoder import BLOCK, draw
from storygen.logprobs import autocast


def sample_rows(
    model: PreTrainedModel,
    jobs: list[tuple[int, int]],
    prefixes: list[list[int]],
    rooms: list[int],
    uniforms: Callable[[int, int], np.ndarray],
    *,
    slots: int,
    eos_id: int,
    vocabulary: int | None,
    temperature: float,
    top_p: float,
    dtype: torch.dtype,
    bar: tqdm,
    on_token: Callable[[int, int, int], None] | None = None,
) -> dict[tuple[int, int], tuple[list[int], list[float]]]:
    """(ids, logps) of every job (prompt, completion), at most `slots` at once; `rooms`: most new tokens by prompt.

    uniforms(prompt, completion): the random numbers (its prompt's room,) a completion is drawn with.
    """
    of_length: dict[int, list[tuple[int, int]]] = {}
    for job in jobs:
        of_length.setdefault(len(prefixes[job[0]]), []).append(job)
    drawn: dict[tuple[int, int], tuple[list[int], list[float]]] = {job: ([], []) for job in jobs}
    for alike in of_length.values():
        for start in range(0, len(alike), slots):
            rows = alike[start : start + slots]
            streams = [uniforms(*job) for job in rows]
            prompts = list(dict.fromkeys(prompt for prompt, _ in rows))
            ids = torch.tensor([prefixes[prompt] for prompt in prompts], device=model.device)
            of_prompt = torch.tensor([prompts.index(prompt) for prompt, _ in rows], device=model.device)
            with autocast(model.device, dtype):
                cache = None
                if ids.shape[1] > 1:  # all but the last token, which is the first step's input
                    cache = model.base_model(input_ids=ids[:, :-1], use_cache=True).past_key_values
                    cache.batch_select_indices(of_prompt)
                newest = ids[of_prompt, -1:]
                while rows:
                    out = model(input_ids=newest, past_key_values=cache, use_cache=True)
                    cache, logits = out.past_key_values, out.logits[:, -1, :vocabulary].float()
                    logits = F.pad(logits, (0, -logits.shape[1] % BLOCK), value=-torch.inf)
                    numbers = [stream[len(drawn[job][0])] for stream, job in zip(streams, rows, strict=True)]
                    tokens, logps = draw(logits, torch.tensor(numbers, device=model.device), temperature, top_p)
                    for job, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
                        if on_token:
                            on_token(*job, token)
                        drawn[job][0].append(token)
                        drawn[job][1].append(logp)
                    going = [
                        i for i, job in enumerate(rows)
                        if drawn[job][0][-1] != eos_id and len(drawn[job][0]) < rooms[job[0]]
                    ]  # fmt: skip
                    bar.update(len(rows) - len(going))
                    if len(going) < len(rows):
                        rows, streams = [rows[i] for i in going], [streams[i] for i in going]
                        going = torch.tensor(going, dtype=torch.long, device=model.device)
                        cache.batch_select_indices(going)
                        tokens = tokens[going]
                    newest = tokens[:, None]
    return drawn
