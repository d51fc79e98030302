"""TRL's GRPO and RLOO trainers on our prompts, pattern and reward: the peer in `vs_trl.py` and `rl_step.py`."""

import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from reward import Sample
from storygen.checkpoint import load_model
from storygen.pattern import Pattern

Kind = Literal["grpo", "rloo"]


def positions_from_mask(model: PreTrainedModel) -> None:
    """Give left-padded rows their own positions: otherwise GPT-2 counts the padding, and its log-probabilities are wrong."""
    plain = model.transformer.forward

    def forward(*args, position_ids=None, attention_mask=None, **kwargs):
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        return plain(*args, position_ids=position_ids, attention_mask=attention_mask, **kwargs)

    model.transformer.forward = forward


def run_trl(
    kind: Kind,
    folder: str,
    prompts: list[str],
    reward: Callable[[list[Sample]], list[float]],
    *,
    steps: int,
    k: int,
    minibatches: int,
    max_new_tokens: int,
    lr: float,
    warmup: int,
    beta: float,
    seed: int,
    out: str,
    dtype: torch.dtype,
    min_new_tokens: int | None = None,
    after_step: Callable[[int, PreTrainedModel], None] = lambda step, model: None,
) -> list[dict[str, float]]:
    """Take `steps` steps on `prompts`, an equal share per step, in order, `k` samples each; returns figures per step.

    As in our recipe: `minibatches` optimizer steps on each step's samples, AdamW with our epsilon and betas, constant
    learning rate after `warmup`, gradient norm 1, no dropout, no gradient checkpointing. The algorithm itself (loss,
    advantages, clipping) is TRL's default; GRPO's KL coefficient is `beta`, RLOO's is its own. If min_new_tokens =
    max_new_tokens, samples have equal length. `dtype` is that of the arithmetic. `after_step(step, model)` does not count in
    the figures.

    Figures per step: seconds, generate_s, reward_s, tokens (of the responses).
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    model, tokenizer = load_model(folder, "cpu")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    positions_from_mask(model)
    pattern, tokenizer.padding_side = Pattern(tokenizer), "left"
    texts = [tokenizer.decode(pattern.prefix(prompt)) for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        if tokenizer(text)["input_ids"] != pattern.prefix(prompt):
            raise ValueError(f"TRL would tokenise this prompt in another way: {prompt!r}")
    now = {"seconds": 0.0, "generate_s": 0.0, "reward_s": 0.0, "tokens": 0}
    figures: list[dict[str, float]] = []

    def rewarded(plain, completion_ids, **_) -> list[float]:
        clock = time.perf_counter()
        parsed = [pattern.parse(list(ids)) for ids in completion_ids]
        room = [max_new_tokens - len(ids) for ids in completion_ids]
        rewards = reward([Sample(p, **vars(one), room=r) for p, one, r in zip(plain, parsed, room, strict=True)])
        now["reward_s"] += time.perf_counter() - clock
        now["tokens"] += sum(map(len, completion_ids))
        return rewards

    class Watch(TrainerCallback):
        """Times each step from the end of the previous one; TRL counts every minibatch as a step."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.clock = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % minibatches == 0:
                figures.append(now | {"seconds": time.perf_counter() - self.clock})
                now.update(reward_s=0.0, generate_s=0.0, tokens=0)
                after_step(state.global_step // minibatches, model)
                model.train()
                self.clock = time.perf_counter()

    lengths = {} if min_new_tokens is None else {"min_new_tokens": min_new_tokens}
    trainer_class, config_class = (GRPOTrainer, GRPOConfig) if kind == "grpo" else (RLOOTrainer, RLOOConfig)
    own = {"beta": beta} if kind == "grpo" else {}
    config = config_class(
        output_dir=out, use_cpu=True, bf16=dtype == torch.bfloat16, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, seed=seed, shuffle_dataset=False, num_generations=k, max_steps=steps * minibatches,
        per_device_train_batch_size=len(prompts) // steps * k // minibatches, steps_per_generation=minibatches,
        max_completion_length=max_new_tokens, temperature=1.0, generation_kwargs=lengths, gradient_checkpointing=False,
        learning_rate=lr, lr_scheduler_type="constant_with_warmup", warmup_steps=warmup * minibatches,
        adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-5, weight_decay=0.0, max_grad_norm=1.0, **own,
    )  # fmt: skip
    trainer = trainer_class(
        model=model, args=config, processing_class=tokenizer, reward_funcs=rewarded, callbacks=[Watch()],
        train_dataset=Dataset.from_dict({"prompt": texts, "plain": prompts}),
    )  # fmt: skip
    plain_generate = trainer._generate_single_turn

    def timed(*args, **kwargs):
        clock = time.perf_counter()
        done = plain_generate(*args, **kwargs)
        now["generate_s"] += time.perf_counter() - clock
        return done

    trainer._generate_single_turn = timed
    trainer.train()
    return figures
