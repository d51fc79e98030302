"""Stage 2: teach a base model the pattern, first with a static example before every row, then without.

    python pattern_learning.py --mode oneshot
    python pattern_learning.py --mode zeroshot
    torchrun --nproc-per-node 2 pattern_learning.py --mode zeroshot    # the same steps, shared by two processes or GPUs

The loss covers only what the model has to write itself: outline, `<story>`, story and `<eos>` of the real row, never the
example or the prompt. The weights with the lowest loss on validation rows, measured as in training, are kept. To resume a
stopped run, give the same command again.
"""

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from storygen.batching import context_length, token_budget_batches
from storygen.card import push, write_card
from storygen.checkpoint import Interrupt, load_model, load_state, save_model, save_state
from storygen.cli import InputError, as_json, check_flags, check_folder, claim, fill, pick_device, run, write_atomically
from storygen.corpus import load_manifest, load_sft, spread
from storygen.logprobs import Precision, cast_once, check_head, pick_dtype, response_logps
from storygen.memory import Shape, free_memory, halve_until_it_fits, keep_freed_memory, peak_memory, plan
from storygen.pattern import Pattern, add_pattern_tokens
from storygen.processes import add, add_gradients, check_shared, deal, gather, join, share
from storygen.sampler import sample
from storygen.tracking import Log, TrackerName, Trackers, progress, show_sample

ROOT = Path(__file__).resolve().parent


@dataclass
class Args:
    mode: Literal["oneshot", "zeroshot"]
    """oneshot: a static example, drawn at random, precedes every row. zeroshot: the row alone."""
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py; its manifest names the preset."""
    out: Path | None = None
    """Model folder to write. Default: artifacts/oneshot or artifacts/zeroshot."""
    model: str | None = None
    """Starting model: a folder or hub name. Default: the preset's base model (oneshot), artifacts/oneshot (zeroshot)."""
    revision: str | None = None
    """Commit of a hub model. Default: the pinned one for the preset's base model, the newest for any other."""
    examples: Path = ROOT / "prompts" / "oneshot.jsonl"
    """The static one-shot examples: rows of prompt, think, story."""
    steps: int | None = None
    """Optimizer steps. Default by preset."""
    lr: float | None = None
    """Peak learning rate of AdamW. Default by preset."""
    warmup: int = 20
    """Steps of linear warm-up, followed by cosine decay to a tenth of the peak."""
    batch_tokens: int | None = None
    """Tokens per step, padding included. Default by preset."""
    micro_tokens: int | None = None
    """Maximum tokens per forward and backward pass, padding included. Reduced if memory is short, which changes the result
    only by rounding. Default by preset."""
    dropout: float = 0.0
    """Dropout during training, 0 to below 1. Sampling and RL run without it."""
    drill_share: float = 1.0
    """Average number of drill rows per real row: outline and story of random lengths, with a loss only on `<story>` and
    `<eos>`. Without them a small model learns which tag is due from distance alone: it ends a short story with a second
    `<story>`, and a long outline with `<eos>`."""
    tag_weight: float = 20.0
    """Loss weight of `<story>` and `<eos>`, the two tokens in some 300 that the grammar depends on; all others weigh 1."""
    adam_eps: float = 1e-5
    """AdamW's epsilon. At the usual 1e-8, embeddings of rare tokens, whose gradients are tiny, move as far as all others."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    eval_every: int | None = None
    """Steps between validations (losses, and one sample per held-out prompt). Default by preset."""
    eval_rows: int = 128
    """Validation rows to measure the loss on, spread over all of them."""
    eval_prompts: int = 64
    """How many of those rows' prompts to sample, for the share of well-formed completions."""
    rows: int = 64
    """Maximum samples drawn at once. Reduced if memory is short."""
    save_every: int = 100
    """Steps between checkpoints to resume from."""
    seed: int = 0
    """Seed of the data order, the examples drawn and the validation samples."""
    track: tuple[TrackerName, ...] = ("auto",)
    """Where to send metrics besides metrics.jsonl. auto: TensorBoard (OUT/tensorboard) if it is installed."""
    push_to_hub: str | None = None
    """Upload the finished model to the hub under this name (user/name), using the login of the `hf` command."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """Precision of the forward pass; weights stay fp32. auto: bf16 if the device multiplies it natively."""


@dataclass(frozen=True)
class Recipe:
    steps: int
    lr: float
    batch_tokens: int
    micro_tokens: int
    eval_every: int


RECIPES = {
    ("demo", "oneshot"): Recipe(steps=50, lr=5e-4, batch_tokens=4096, micro_tokens=1536, eval_every=50),
    ("demo", "zeroshot"): Recipe(steps=160, lr=5e-4, batch_tokens=4096, micro_tokens=1536, eval_every=80),
    # The default rate of transformers' Trainer and, roughly, its three epochs, over the 1.97K rows (and their drills).
    ("gpt2", "oneshot"): Recipe(steps=400, lr=5e-5, batch_tokens=16384, micro_tokens=8192, eval_every=50),
    ("gpt2", "zeroshot"): Recipe(steps=300, lr=5e-5, batch_tokens=16384, micro_tokens=8192, eval_every=50),
}
BASE_MODELS = {
    "demo": (str(ROOT / "base_model"), None),
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
}

AT_LEAST = dict.fromkeys(
    ("steps", "warmup", "batch_tokens", "micro_tokens", "eval_every", "eval_rows", "eval_prompts", "rows", "save_every"), 1
) | dict.fromkeys(("dropout", "drill_share", "tag_weight", "weight_decay", "seed"), 0)
ABOVE_ZERO = ("lr", "adam_eps", "max_grad_norm")


@dataclass(frozen=True)
class Row:
    """Token ids, the index of the first response token, and whether only the loss on tags counts (a drill)."""

    ids: list[int]
    start: int
    tags_only: bool = False


SENTENCE = re.compile(r"[^.!?]+[.!?]*[\"')]*\s*")


def load_examples(path: Path, pattern: Pattern) -> list[list[int]]:
    """The static examples as complete rows of ids, `<eos>` included."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [pattern.row(row["prompt"], row["think"], row["story"])[0] for row in rows]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: rows need the fields prompt, think and story as text ({error!r})") from None


def drill(text: dict[str, str], pattern: Pattern, generator: np.random.Generator) -> Row:
    """A row whose outline and story are each a random number of the story's first sentences."""
    sentences = SENTENCE.findall(text["story"])
    think, story = ("".join(sentences[:n]) for n in generator.integers(1, len(sentences) + 1, 2))
    return Row(*pattern.row(text["prompt"], think, story), tags_only=True)


def behind_examples(rows: list[Row], examples: list[list[int]], generator: np.random.Generator, context: int) -> list[Row]:
    """In one-shot mode, put an example drawn at random before every row, if the context holds both."""
    if not examples:
        return rows
    drawn = [(row, examples[generator.integers(len(examples))]) for row in rows]
    return [
        replace(row, ids=example + row.ids, start=len(example) + row.start)
        if len(example) + len(row.ids) <= context
        else row
        for row, example in drawn
    ]


def batches(rows: list[Row], texts: list[dict], examples: list[list[int]], pattern: Pattern, args: Args, context: int):
    """An endless stream of batches of rows, the same for the same seed."""
    for epoch in count():
        generator = np.random.default_rng((args.seed, epoch))
        counts = [int(args.drill_share + generator.random()) for _ in texts]
        drills = [drill(text, pattern, generator) for text, n in zip(texts, counts, strict=True) for _ in range(n)]
        drawn = behind_examples(rows + [row for row in drills if len(row.ids) <= context], examples, generator, context)
        for batch in token_budget_batches([len(row.ids) for row in drawn], args.batch_tokens, generator):
            yield [drawn[i] for i in batch]


def loss_weights(row: Row, pattern: Pattern, tag_weight: float) -> list[float]:
    """Loss weight of each response token: `tag_weight` for tags, 1 for the rest, or 0 in a drill."""
    tags = {pattern.story_id, pattern.eos_id}
    return [tag_weight if t in tags else float(not row.tags_only) for t in row.ids[row.start :]]


def loss_sum(
    model, batch: list[Row], pattern: Pattern, dtype: torch.dtype, tag_weight: float = 1.0
) -> tuple[torch.Tensor, float]:
    """Summed negative log-likelihood of the responses, nats, with tags weighted by `tag_weight`; and the sum of weights."""
    logps = response_logps(model, [r.ids for r in batch], [r.start for r in batch], pattern.pad_id, dtype=dtype)
    weights = torch.tensor([w for row in batch for w in loss_weights(row, pattern, tag_weight)], device=logps.device)
    return -(weights * logps).sum(), weights.sum().item()


def over_micro_batches(
    rows: list[Row], args: Args, work: Callable[[list[Row]], tuple[float, float]], begin: Callable[[], None] = lambda: None
) -> list[float]:
    """Sum both values that `work` returns per micro-batch of `rows`, over all processes, which share the rows.

    `begin` is called first. If memory runs out, the micro-batches are halved permanently and everything starts over.
    """
    mine = deal(sorted(rows, key=lambda row: -len(row.ids)))  # rows of similar length go to different processes
    lengths = [len(row.ids) for row in mine]

    @cast_once()
    def sums(micro_tokens: int) -> tuple[float, float]:
        begin()
        done = [work([mine[i] for i in micro]) for micro in token_budget_batches(lengths, micro_tokens)]
        return sum(a for a, _ in done), sum(b for _, b in done)

    return add(*halve_until_it_fits(args, "micro_tokens", max(lengths, default=0), sums))


@torch.no_grad()
def mean_loss(model, rows: list[Row], pattern: Pattern, args: Args, dtype: torch.dtype, tag_weight: float = 1.0) -> float:
    """Mean nats per response token over all rows, tags weighted by `tag_weight`."""

    def losses(micro: list[Row]) -> tuple[float, float]:
        loss, weight = loss_sum(model, micro, pattern, dtype, tag_weight)
        return loss.item(), weight

    total, weight = over_micro_batches(rows, args, losses)
    return total / weight


def learning_rate(step: int, args: Args) -> float:
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def main(args: Args) -> None:
    processes, device = join(pick_device(args.device))
    chief = processes.is_main_process  # the one that prints and writes
    keep_freed_memory()
    manifest = load_manifest(args.data)
    preset = manifest["preset"]
    print(f"preset {preset}, as {args.data}/manifest.json says")
    fill(args, RECIPES[preset, args.mode])
    args.out = args.out or Path("artifacts") / args.mode
    if args.model is None and args.mode == "oneshot":
        args.model, pinned = BASE_MODELS[preset]
        args.revision = args.revision or pinned
    args.model = args.model or "artifacts/oneshot"
    check_flags(args, AT_LEAST, ABOVE_ZERO)
    check_folder(args.out, "run.json")
    if (args.out / "samples.jsonl").exists():
        raise InputError(f"{args.out} holds an RL run: give another --out")
    if args.dropout >= 1:
        raise InputError(f"--dropout must be below 1, not {args.dropout:g}")
    dtype = pick_dtype(args.precision, device)
    print(json.dumps(as_json(args)))
    config = {name: value for name, value in as_json(args).items() if name not in ("track", "push_to_hub")}
    config["data_hashes"] = manifest["hashes"]

    free = free_memory(device)  # before the model takes its share
    model, tokenizer = load_model(args.model, device, args.revision, dtype)
    add_pattern_tokens(model, tokenizer)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = args.dropout
    pattern = Pattern(tokenizer)
    context = context_length(model)
    examples = load_examples(args.examples, pattern) if args.mode == "oneshot" else []
    if args.mode == "oneshot" and not examples:
        raise InputError(f"{args.examples} holds no example")
    rows, texts = {}, {}
    for split in ("train", "validation"):
        loaded = load_sft(args.data, split)
        fitted = [pattern.fit(r["prompt"], r["think"], r["story"], context) for r in loaded]
        rows[split] = [Row(*row) for row in fitted if row is not None]
        texts[split] = [r for r, row in zip(loaded, fitted) if row is not None]
        shortened = sum(
            len(row.ids) < len(pattern.row(r["prompt"], r["think"], r["story"])[0])
            for row, r in zip(rows[split], texts[split])
        )
        print(
            f"{split}: {len(rows[split])} rows, {shortened} shortened, {len(loaded) - len(rows[split])} dropped (context {context})"
        )
        if not rows[split]:
            raise InputError(f"{args.data} has no {split} row that fits a context of {context} tokens")
    longest_example = max(map(len, examples), default=0)
    longest_row = min(context, longest_example + max(len(row.ids) for split in rows.values() for row in split))
    if examples:
        alone = sum(longest_example + len(row.ids) > context for row in rows["train"])
        print(f"{alone} training rows have no room for the longest example and go without one when it is drawn")
    check_head(model, rows["train"][0].ids, pattern.pad_id)
    # Rows get the same example and drills are cut at the same place at every validation, so that losses are comparable.
    generator = np.random.default_rng(args.seed)
    drills = [drill(text, pattern, generator) for text in spread(texts["validation"], args.eval_rows)]
    drills = behind_examples([row for row in drills if len(row.ids) <= context], examples, generator, context)
    rows["validation"] = behind_examples(spread(rows["validation"], args.eval_rows), examples, generator, context)
    held_out = spread(rows["validation"], args.eval_prompts)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=args.adam_eps, weight_decay=args.weight_decay, fused=True
    )
    states, best_folder = args.out / "checkpoints", args.out / "best"
    lock = claim(args.out) if chief else None  # noqa: F841  held until the process ends
    state = load_state(states, model, optimizer)
    if state is not None and state["config"] != config:
        raise InputError(f"{args.out} holds an unfinished run with other settings: give another --out, or delete it")
    check_shared(state and state["step"], states)
    if state is None:
        needs = plan(
            Shape.of(model), rl=False, rows=min(args.rows, len(held_out)), micro_tokens=args.micro_tokens,
            longest_row=longest_row, longest_sample=context, dtype=dtype, on_cpu=device == "cpu", attention=model.config._attn_implementation, available=free,
        )  # fmt: skip
        print(needs)
        # A resumed run keeps these sizes, whatever is free then: rounding depends on them.
        sizes = {"rows": min(gather([needs.rows])), "micro_tokens": min(gather([needs.micro_tokens]))}
        state = {"step": 0, "best_loss": math.inf, "log_size": 0, **sizes}
    args.rows, args.micro_tokens = state["rows"], state["micro_tokens"]
    if chief:
        write_atomically(args.out / "run.json", json.dumps(config, indent=1))  # first: it tells whose folder this is
        trackers = Trackers(args.track, args.out, config, state["step"])
        log = Log(args.out / "metrics.jsonl", state["log_size"])
    interrupt = Interrupt()
    best_loss = state["best_loss"]

    def evaluate(step: int) -> dict:
        nonlocal best_loss
        model.eval()
        loss = mean_loss(model, rows["validation"], pattern, args, dtype)
        # What the stage is for: the loss on text alone is best after a few steps, before the tags are learnt.
        objective = mean_loss(model, rows["validation"] + drills, pattern, args, dtype, args.tag_weight)
        if not math.isfinite(objective):
            raise InputError(f"validation loss is not finite at step {step}: lower --lr")
        prefixes = [row.ids[: row.start] for row in held_out]
        mine = share(len(prefixes))
        draw = partial(
            sample, model, [prefixes[i] for i in mine], 1, eos_id=pattern.eos_id, vocabulary=pattern.size, seed=args.seed,
            first=mine.start, dtype=dtype,
        )  # fmt: skip
        drawn = halve_until_it_fits(args, "rows", 1, lambda rows: draw(max_rows=rows))
        parsed = gather([pattern.parse(completions[0].ids) for completions in drawn])
        if objective < best_loss:
            best_loss = objective
            if chief:
                save_model(model, tokenizer, best_folder)
        first = parsed[0]
        prompt = pattern.decode(prefixes[0][len(prefixes[0]) - prefixes[0][::-1].index(pattern.prompt_id) : -2])
        show_sample(f"step {step}: a held-out prompt ({first.verdict})", prompt, first.think, first.story)
        return {
            "val_loss": loss,
            "val_objective": objective,
            "well_formed": sum(p.verdict == "ok" for p in parsed) / len(parsed),
        }

    start = state["step"]
    stream = islice(batches(rows["train"], texts["train"], examples, pattern, args, context), start, None)
    last = {"val_loss": math.nan, "well_formed": math.nan}
    with progress(args.steps, start, f"{args.mode} learning", chief) as bar:
        for step in range(start, args.steps):
            clock = time.perf_counter()
            model.train()
            torch.manual_seed(
                (args.seed * 1_000_003 + step) % 2**63
            )  # seeds dropout per step, so that a resumed run draws the same
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            batch = next(stream)
            weight = sum(sum(loss_weights(row, pattern, args.tag_weight)) for row in batch)

            def learn(micro: list[Row], weight: float = weight) -> tuple[float, float]:
                loss, part = loss_sum(model, micro, pattern, dtype, args.tag_weight)
                (loss / weight).backward()
                return loss.item(), part

            loss, _ = over_micro_batches(batch, args, learn, optimizer.zero_grad)
            add_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
            if not math.isfinite(norm):
                raise InputError(f"gradient is not finite at step {step + 1}: lower --lr")
            optimizer.step()
            optimizer.zero_grad()  # frees memory for sampling
            done = step + 1
            row = {"step": done, "loss": loss / weight, "grad_norm": norm, "lr": learning_rate(step, args),
                   "tokens_per_second": sum(len(r.ids) for r in batch) / (time.perf_counter() - clock)}  # fmt: skip
            if done % args.eval_every == 0 or done == args.steps:
                last = evaluate(done)
                row |= last
            if chief:
                log.write(row)
                trackers.log(row)
            bar.set_postfix({
                "loss": f"{row['loss']:.3f}", "val": f"{last['val_loss']:.3f}", "well_formed": f"{last['well_formed']:.2f}",
                "tok_s": f"{row['tokens_per_second']:.0f}",
            }, refresh=False)  # fmt: skip
            bar.update()
            asked = max(gather([interrupt.stop or 0]))
            if (done % args.save_every == 0 or asked) and done < args.steps:
                if chief:
                    state = {"best_loss": best_loss, "log_size": log.size(), "config": config,
                             "rows": args.rows, "micro_tokens": args.micro_tokens}  # fmt: skip
                    save_state(states, done, model, optimizer, state)
                processes.wait_for_everyone()
            if asked and done < args.steps:
                if chief:
                    print(f"stopped at step {done}; the same command goes on from here", file=sys.stderr)
                sys.exit(asked)

    if not chief:
        return
    trackers.finish()
    if best_folder.exists():  # else a run was killed between here and the end, and these files are in place
        for file in best_folder.iterdir():
            file.replace(args.out / file.name)
        best_folder.rmdir()
    shutil.rmtree(states, ignore_errors=True)
    figures = [
        ("validation objective, nats a token, of the weights that were kept", f"{best_loss:.3f}"),
        ("validation loss at the last step, nats a token", f"{last['val_loss']:.3f}"),
        ("well-formed samples at the last step", f"{last['well_formed']:.0%}"),
    ]
    kind = f"A small language model taught an outline-then-story pattern ({args.mode} stage)"
    write_card(args.out, kind, as_json(args), manifest, figures, args.push_to_hub)
    if args.push_to_hub:
        print(push(args.out, args.push_to_hub))
    print(f"{args.out}: best validation objective {best_loss:.3f}; at the last step {last['val_loss']:.3f} nats a token and "
          f"{last['well_formed']:.0%} of samples well-formed; peak memory {peak_memory(device):.1f} GB")  # fmt: skip


if __name__ == "__main__":
    run(main, Args)
