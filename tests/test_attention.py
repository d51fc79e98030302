"""Attention by plain products equals that of transformers, for every shape a model may ask for."""

import pytest
import torch
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

from storygen.attention import PLAIN, attend
from tests.conftest import tiny_gpt2


@pytest.fixture
def model():
    return tiny_gpt2()[0]


def logits(model, attention: str, ids: torch.Tensor, **inputs) -> torch.Tensor:
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def test_a_causal_pass_and_its_gradient_equal_eager_attention(model):
    ids = torch.randint(0, 500, (3, 37), generator=torch.Generator().manual_seed(0))
    found = {}
    for attention in ("eager", PLAIN):
        model.set_attn_implementation(attention)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found[attention] = [parameter.grad.clone() for parameter in model.parameters()]
    for ours, theirs in zip(found[PLAIN], found["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model, PLAIN, ids), logits(model, "eager", ids), atol=1e-5, rtol=1e-4)


def test_padding_on_the_left_is_not_seen(model):
    ids = torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    ours, theirs = (logits(model, attention, ids, **inputs) for attention in (PLAIN, "eager"))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[mask == 1], theirs[mask == 1], atol=1e-5, rtol=1e-4)
    alone = logits(model, PLAIN, ids[:1, 7:])
    torch.testing.assert_close(ours[0, 7:], alone[0], atol=1e-4, rtol=1e-4)


def test_generate_with_its_cache_writes_the_same(model):
    ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(2))
    written = {}
    for attention in ("eager", PLAIN):
        model.set_attn_implementation(attention)
        written[attention] = model.generate(ids, do_sample=False, max_new_tokens=30, pad_token_id=0)
    assert torch.equal(written[PLAIN], written["eager"])


def test_under_autocast_it_stays_in_bf16_and_is_as_exact():
    query, key, value = torch.randn(3, 2, 4, 50, 16, generator=torch.Generator().manual_seed(3)).unbind()
    seen = torch.ones(50, 50, dtype=torch.bool).tril()[None, None].expand(2, 1, 50, 50)
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    module = torch.nn.Identity().eval()
    exact, _ = eager_attention_forward(module, query, key, value, bias)
    half = [x.bfloat16() for x in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = eager_attention_forward(module, *half, bias)
        for mask in (seen, None):
            ours, _ = attend(module, *half, mask)
            assert ours.dtype == torch.bfloat16
            assert (ours - exact).abs().mean() < 1.1 * (theirs - exact).abs().mean()


def test_dropout_falls_on_the_weights():
    query, key = torch.randn(2, 1, 1, 400, 8, generator=torch.Generator().manual_seed(4)).unbind()
    module = torch.nn.Identity().train()
    torch.manual_seed(0)
    mixed, _ = attend(module, query, key, torch.ones(1, 1, 400, 1).expand(1, 1, 400, 8), None, dropout=0.3)
    assert mixed.std() > 0.01 and mixed.mean().item() == pytest.approx(1, abs=0.05)
    mixed, _ = attend(module.eval(), query, key, torch.ones(1, 1, 400, 1).expand(1, 1, 400, 8), None, dropout=0.3)
    torch.testing.assert_close(mixed, torch.ones_like(mixed))
