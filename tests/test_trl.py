"""Where our definitions match TRL's, the same tensors give the same numbers."""

import pytest
import torch
from datasets import Dataset

from storygen.logprobs import response_logps
from storygen.ppo import advantages, policy_loss
from tests.conftest import tiny_gpt2

REWARDS = [0.9, 0.1, 0.4, 0.2, 0.7, 0.7, 0.6, 0.5]
PROMPTS = ["a lamp"] * 4 + ["the sea rose"] * 4
RESPONSES = [[7, 8, 9], [5, 6], [11, 12, 13, 14, 15], [20], [21, 22], [30, 31, 32], [33], [40, 41, 42, 43]]


def trainer(kind: str, tmp_path, **settings):
    """A GRPO or RLOO trainer in evaluation mode (no dropout) that "samples" RESPONSES and rewards them with REWARDS."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    model, tokenizer = tiny_gpt2()
    tokenizer.padding_side = "left"
    trainer_class, config = (GRPOTrainer, GRPOConfig) if kind == "grpo" else (RLOOTrainer, RLOOConfig)
    args = config(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], num_generations=4, num_generations_eval=4,
        per_device_train_batch_size=8, per_device_eval_batch_size=8, **settings,
    )  # fmt: skip
    made = trainer_class(
        model=model, args=args, processing_class=tokenizer, reward_funcs=lambda **_: REWARDS,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )  # fmt: skip
    made.model.eval()
    made._generate_single_turn = lambda *_, **__: (RESPONSES, None) if kind == "grpo" else RESPONSES
    return made


def by_prompt(values) -> torch.Tensor:
    return torch.tensor(values).view(2, 4)


@pytest.mark.parametrize(
    ("kind", "settings", "mode"),
    [
        ("grpo", {"scale_rewards": "group"}, "group"),
        ("rloo", {"normalize_advantages": False, "beta": 0.0}, "loo"),
    ],
)
def test_advantages(tmp_path, kind, settings, mode):
    """RLOO's equal ours except for the scale: ours divides by the batch's deviation from the prompts' means."""
    theirs = trainer(kind, tmp_path, **settings)._generate_and_score_completions([{"prompt": p} for p in PROMPTS])
    theirs, ours = theirs["advantages"].view(2, 4), advantages(by_prompt(REWARDS), mode)
    if mode == "loo":
        rewards = by_prompt(REWARDS)
        theirs = theirs / ((rewards - rewards.mean(1, keepdim=True)).pow(2).mean().sqrt() + 1e-4)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("drift", [0.0, 0.8])
def test_loss_and_gradient(tmp_path, drift):
    """GRPO's token-level loss with two-sided clipping and the KL weighted by the ratio, on and off policy."""
    theirs = trainer(
        "grpo", tmp_path, loss_type="dapo", epsilon=0.2, epsilon_high=0.28, delta=3.0, use_bias_correction_kl=True
    )  # fmt: skip
    theirs.beta = 0.3  # given in the config, it would look for a reference model by name
    model, tokenizer = theirs.model, theirs.processing_class
    prompt, width = [100, 101, 102], max(map(len, RESPONSES))
    generator = torch.Generator().manual_seed(0)
    rows, mask = [prompt + response for response in RESPONSES], torch.zeros(len(RESPONSES), width, dtype=torch.long)
    padded = torch.full_like(mask, tokenizer.pad_token_id)
    for i, response in enumerate(RESPONSES):
        padded[i, : len(response)], mask[i, : len(response)] = torch.tensor(response), 1
    real = mask.bool()
    logps = response_logps(model, rows, [len(prompt)] * len(rows), tokenizer.pad_token_id)

    def moved() -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probabilities under another policy: flat as ours are, and padded as theirs are."""
        flat = logps.detach() + drift * torch.randn(len(logps), generator=generator)
        return flat, torch.zeros(mask.shape).masked_scatter(real, flat)

    (old, old_padded), (ref, ref_padded) = moved(), moved()
    advantage = 2 * torch.randn(len(rows), generator=generator)
    ours, _ = policy_loss(logps, old, ref, advantage[:, None].expand(mask.shape)[real], int(mask.sum()), beta=0.3)
    mine = torch.autograd.grad(ours, list(model.parameters()))
    their_loss = theirs._compute_loss(
        model,
        {
            "prompt_ids": torch.tensor([prompt] * len(rows)), "prompt_mask": torch.ones(len(rows), len(prompt), dtype=torch.long),
            "completion_ids": padded, "completion_mask": mask, "advantages": advantage, "num_items_in_batch": mask.sum(),
            "old_per_token_logps": old_padded, "ref_per_token_logps": ref_padded,
        },
    )  # fmt: skip
    assert ours.item() == pytest.approx(their_loss.item(), abs=1e-5)
    for a, b in zip(mine, torch.autograd.grad(their_loss, list(model.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
