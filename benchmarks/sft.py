"""How fast does fine-tuning read, compared with the Trainer of transformers?

    python benchmarks/sft.py --data artifacts/data --model artifacts/oneshot [--quick]

All sides take the same optimizer steps on the same formatted rows from the same weights: loss on outline, story and `<eos>`,
AdamW at one learning rate, no dropout, same arithmetic and threads, in turn in one process. `trainer` pads every batch to
its longest row; `grouped` is the Trainer with batches of similar length, which needs its own row order; ours splits a batch
into micro-batches of similar length and projects only the response tokens. Padding does not count as tokens.

ratio_vs_trainer, ratio_vs_grouped   our tokens/s over theirs, medians over rounds
peak_gb                              peak memory of this process, all three sides included
loss_gap                             largest difference between our loss and `trainer`'s at the same step, on the same rows
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import nn

sys.path[0] = str(Path(__file__).resolve().parents[1])
from storygen.batching import context_length, token_budget_batches
from storygen.checkpoint import load_model
from storygen.corpus import load_sft
from storygen.logprobs import cast_once, pick_dtype, response_logps
from storygen.memory import keep_freed_memory, peak_memory
from storygen.pattern import Pattern


@dataclass
class Args:
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    model: str = "artifacts/oneshot"
    """Model folder made by pattern_learning.py."""
    rows: int = 16
    """Rows per optimizer step."""
    steps: int = 10
    rounds: int = 3
    lr: float = 1e-4
    micro_tokens: int = 1536
    """Tokens per forward and backward pass of ours, including padding."""
    quick: bool = False
    """3 steps of 6 rows, one round."""


Batch = list[tuple[list[int], int]]


def fresh(args: Args, dtype: torch.dtype = torch.float32):
    model, tokenizer = load_model(args.model, "cpu", dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, tokenizer


def ours(args: Args, batches: list[Batch], dtype: torch.dtype) -> tuple[float, list[float]]:
    """Seconds for all steps, and the loss of each, nats per response token."""
    model, tokenizer = fresh(args, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    losses, clock = [], time.perf_counter()
    for batch in batches:
        count = sum(len(ids) - start for ids, start in batch)
        loss = 0.0
        with cast_once():
            for micro in token_budget_batches([len(ids) for ids, _ in batch], args.micro_tokens):
                rows, starts = [batch[i][0] for i in micro], [batch[i][1] for i in micro]
                part = -response_logps(model, rows, starts, tokenizer.pad_token_id, dtype=dtype).sum() / count
                part.backward()
                loss += part.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return time.perf_counter() - clock, losses


def trainer(args: Args, batches: list[Batch], dtype: torch.dtype, grouped: bool) -> tuple[float, list[float]]:
    """The same with the Trainer; `grouped`: the same rows in its own order, by similar length."""
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    model, tokenizer = fresh(args)
    data = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * start + ids[start:]}
        for batch in batches
        for ids, start in batch
    ]
    clock = {"start": 0.0, "end": 0.0}

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock["start"] = time.perf_counter()

        def on_train_end(self, *_, **__):
            clock["end"] = time.perf_counter()

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return super()._get_train_sampler(train_dataset) if grouped else SequentialSampler(data)

    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            output_dir=out, use_cpu=True, bf16=dtype == torch.bfloat16, per_device_train_batch_size=args.rows,
            max_steps=len(batches), learning_rate=args.lr, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
            optim="adamw_torch_fused", report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
            train_sampling_strategy="group_by_length" if grouped else "random",
        )  # fmt: skip
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        made = InOrder(model=model, args=settings, train_dataset=data, data_collator=collate, callbacks=[Watch()])
        made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    return clock["end"] - clock["start"], [float(loss) for loss in losses]


def main(args: Args) -> None:
    keep_freed_memory()
    if args.quick:
        args = replace(args, rows=6, steps=3, rounds=1)
    model, tokenizer = fresh(args)
    pattern, context, dtype = Pattern(tokenizer), context_length(model), pick_dtype("auto", "cpu")
    fitted = [pattern.fit(r["prompt"], r["think"], r["story"], context) for r in load_sft(args.data, "train")]
    rows = [row for row in fitted if row is not None][: args.rows * args.steps]
    batches = [rows[i : i + args.rows] for i in range(0, len(rows), args.rows)]
    tokens = sum(len(ids) for ids, _ in rows)
    sides = {
        "ours": lambda: ours(args, batches, dtype),
        "trainer": lambda: trainer(args, batches, dtype, grouped=False),
        "grouped": lambda: trainer(args, batches, dtype, grouped=True),
    }
    speed: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for side, call in sides.items():
            took, losses[side] = call()
            speed[side].append(tokens / took)
    print(f"{torch.get_num_threads()} threads, {dtype}, {len(batches)} steps of {args.rows} rows, {tokens} tokens; tokens/s")
    print(f"{'':8} {'min':>8} {'median':>8} {'max':>8}   loss of the first and the last step")
    for side, one in speed.items():
        print(
            f"{side:8} {min(one):8.0f} {statistics.median(one):8.0f} {max(one):8.0f}   {losses[side][0]:.4f} {losses[side][-1]:.4f}"
        )
    gap = max(abs(a - b) for a, b in zip(losses["ours"], losses["trainer"], strict=True))
    middle = {side: statistics.median(one) for side, one in speed.items()}
    print(json.dumps({
        "bench": "sft",
        "ratio_vs_trainer": middle["ours"] / middle["trainer"],
        "ratio_vs_grouped": middle["ours"] / middle["grouped"],
        "loss_gap": gap,
        "peak_gb": peak_memory(),
    }))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
