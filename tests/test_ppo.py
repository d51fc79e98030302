import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storygen.ppo import adapt_beta, advantages, next_length_target, policy_loss


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    centred_rms = math.sqrt((0.25 + 0.25 + 0 + 0) / 4)
    loo = advantages(rewards, "loo")
    assert torch.allclose(loo, torch.tensor([[1.0, -1.0], [0.0, 0.0]]) / (centred_rms + 1e-4))
    group = advantages(rewards, "group")
    assert torch.allclose(group[0], torch.tensor([0.5, -0.5]) / (math.sqrt(0.5) + 1e-4)) and group[1].abs().max() == 0
    batch = advantages(rewards, "batch")
    assert torch.allclose(batch, (rewards - 0.5) / (rewards.std() + 1e-4))
    assert torch.equal(advantages(rewards, "raw"), rewards)
    with pytest.raises(ValueError, match="there are: loo, group, batch, raw, decoupled"):
        advantages(rewards, "rloo")


def test_decoupled_advantages_by_hand():
    """Each part counts by its weight alone, however small its spread compared with the others'."""
    big, small = torch.tensor([[1.0, 0.0], [3.0, 3.0]]), torch.tensor([[0.0, 0.01], [0.02, 0.0]])
    weights = torch.tensor([0.75, 0.25])
    parts = torch.stack([big, small])
    z = 0.5 / (math.sqrt(0.5) + 1e-4)  # two samples 1 apart, in units of their own deviation
    thin = 0.005 / (0.01 * math.sqrt(0.5) + 1e-4), 0.01 / (0.02 * math.sqrt(0.5) + 1e-4)
    a = 0.75 * z - 0.25 * thin[0]
    summed = torch.tensor([[a, -a], [0.25 * thin[1], -0.25 * thin[1]]])
    expected = (summed - summed.mean()) / (summed.std() + 1e-4)
    rewards = torch.einsum("w,wps->ps", weights, parts)
    assert torch.allclose(advantages(rewards, "decoupled", parts, weights), expected, atol=1e-5)


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 10_000), st.floats(-3, 3))
def test_baselines_ignore_a_shift_and_stay_in_bounds(prompts, k, seed, shift):
    rewards = torch.rand(prompts, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for mode in ("loo", "group", "batch"):
        a = advantages(rewards, mode)
        assert a.abs().max() <= 5 and torch.allclose(a, advantages(rewards + shift, mode), atol=1e-6)
    assert advantages(rewards, "loo").sum(1).abs().max() < 1e-6


def test_leave_one_out_needs_company():
    with pytest.raises(ValueError, match="at least 2"):
        advantages(torch.zeros(3, 1), "loo")


def by_hand(logp, old, ref, a, beta):
    """The design's formula for one token, in plain Python."""
    ratio = math.exp(logp - old)
    surrogate = min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
    if a < 0:
        surrogate = max(surrogate, 3 * a)
    d = logp - ref
    return -surrogate + beta * ratio * (math.exp(-d) - 1 + d)


def test_loss_by_hand_and_by_micro_batches():
    generator = torch.Generator().manual_seed(0)
    logp, old, ref = (-3 * torch.rand(40, generator=generator, dtype=torch.float64) for _ in range(3))
    a = torch.randn(40, generator=generator, dtype=torch.float64)
    expected = sum(by_hand(*(x.item() for x in row), 0.1) for row in zip(logp, old, ref, a)) / 40
    loss, stats = policy_loss(logp, old, ref, a, 40, beta=0.1)
    assert loss.item() == pytest.approx(expected, abs=1e-12) and stats.loss == loss.item()
    parts = [policy_loss(logp[i], old[i], ref[i], a[i], 40, beta=0.1)[0] for i in torch.arange(40).split(7)]
    assert sum(parts).item() == pytest.approx(expected, abs=1e-12)


def test_on_policy_gradient_is_reinforce_plus_the_gradient_of_k2():
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64)
    a = torch.tensor([0.7, -1.2, 0.0], dtype=torch.float64)
    loss, stats = policy_loss(logp, logp.detach().clone(), ref, a, 3, beta=0.2)
    loss.backward()
    assert torch.allclose(logp.grad, (-a + 0.2 * (logp.detach() - ref)) / 3)
    assert stats.approx_kl == 0 and stats.clipped == 0


def test_gradient_stops_outside_the_clip_range():
    old = torch.zeros(4)
    logp = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    a = torch.tensor([1.0, -1.0, -1.0, 1.0])
    loss, stats = policy_loss(logp, old, logp.detach(), a, 4, beta=0.0)
    loss.backward()
    assert logp.grad[:2].abs().max() == 0 and logp.grad[2:].abs().min() > 0 and stats.clipped == 2
    far = torch.tensor([2.0], requires_grad=True)  # ratio 7.4 at a negative advantage: the dual clip holds the loss at 3
    loss, _ = policy_loss(far, torch.zeros(1), torch.zeros(1), torch.tensor([-1.0]), 1, beta=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(3.0) and far.grad.item() == 0


def test_kl_term_is_an_unbiased_estimate():
    """Mean of ratio * k3 over samples of the old policy equals the exact KL of the new policy to the reference."""
    generator = torch.Generator().manual_seed(1)
    new, old, ref = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(3))
    exact = (new.exp() * (new - ref)).sum()
    mean = sum(
        old[i].exp() * policy_loss(new[i : i + 1], old[i : i + 1], ref[i : i + 1], torch.zeros(1), 1, beta=1.0)[1].kl
        for i in range(6)
    )
    assert mean.item() == pytest.approx(exact.item(), abs=1e-9)


def test_controllers():
    assert adapt_beta(0.1, 0.2, 0.1) > 0.1 > adapt_beta(0.1, 0.05, 0.1)
    assert adapt_beta(0.0, 9.0, 0.1) == 0.0  # no KL term
    assert adapt_beta(0.1, 0.1, 0.1) == 0.1 and adapt_beta(1.0, 9.0, 0.1) == 1.0


def test_length_target_follows_the_samples():
    assert next_length_target(100, 0.7, False, 50, 200) == pytest.approx(102)
    assert next_length_target(100, 0.7, True, 50, 200) == 100
    assert next_length_target(100, 0.5, False, 50, 200) == 100
    assert next_length_target(100, 0.29, True, 50, 200) == pytest.approx(100 / 1.02)
    assert next_length_target(199.9, 1.0, False, 50, 200) == 200 and next_length_target(50, 0.0, False, 50, 200) == 50


@given(st.floats(60, 120), st.integers(0, 1000))
def test_length_target_settles_where_the_samples_are(median, seed):
    """From below it stops as soon as fewer than 70% of the stories reach 0.8 of it, from above as soon as 30% do."""
    lengths = np.random.default_rng(seed).lognormal(math.log(median), 0.3, 500)

    def reached(target: float) -> float:
        return (lengths >= 0.8 * target).mean()

    ends = []
    for target in (40.0, 400.0):
        for _ in range(200):
            target = next_length_target(target, reached(target), False, 40, 400)
        ends.append(target)
    assert reached(ends[0]) < 0.7 <= reached(ends[0] / 1.02 - 1e-9) and reached(1.02 * ends[1] + 1e-9) < 0.3 <= reached(
        ends[1]
    )
