"""Responses of a model to prompts, and their log-probabilities under any model: what RL and evaluation both start from."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from storygen.batching import context_length
from storygen.logprobs import cast_once, response_logps
from storygen.pattern import Parsed, Pattern
from storygen.sampler import sample


@dataclass(frozen=True)
class Rollout:
    """The responses of one call, prompt by prompt, K per prompt.

    rows: token ids, prompt and response; starts: index of the first response token; room: tokens left between the response's
    end and the limit; sampler_logps: (response tokens,), nats, under the distribution that was sampled.
    """

    prompts: list[str]
    rows: list[list[int]]
    starts: list[int]
    parsed: list[Parsed]
    room: list[int]
    sampler_logps: torch.Tensor

    def response_tokens(self) -> int:
        return sum(len(row) - start for row, start in zip(self.rows, self.starts, strict=True))


def rollout(
    model: PreTrainedModel,
    pattern: Pattern,
    prompts: list[str],
    k: int,
    *,
    seed: int | tuple[int, ...],
    first: int = 0,
    temperature: float,
    dtype: torch.dtype,
    max_new_tokens: int | None = None,
    max_rows: int = 128,
    progress: bool = False,
) -> Rollout:
    """`k` responses to each prompt, up to the context's end or `max_new_tokens`. Same seed, device and dtype: same tokens.

    first: index of the first prompt among all that share the seed. max_rows: most rows drawn at once.
    """
    prefixes = [pattern.prefix(prompt) for prompt in prompts]
    context = context_length(model)
    drawn = sample(
        model, prefixes, k, eos_id=pattern.eos_id, vocabulary=pattern.size, seed=seed, first=first, temperature=temperature,
        dtype=dtype, max_new_tokens=max_new_tokens, max_rows=max_rows, progress=progress,
    )  # fmt: skip
    flat = [
        (prompt, prefix, completion)
        for prompt, prefix, completions in zip(prompts, prefixes, drawn, strict=True)
        for completion in completions
    ]
    return Rollout(
        prompts=[prompt for prompt, _, _ in flat],
        rows=[prefix + completion.ids for _, prefix, completion in flat],
        starts=[len(prefix) for _, prefix, _ in flat],
        parsed=[pattern.parse(completion.ids) for _, _, completion in flat],
        room=[min(context - len(prefix), max_new_tokens or context) - len(completion.ids) for _, prefix, completion in flat],
        sampler_logps=torch.tensor([logp for _, _, completion in flat for logp in completion.logps], device=model.device),
    )


@torch.no_grad()
@cast_once()
def rollout_logps(
    model: PreTrainedModel,
    pattern: Pattern,
    batch: Rollout,
    micro: list[list[int]],
    *,
    temperature: float,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Log-probabilities of every response's tokens under any model, one tensor per row, nats.

    micro: which rows go through the model together (`token_budget_batches`).
    """
    logps: list[torch.Tensor] = [torch.empty(0)] * len(batch.rows)
    for part in micro:
        rows, starts = [batch.rows[i] for i in part], [batch.starts[i] for i in part]
        sizes = [len(row) - start for row, start in zip(rows, starts, strict=True)]
        law = {"temperature": temperature, "vocabulary": pattern.size}
        flat = response_logps(model, rows, starts, pattern.pad_id, dtype=dtype, **law)
        for i, logp in zip(part, flat.split(sizes), strict=True):
            logps[i] = logp
    return logps
