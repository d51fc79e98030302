"""RL's update on one rollout: the gradient is the design's, whatever the batches."""

import copy
import dataclasses
import json
import math

import pytest
import torch

import rl_train
from rew_config import GUARDS, RewardConfig
from reward import Sample, Score
from rl_train import Args, ForeignSamples, learn, next_state
from storygen.cli import InputError
from storygen.rollout import rollout

PROMPTS = ["A dog.", "A lamp that was lit every night.", "Rain.", "The sea rose."]
ADVANTAGES = [1.0, -0.5, 0.2, -1.5, 0.7, 0.0, -0.3, 0.4]
ARGS = Args(
    prompts=4, k=2, lr=0.1, warmup=1, minibatches=1, micro_tokens=10_000, max_grad_norm=1e9, kl_stop=1e9
)  # fmt: skip


@pytest.fixture(scope="module")
def batch(tiny):
    model, _, pattern = tiny
    return rollout(model, pattern, PROMPTS, 2, seed=3, temperature=1.0, dtype=torch.float32, max_new_tokens=40)


def updated(tiny, batch, advantages=ADVANTAGES, beta=0.0, dtype=torch.float32, **settings):
    """Weights after `learn` by plain gradient descent, from the fixture's model as policy and reference; its metrics."""
    model, _, pattern = tiny
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    args = dataclasses.replace(ARGS, **settings)
    by_prompt = torch.tensor(advantages).view(4, 2)
    stats = learn(policy, model, optimizer, batch, by_prompt, range(4), beta, 1, args, pattern, dtype)
    return flat(policy), stats


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_one_epoch_and_minibatch_is_reinforce(tiny, batch):
    """Against d/dw of mean A ln p, by a plain unpadded forward of every row: eos inside the mean, the prompt outside."""
    model, _, pattern = tiny
    plain = copy.deepcopy(model)
    terms = []
    for row, start, advantage in zip(batch.rows, batch.starts, ADVANTAGES):
        logps = plain(torch.tensor([row])).logits[0, :, : pattern.size].log_softmax(-1)
        terms.append(advantage * logps[start - 1 : -1].gather(-1, torch.tensor(row[start:])[:, None])[:, 0])
    (-torch.cat(terms).mean()).backward()
    expected = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in plain.parameters()])
    weights, stats = updated(tiny, batch, beta=0.5)  # at the reference itself the KL's gradient is zero
    start = flat(model)
    assert (expected - start).norm() > 0.01
    assert ((weights - expected).norm() / (expected - start).norm()).item() < 1e-3
    assert stats["policy/approx_kl"] == pytest.approx(0, abs=1e-6) and stats["policy/clipfrac"] == 0


@pytest.mark.parametrize("micro_tokens", [1, 150])
def test_micro_batches_do_not_change_the_step(tiny, batch, micro_tokens):
    whole, stats = updated(tiny, batch, beta=0.1)
    split, others = updated(tiny, batch, beta=0.1, micro_tokens=micro_tokens)
    assert torch.allclose(whole, split, atol=1e-5)
    assert others == pytest.approx(stats, abs=1e-4)


def test_weights_cast_once_a_minibatch_take_the_same_steps_in_bf16(tiny, monkeypatch):
    """A cast that outlived an update, or that a pass without gradients had left behind, would change or stop them."""
    model, _, pattern = tiny
    drawn = rollout(model, pattern, PROMPTS, 2, seed=3, temperature=1.0, dtype=torch.bfloat16, max_new_tokens=40)
    settings = {"lr": 1.0, "minibatches": 2, "epochs": 2, "micro_tokens": 60, "dtype": torch.bfloat16}
    once, stats = updated(tiny, drawn, **settings)
    monkeypatch.setattr(rl_train, "cast_once", lambda: lambda function: function)
    anew, _ = updated(tiny, drawn, **settings)
    assert stats["policy/updates"] == 4
    assert torch.equal(once, anew) and not torch.equal(once, flat(model))


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tiny, batch):
    weights, stats = updated(tiny, batch, [float("nan"), *ADVANTAGES[1:]])
    assert stats["policy/skipped"] == 1 and stats["policy/updates"] == 0
    assert torch.equal(weights, flat(tiny[0]))
    assert all(math.isfinite(value) for value in stats.values())


def test_a_step_that_moves_too_far_stops(tiny, batch):
    """The second pass sees KL(old || new) over the limit and is left out; within the limit both passes count."""
    assert updated(tiny, batch, epochs=2)[1]["policy/updates"] == 2
    assert updated(tiny, batch, epochs=2, kl_stop=1e-9)[1]["policy/updates"] == 1


def test_old_log_probabilities_are_those_before_the_first_step(tiny, batch):
    """Two minibatches: the second meets weights that the first has moved, and its ratios show it."""
    _, one = updated(tiny, batch)
    _, two = updated(tiny, batch, minibatches=2)
    assert two["policy/updates"] == 2 and two["policy/approx_kl"] > 1e-5
    for key in ("objective/entropy", "objective/kl", "policy/sampler_gap"):
        assert two[key] == pytest.approx(one[key], abs=1e-5)


def test_samples_of_another_policy_are_refused_before_anything_changes(tiny, batch):
    model, _, pattern = tiny
    policy = copy.deepcopy(model)
    with torch.no_grad():
        policy.transformer.h[0].mlp.c_fc.weight.mul_(1.1)
    before = flat(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with pytest.raises(ForeignSamples, match="nats a token"):
        learn(policy, model, optimizer, batch, torch.rand(4, 2), range(4), 0.1, 1, ARGS, pattern, torch.float32)
    assert torch.equal(before, flat(policy)) and all(p.grad is None for p in policy.parameters())


def a_step(words: int, prose: float, verdict: str = "ok") -> tuple[list[Sample], list[Score]]:
    """Eight stories of `words` words whose only varying part is prose."""
    parts = dict.fromkeys(RewardConfig().weights(), 0.0) | {"length": 1.0, "prose": prose}
    score = Score(0.5, verdict, parts, dict.fromkeys(GUARDS, 1.0), {})
    return [Sample("A dog.", "It barks.", "word " * words, True)] * 8, [score] * 8


@pytest.mark.parametrize(
    "step, target",
    [
        (a_step(80, 0.8), 102.0),
        (a_step(80, 0.7), 100.0),  # longer, but worse in another part than the running mean: by six standard errors
        (a_step(79, 0.8), 100 / 1.02),
        (a_step(120, 0.8, "no_eos"), 100 / 1.02),
    ],
)
def test_length_target_rises_while_the_rest_holds(step, target):
    weight = RewardConfig().weights()["prose"]
    state = {
        "length_target": 100.0, "length_low": 50.0, "length_high": 200.0, "beta": 0.1, "skipped_in_a_row": 0,
        "quality_mean": 0.8 * weight, "quality_std": 0.05 * weight,
    }  # fmt: skip
    after = next_state(state, *step, kl=0.05, skipped=0, args=ARGS)
    assert after["length_target"] == pytest.approx(target)
    assert next_state(json.loads(json.dumps(state)), *step, kl=0.05, skipped=0, args=ARGS) == after


@pytest.mark.parametrize(
    "failing", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 GB")]
)
def test_an_update_that_runs_out_of_memory_takes_the_same_step_in_smaller_passes(tiny, batch, monkeypatch, capsys, failing):
    plain, whole = rl_train.response_logps, updated(tiny, batch)
    sizes = []

    def short_of_memory(model, rows, *args, **kwargs):
        sizes.append(len(rows) * max(map(len, rows)))
        if sizes[-1] > 200:
            raise failing
        return plain(model, rows, *args, **kwargs)

    monkeypatch.setattr(rl_train, "response_logps", short_of_memory)
    monkeypatch.setattr("storygen.rollout.response_logps", short_of_memory)
    weights, stats = updated(tiny, batch, micro_tokens=1000)
    assert torch.allclose(weights, whole[0], atol=1e-5) and stats == pytest.approx(whole[1], abs=1e-4)
    assert max(sizes) > 200 and "micro_tokens 1000 -> 500, same work again" in capsys.readouterr().err


def test_a_single_row_too_large_for_memory_is_told(tiny, batch, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(rl_train, "response_logps", no_memory)
    with pytest.raises(InputError, match="out of memory at --micro-tokens"):
        updated(tiny, batch)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny, batch, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(rl_train, "response_logps", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        updated(tiny, batch)
