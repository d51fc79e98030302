"""What RL learns from: responses, where they start, and their log-probabilities."""

import pytest
import torch

from storygen.batching import context_length, token_budget_batches
from storygen.rollout import rollout, rollout_logps

PROMPTS = ["A dog.", "A lamp that was lit every night for a sailor who never came back.", "Rain."]


@pytest.fixture(scope="module")
def drawn(tiny):
    model, _, pattern = tiny
    return rollout(model, pattern, PROMPTS, 3, seed=7, temperature=0.9, dtype=torch.float32)


def test_rows_are_the_prompts_prefix_and_what_was_drawn(tiny, drawn):
    model, _, pattern = tiny
    assert drawn.prompts == [prompt for prompt in PROMPTS for _ in range(3)]
    for prompt, row, start, parsed, room in zip(drawn.prompts, drawn.rows, drawn.starts, drawn.parsed, drawn.room):
        assert row[:start] == pattern.prefix(prompt) and parsed == pattern.parse(row[start:])
        assert len(row) + room == context_length(model) and parsed.finished == (row[-1] == pattern.eos_id)
        assert room == 0 or parsed.finished
    assert len({tuple(row) for row in drawn.rows}) == len(drawn.rows)


@pytest.mark.parametrize("budget", [1, 400, 10_000])
def test_log_probabilities_are_the_samplers_whatever_the_batches(tiny, drawn, budget):
    model, _, pattern = tiny
    micro = token_budget_batches([len(row) for row in drawn.rows], budget)
    logps = rollout_logps(model, pattern, drawn, micro, temperature=0.9, dtype=torch.float32)
    assert [len(logp) for logp in logps] == [len(row) - start for row, start in zip(drawn.rows, drawn.starts)]
    assert torch.allclose(torch.cat(logps), drawn.sampler_logps, atol=1e-3)
    assert drawn.response_tokens() == len(drawn.sampler_logps)


def test_new_tokens_are_capped(tiny):
    model, _, pattern = tiny
    capped = rollout(model, pattern, PROMPTS, 2, seed=7, temperature=1.0, dtype=torch.float32, max_new_tokens=9)
    for row, start, room, parsed in zip(capped.rows, capped.starts, capped.room, capped.parsed):
        assert len(row) - start + room == 9 and (room == 0 or parsed.finished)
