"""Stage 3: improve outline and story by critic-free PPO, from prompts alone.

    python rl_train.py                      # artifacts/zeroshot -> artifacts/rl
    python rl_train.py --resume             # continue after an interruption, to the same bytes as without it
    python rl_train.py --reward.length.weight 0.5 --out artifacts/rl_longer
    torchrun --nproc-per-node 2 rl_train.py # the same samples and steps, shared by two processes or GPUs

Each step samples K stories for each of P prompts, scores them, compares the samples of each prompt with one another, and
takes a few clipped gradient steps with a frozen copy of the starting model as reference. Every random draw is keyed by
(seed, step), so a restart needs only weights, optimizer, step, length target, beta and running means.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from tqdm import tqdm

from rew_config import RewardConfig
from reward import Reward, Sample, Score
from storygen.batching import context_length, token_budget_batches
from storygen.bertscore import weights_sha256
from storygen.card import before_and_after, push, write_card
from storygen.checkpoint import Interrupt, Stopped, checkpoints, load_model, load_state, save_model, save_state
from storygen.cli import InputError, as_json, check_flags, check_folder, claim, fill, pick_device, run, write_atomically
from storygen.corpus import load_manifest, load_prompts, load_sft, spread
from storygen.logprobs import Precision, cast_once, check_forward, check_head, pick_dtype, response_logps
from storygen.memory import Shape, free_memory, halve_until_it_fits, keep_freed_memory, peak_memory, plan
from storygen.pattern import Pattern
from storygen.ppo import Advantage, adapt_beta, advantages, next_length_target, policy_loss
from storygen.processes import add, add_gradients, check_shared, gather, join, share
from storygen.report import write_report
from storygen.rollout import Rollout, rollout, rollout_logps
from storygen.textstats import words
from storygen.tracking import Log, TrackerName, Trackers, alarms, describe, human_range, progress, sample_rows, show_sample


@dataclass
class Args:
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    model: str = "artifacts/zeroshot"
    """Starting policy and frozen reference: a model folder made by pattern_learning.py."""
    out: Path = Path("artifacts/rl")
    """Run folder: checkpoints/, final/, metrics.jsonl, samples.jsonl, run.json, report.html."""
    steps: int | None = None
    """Total steps, including those before a resume. Default by preset."""
    seed: int = 0
    """Seed of the prompt order, the samples and the minibatches."""
    resume: bool = False
    """Continue from the newest complete checkpoint in --out, or start from the beginning if there is none."""

    prompts: int | None = None
    """P, prompts per step. Default by preset."""
    k: int | None = None
    """K, samples per prompt. Default by preset."""
    advantage: Advantage = "loo"
    """loo: against the prompt's other samples; group: GRPO; batch; raw: the reward itself; decoupled: GDPO. See storygen/ppo.py."""
    temperature: float = 1.0
    """Divides the logits in sampling, policy and reference alike."""
    max_new_tokens: int | None = None
    """Maximum tokens of outline and story together; a longer sample counts as unfinished. Default: what fits the context."""

    lr: float | None = None
    """AdamW's learning rate after warm-up. Default by preset."""
    warmup: int = 5
    """Steps of linear warm-up."""
    adam_eps: float = 1e-5
    """AdamW's epsilon, usual for PPO. At 1e-8, embeddings of rare tokens, whose gradients are tiny, drift at full speed."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    epochs: int = 1
    """Passes over a step's samples."""
    minibatches: int = 2
    """Optimizer steps per pass; a prompt's samples stay together."""
    rows: int = 256
    """Maximum samples drawn at once. Reduced if memory is short, which changes the result only by rounding."""
    micro_tokens: int | None = None
    """Maximum tokens per forward and backward pass, padding included. Reduced if memory is short, which changes the result
    only by rounding. Default by preset."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: float = 3.0
    """Bound on the loss where the advantage is negative, as a multiple of the advantage."""
    beta: float = 0.1
    """Initial KL coefficient, at most 1; it adapts. 0: no KL term."""
    kl_target: float = 0.1
    """KL to the reference that beta is adapted towards, nats per token."""
    kl_stop: float = 0.03
    """KL(old || new), nats per token, above which the minibatch and the rest of its step are skipped."""

    eval_every: int | None = None
    """Steps between evaluations on held-out prompts. Default by preset."""
    eval_prompts: int = 64
    """Validation prompts per evaluation, spread over all of them, one story each, always with the same seed."""
    save_every: int = 10
    """Steps between checkpoints."""
    keep: int = 2
    """Number of checkpoints to keep."""
    show_every: int = 10
    """Steps between sample stories shown in the terminal."""
    track: tuple[TrackerName, ...] = ("auto",)
    """Where to send metrics besides metrics.jsonl. auto: TensorBoard (OUT/tensorboard) if it is installed."""
    push_to_hub: str | None = None
    """Upload the finished model to the hub under this name (user/name), using the login of the `hf` command."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """Forward-pass precision; weights and log-softmax stay fp32. auto: bf16 if the device multiplies it natively."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The reward's knobs; see rew_config.py."""


@dataclass(frozen=True)
class Recipe:
    steps: int
    prompts: int
    k: int
    lr: float
    micro_tokens: int
    eval_every: int


RECIPES = {
    # On a CPU, short passes, whose activations stay in cache, are a sixth faster than passes of 4,096 tokens.
    "demo": Recipe(steps=20, prompts=8, k=8, lr=1.5e-4, micro_tokens=1536, eval_every=10),
    # 1e-5, 256 samples per step: TRL's PPO when made for GPT-2 (huggingface.co/docs/trl/v0.4.1/trainer); K as in its GRPO.
    "gpt2": Recipe(steps=500, prompts=32, k=8, lr=1e-5, micro_tokens=8192, eval_every=25),
}

AT_LEAST = dict.fromkeys(
    ("steps", "prompts", "k", "rows", "epochs", "minibatches", "micro_tokens", "max_new_tokens", "warmup", "eval_every",
     "eval_prompts", "save_every", "keep", "show_every", "dual_clip"), 1,
) | dict.fromkeys(("seed", "weight_decay", "clip_low", "clip_high", "beta"), 0)  # fmt: skip
ABOVE_ZERO = ("temperature", "lr", "adam_eps", "max_grad_norm", "kl_target", "kl_stop")

# Nats per token that sampler and training forward may differ by on average, from rounding in each dtype.
GAP_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class ForeignSamples(RuntimeError):
    """The sampler drew from a different distribution than the one being trained."""


def learn(
    model, reference, optimizer, batch: Rollout, advantage: torch.Tensor, mine: range, beta: float, step: int, args: Args,
    pattern, dtype,
) -> dict[str, float]:  # fmt: skip
    """Take the clipped gradient steps on one rollout, given advantages (prompts of `batch`, k). Returns metrics.

    mine: which of the step's prompts `batch` holds; if processes share them, each calls this with its own, and weights and
    metrics end up the same in all. A minibatch whose gradient is not finite is skipped. Raises `ForeignSamples`, before
    any weight has changed, if the samples are not the policy's.
    """
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1.0, step / args.warmup)
    law = {"temperature": args.temperature, "dtype": dtype}
    generator, lengths = np.random.default_rng((args.seed, step, 1)), [len(row) for row in batch.rows]

    def micro_batches(members: list[int], micro_tokens: int) -> list[list[int]]:
        """Groups of rows that go through the model together."""
        return [[members[m] for m in micro] for micro in token_budget_batches([lengths[i] for i in members], micro_tokens)]

    def fitting(work: Callable[[int], Any]) -> Any:
        return halve_until_it_fits(args, "micro_tokens", max(lengths), work)

    def logps_under(policy, members: list[int]) -> list[torch.Tensor]:
        return fitting(lambda size: rollout_logps(policy, pattern, batch, micro_batches(members, size), **law))

    @cast_once()
    def gradient(members: list[int], tokens: float, on_policy: bool, micro_tokens: int) -> dict[str, float]:
        """Accumulate a minibatch's gradient. Returns sums over its tokens; `on_policy`: stores old log-probabilities."""
        optimizer.zero_grad()
        seen = {"approx_kl": 0.0, "clipped": 0.0, "loss": 0.0}
        for micro in micro_batches(members, micro_tokens):
            rows, starts = [batch.rows[i] for i in micro], [batch.starts[i] for i in micro]
            logps = response_logps(model, rows, starts, pattern.pad_id, vocabulary=pattern.size, **law)
            if on_policy:
                for i, logp in zip(micro, logps.detach().split([len(ref[i]) for i in micro]), strict=True):
                    old[i] = logp
            old_logps, ref_logps = torch.cat([old[i] for i in micro]), torch.cat([ref[i] for i in micro])
            per_token = torch.cat([torch.full_like(ref[i], advantage.view(-1)[i]) for i in micro])
            loss, stats = policy_loss(
                logps, old_logps, ref_logps, per_token, tokens, beta=beta,
                clip_low=args.clip_low, clip_high=args.clip_high, dual_clip=args.dual_clip,
            )  # fmt: skip
            loss.backward()
            for name in seen:
                seen[name] += getattr(stats, name)
        return seen

    parts = [
        [mine.index(g) * args.k + j for g in sorted(part.tolist()) if g in mine for j in range(args.k)]
        for _ in range(args.epochs)
        for part in np.array_split(generator.permutation(args.prompts), args.minibatches)
    ]
    part_tokens = add(*(sum(lengths[i] - batch.starts[i] for i in part) for part in parts))
    # The first minibatch is scored by the policy that sampled it, so its own forward pass gives its old log-probabilities.
    later = [i for part in parts[1 : args.minibatches] for i in part]
    old = logps_under(model, later)
    ref = logps_under(reference, list(range(len(lengths))))

    totals = dict.fromkeys(("approx_kl", "clipped", "loss", "grad_norm"), 0.0) | dict.fromkeys(
        ("tokens", "finite", "skipped", "updates"), 0
    )
    gap = 0.0
    for number, (members, tokens) in enumerate(zip(parts, part_tokens, strict=True)):
        seen = fitting(partial(gradient, members, tokens, number == 0)) | {"gap": 0.0}
        if number == 0:
            seen["gap"] = (torch.cat(old) - batch.sampler_logps).abs().sum().item()
        add_gradients(model)
        seen = dict(zip(seen, add(*seen.values()), strict=True))
        if number == 0:
            gap = seen["gap"] / sum(part_tokens[: args.minibatches])
            if not gap <= GAP_LIMIT[dtype]:
                optimizer.zero_grad()
                raise ForeignSamples(
                    f"the sampler's log-probabilities are {gap:.1e} nats a token from the training forward's, over "
                    f"{GAP_LIMIT[dtype]:.0e}: the samples are not the policy's; try --precision fp32"
                )
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
        too_far = seen["approx_kl"] / tokens > args.kl_stop
        if math.isfinite(norm):
            totals["tokens"] += tokens
            totals["finite"] += 1
            for name in ("approx_kl", "clipped", "loss"):
                totals[name] += seen[name]
            if not too_far:
                optimizer.step()
                totals["updates"] += 1
                totals["grad_norm"] = max(totals["grad_norm"], norm)
        else:
            totals["skipped"] += 1
        optimizer.zero_grad()
        if too_far:
            break
    drift = (torch.cat(old) - torch.cat(ref)).clamp(-20, 20)
    kl, entropy = add((torch.exp(-drift) - 1 + drift).sum().item(), -torch.cat(old).sum().item())
    drawn = sum(part_tokens[: args.minibatches])
    return {
        "objective/kl": kl / drawn,
        "objective/entropy": entropy / drawn,
        "objective/beta": beta,
        "policy/loss": totals["loss"] / max(1, totals["finite"]),
        "policy/approx_kl": totals["approx_kl"] / max(1, totals["tokens"]),
        "policy/clipfrac": totals["clipped"] / max(1, totals["tokens"]),
        "policy/grad_norm": totals["grad_norm"],
        "policy/updates": totals["updates"],
        "policy/skipped": totals["skipped"],
        "policy/lr": optimizer.param_groups[0]["lr"],
        "policy/sampler_gap": gap,
    }


def samples_of(batch: Rollout) -> list[Sample]:
    """The responses in the form the reward takes."""
    facts = zip(batch.prompts, batch.parsed, batch.room, strict=True)
    return [Sample(prompt, **vars(parsed), room=room) for prompt, parsed, room in facts]


def step_prompts(prompts: list[str], step: int, args: Args) -> list[str]:
    """The P prompts of a step (counted from 1): every epoch visits each prompt once, in a new random order."""
    first = (step - 1) * args.prompts
    places = range(first, first + args.prompts)
    orders = {
        e: np.random.default_rng((args.seed, e, 2)).permutation(len(prompts)) for e in {i // len(prompts) for i in places}
    }
    return [prompts[orders[i // len(prompts)][i % len(prompts)]] for i in places]


def through_guards(score: Score, config: RewardConfig) -> float:
    """The share of its parts' reward that a sample keeps after its guards."""
    return math.prod(value for name, value in score.guards.items() if getattr(config.guards, name).on)


def quality(score: Score, config: RewardConfig) -> float:
    """What a sample earns apart from its length: the other weighted parts, times the guards that are on."""
    others = sum(weight * score.parts[name] for name, weight in config.weights().items() if name != "length")
    return others * through_guards(score, config)


def part_rewards(score: Score, config: RewardConfig) -> list[float]:
    """What a sample earns from each part, (parts,); the mean over parts, by their weights, is the sample's reward.

    Guards and the overlong penalty affect every part alike, and a malformed sample gets the malformed score in each.
    """
    weights = config.weights()
    if score.verdict != "ok":
        return [score.reward] * len(weights)
    kept = through_guards(score, config)
    earned = {name: kept * score.parts[name] for name in weights}
    overlong = sum(weights[name] * value for name, value in earned.items()) - score.reward
    return [value - overlong for value in earned.values()]


def check(args: Args, states: Path, processes: int) -> None:
    """Check what can be checked before anything is loaded."""
    check_flags(args, AT_LEAST, ABOVE_ZERO)
    if args.advantage == "batch" and args.prompts * args.k < 2:
        raise InputError("--advantage batch compares the samples of a step: --prompts times --k must be at least 2")
    if args.advantage not in ("batch", "raw") and args.k < 2:
        raise InputError(
            f"--advantage {args.advantage} compares samples of one prompt: --k must be at least 2, not {args.k}"
        )
    if args.beta > 1:
        raise InputError(f"--beta must be at most 1, where its adaptation ends, not {args.beta:g}")
    if args.minibatches > args.prompts:
        raise InputError(f"--minibatches {args.minibatches} is more than the {args.prompts} prompts of a step")
    if processes > min(args.prompts, args.eval_prompts):
        raise InputError(f"{processes} processes are more than --prompts or --eval-prompts: start fewer")
    check_folder(args.out, "run.json")
    if (args.out / "config.json").exists():
        raise InputError(f"{args.out} holds a model: give another --out")
    if not args.resume and (checkpoints(states) or (args.out / "metrics.jsonl").exists()):
        raise InputError(f"{args.out} holds a run: continue it with --resume, or give another --out")
    if (args.out / "final").exists() and not checkpoints(states):
        raise InputError(f"{args.out} holds a finished run without its checkpoints: give another --out")


def main(args: Args) -> None:
    processes, device = join(pick_device(args.device))
    chief = processes.is_main_process  # the one that prints and writes
    keep_freed_memory()
    manifest = load_manifest(args.data)
    preset = manifest["preset"]
    print(f"preset {preset}, as {args.data}/manifest.json says")
    fill(args, RECIPES[preset])
    states = args.out / "checkpoints"
    check(args, states, processes.num_processes)
    dtype, free = pick_dtype(args.precision, device), free_memory(device)

    model, tokenizer = load_model(args.model, device, dtype=dtype)
    reference, _ = load_model(args.model, device, dtype=dtype)
    pattern = Pattern(tokenizer)
    context = context_length(model)
    reward = Reward.load(args.data, args.reward, device, dtype)
    every = {split: load_prompts(args.data, split) for split in ("train", "validation")}
    sizes = {
        prompt: size for of in every.values() for prompt, size in zip(of, pattern.prefix_lengths(of)) if size <= context // 2
    }
    prompts = [prompt for prompt in every["train"] if prompt in sizes]
    held_out = spread([prompt for prompt in every["validation"] if prompt in sizes], args.eval_prompts)
    longest_row = min(context, max(sizes.values(), default=0) + (args.max_new_tokens or context))
    print(
        f"{len(prompts)} prompts, {len(every['train']) - len(prompts)} dropped (over half the context of {context} tokens)"
    )
    if len(prompts) < args.prompts or len(held_out) < processes.num_processes:
        raise InputError(
            f"{args.data} has {len(prompts)} training and {len(held_out)} validation prompts: too few for a step"
        )

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), eps=args.adam_eps, weight_decay=args.weight_decay, fused=True
    )
    # What identifies a run. A resumed one may have more steps, or be stored elsewhere.
    config = {
        k: v
        for k, v in as_json(args).items()
        if k not in ("steps", "resume", "out", "device", "data", "model", "track", "push_to_hub")
    }
    config |= {"model_sha256": weights_sha256(reference), "data": manifest["hashes"]}
    config["reward_weights"] = args.reward.weights()  # with own parts, which are no flags
    lock = claim(args.out) if chief else None  # noqa: F841  held until the process ends
    state = load_state(states, model, optimizer) if args.resume else None
    if state is not None and state["config"] != config:
        changed = sorted(k.replace("_", " ") for k in config if state["config"].get(k) != config[k])
        raise InputError(f"{args.out} holds a run with other settings ({', '.join(changed)}): give another --out")
    check_shared(state and state["step"], states)
    if state is None:
        needs = plan(
            Shape.of(model), rl=True, rows=min(args.rows, max(args.prompts * args.k, args.eval_prompts)),
            micro_tokens=args.micro_tokens, longest_row=longest_row, longest_sample=longest_row, dtype=dtype,
            on_cpu=device == "cpu", attention=model.config._attn_implementation, available=free,
        )  # fmt: skip
        print(needs)
        # A resumed run keeps these sizes, whatever is free then: rounding depends on them.
        state = {
            "step": 0, "metrics_size": 0, "samples_size": 0,
            "rows": min(gather([needs.rows])), "micro_tokens": min(gather([needs.micro_tokens])),
        }  # fmt: skip
    args.rows, args.micro_tokens = state["rows"], state["micro_tokens"]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    run_facts = {"args": as_json(args), "preset": preset, "versions": versions, "dtype": str(dtype), **config}
    print(json.dumps(as_json(args)))
    print(f"reward {args.reward.effective()}")
    if chief:
        write_atomically(args.out / "run.json", json.dumps(run_facts, indent=1))  # first: it tells whose folder this is
        trackers = Trackers(args.track, args.out, run_facts, state["step"])
        metrics = Log(args.out / "metrics.jsonl", state["metrics_size"])
        samples_log = Log(args.out / "samples.jsonl", state["samples_size"])
    interrupt = Interrupt()
    # Once an update has begun to change weights, a request to stop waits for the end of the step.
    optimizer.register_step_pre_hook(lambda *_: interrupt.wait())
    weights = torch.tensor(list(args.reward.weights().values()))
    human_median = reward.calibration.quantile("story_words", 50)

    law = {"temperature": args.temperature, "dtype": dtype}  # what sampling and all log-probabilities share

    saved = state["step"]  # that of the newest checkpoint

    def save(step: int) -> None:
        nonlocal saved
        saved = step
        if chief:
            state.update(metrics_size=metrics.size(), samples_size=samples_log.size(), config=config)
            state.update(rows=args.rows, micro_tokens=args.micro_tokens)
            save_state(states, step, model, optimizer, state, args.keep)
        processes.wait_for_everyone()

    def leave(step: int) -> NoReturn:
        """Exit as the signal asks, leaving a checkpoint of the last complete step."""
        if step > saved:
            save(step)
        if chief:
            print(f"stopped at step {step}; the same command with --resume goes on from here", file=sys.stderr)
        sys.exit(max(gather([interrupt.stop or 0])))

    def own_rollout(of: list[str], k: int, seed: tuple[int, ...]) -> Rollout:
        """Responses to this process's share of the prompts."""
        mine = share(len(of))
        draw = partial(
            rollout, model, pattern, [of[i] for i in mine], k, seed=seed, first=mine.start,
            max_new_tokens=args.max_new_tokens, **law,
        )  # fmt: skip
        return halve_until_it_fits(args, "rows", 1, lambda rows: draw(max_rows=rows))

    def evaluate(step: int) -> tuple[dict, Rollout, list[Sample]]:
        """Sample held-out prompts, always with one seed, scored against the human median length, so that steps compare."""
        batch = own_rollout(held_out, 1, (args.seed, 0))
        own = samples_of(batch)
        samples, scores = gather(own), gather(reward(own, human_median))
        if chief:
            samples_log.write(*sample_rows(step, "validation", samples, scores, [None] * len(scores), human_median))
        best = max(range(len(scores)), key=lambda i: scores[i].reward)
        if step in (0, args.steps):
            show_sample(f"step {step}: best of {len(scores)} held-out stories, reward {scores[best].reward:.3f}",
                        samples[best].prompt, samples[best].think, samples[best].story)  # fmt: skip
        return {f"eval/{name}": value for name, value in describe(samples, scores).items()}, batch, samples

    if state["step"] == 0:
        before, batch, samples = evaluate(0)
        # What human rows earn, for the report alone: RL learns from prompts, and does without them.
        rows = spread(load_sft(args.data, "validation"), 100) if (args.data / "sft.parquet").exists() else []
        human = [Sample(row["prompt"], row["think"], row["story"], True) for row in rows]
        before |= human_range(reward(human, human_median))
        check_head(model, batch.rows[0], pattern.pad_id)
        # In fp32, whole rows could need more memory than was planned for the passes of an update.
        few = max(2, min(8, args.micro_tokens // longest_row))
        beginnings = [row[: start + 64] for row, start in zip(batch.rows[:few], batch.starts)]
        checks = check_forward(model, reference, beginnings, batch.starts[:few], pattern.pad_id)
        own_logps = torch.cat(rollout_logps(model, pattern, batch, [[i] for i in range(len(beginnings))], **law)[:few])
        checks["check/ratio"] = (torch.exp(own_logps - batch.sampler_logps[: len(own_logps)]) - 1).abs().max().item()
        print("before the first update: " + ", ".join(f"{name} {value:.1e}" for name, value in checks.items()))
        if chief:
            metrics.write({"step": 0, **before, **checks})
            trackers.log({"step": 0, **before, **checks})
        # The length target starts at the model's own, and may rise to what a sample has room for besides its outline.
        told = sum(len(words(s.think)) + len(words(s.story)) for s in samples)
        tokens_per_word = add(batch.response_tokens())[0] / max(1, told)
        whole = [s for s in samples if s.verdict == "ok"]  # of the others some have an outline without end, or none
        outlines = [len(words(s.think)) for s in whole] or [reward.calibration.quantile("think_words", 50)]
        before_outline = statistics.median(gather(batch.starts))
        room = min(context - before_outline, args.max_new_tokens or context) - tokens_per_word * statistics.median(outlines)
        longest = max(1.0, 0.8 * room / tokens_per_word)
        start = max(1.0, min(statistics.median([len(words(s.story)) for s in whole] or [human_median]), longest))
        state |= {"length_target": start, "length_low": start / 2, "length_high": longest, "beta": args.beta,
                  "quality_mean": None, "quality_std": None, "skipped_in_a_row": 0, "eval_reward": before["eval/reward"],
                  "eval_step": 0}  # fmt: skip

    shown = [name for name, weight in args.reward.weights().items() if weight]
    print(f"in the bar: parts {'/'.join(shown)}; words of a story, median/target")
    mine = share(args.prompts)
    with progress(args.steps, state["step"], "RL", chief) as bar:
        for step in range(state["step"] + 1, args.steps + 1):
            clock = time.perf_counter()
            try:
                # Until the first optimizer step, a request to stop need not wait. Several processes agree at the step's end.
                with interrupt.at_once() if processes.num_processes == 1 else nullcontext():
                    batch = own_rollout(step_prompts(prompts, step, args), args.k, (args.seed, step))
                    own = samples_of(batch)
                    sampled = time.perf_counter()
                    own_scores = reward(own, state["length_target"])
                    samples, scores = gather(own), gather(own_scores)
                    if max(gather([interrupt.stop or 0])):  # of several processes, which could not stop one by one
                        raise Stopped
                    rewards = torch.tensor([s.reward for s in scores]).view(args.prompts, args.k)
                    by_part = torch.tensor([part_rewards(s, args.reward) for s in scores]).T.view(-1, args.prompts, args.k)
                    advantage = advantages(rewards, args.advantage, by_part, weights)
                    scored = time.perf_counter()
                    learnt = learn(
                        model, reference, optimizer, batch, advantage[mine.start : mine.stop], mine, state["beta"], step,
                        args, pattern, dtype,
                    )  # fmt: skip
            except Stopped:
                leave(step - 1)
            except ForeignSamples as error:
                if step > 1:
                    save(step - 1)
                sys.exit(f"error: step {step}: {error}" if chief else 1)
            updated = time.perf_counter()

            described = describe(samples, scores)
            row = {
                "step": step,
                "objective/reward": described.pop("reward"),
                **described,
                "objective/reward_std": rewards.std().item() if rewards.numel() > 1 else 0.0,
                "length/target": state["length_target"],
                **learnt,
                "time/sample_s": sampled - clock,
                "time/reward_s": scored - sampled,
                "time/update_s": updated - scored,
                "time/step_s": updated - clock,
                "time/tokens_per_second": add(batch.response_tokens())[0] / (updated - clock),
            }
            if step % args.eval_every == 0 or step == args.steps:
                held, *_ = evaluate(step)
                row |= held
                state |= {"eval_reward": held["eval/reward"], "eval_step": step}
            state.setdefault("entropy_start", row["objective/entropy"])
            if rings := alarms(row, args.kl_target, state["entropy_start"]):
                row["alarms"] = rings
                if chief:
                    tqdm.write("\n".join(f"warning: step {step}: {text}" for text in rings), file=sys.stderr)
            if chief:
                metrics.write(row)
                trackers.log(row)
                samples_log.write(
                    *sample_rows(step, "train", samples, scores, advantage.flatten().tolist(), state["length_target"])
                )
            if step % args.show_every == 0:
                one = samples[0]
                show_sample(
                    f"step {step}: reward {scores[0].reward:.3f} ({scores[0].verdict})", one.prompt, one.think, one.story
                )

            state = next_state(state, samples, scores, learnt["objective/kl"], learnt["policy/skipped"], args)
            bar.set_postfix({
                "reward": f"{row['objective/reward']:.3f}",
                "held_out": f"{state['eval_reward']:.3f}",
                "parts": "/".join(f"{row[f'parts/{name}']:.2f}" for name in shown),
                "kl": f"{row['objective/kl']:.3f}",
                "finished": f"{row['samples/finished']:.2f}",
                "words": f"{row['length/median']:.0f}/{row['length/target']:.0f}",
                "tok_s": f"{row['time/tokens_per_second']:.0f}",
            }, refresh=False)  # fmt: skip
            bar.update()
            broken, asked = state["skipped_in_a_row"] >= 3, max(gather([interrupt.stop or 0]))
            if step % args.save_every == 0 or step == args.steps or asked or broken:
                save(step)
            if broken:
                sys.exit(
                    f"error: gradients were not finite in three steps in a row, up to step {step}: lower --lr"
                    if chief
                    else 1
                )
            if asked and step < args.steps:
                leave(step)

    last = max(state["step"], args.steps)
    if state["eval_step"] < last:  # a stopped run, ended there by a smaller --steps
        held, *_ = evaluate(last)
        state["eval_reward"] = held["eval/reward"]
        if chief:
            metrics.write({"step": last, **held})
            trackers.log({"step": last, **held})
    if not chief:
        return
    trackers.finish()
    save_model(model, tokenizer, args.out / "final")
    kind = "A small language model taught an outline-then-story pattern, then improved by critic-free PPO"
    write_card(
        args.out / "final", kind, as_json(args), manifest, before_and_after(args.out, len(held_out)), args.push_to_hub
    )
    report = write_report(args.out)
    if args.push_to_hub:
        print(push(args.out / "final", args.push_to_hub))
    print(
        f"{args.out}/final: held-out reward {state['eval_reward']:.3f}; peak memory {peak_memory(device):.1f} GB; report: {report}"
    )


def next_state(state: dict, samples: list[Sample], scores: list[Score], kl: float, skipped: int, args: Args) -> dict:
    """The controllers after a step: beta, length target and the running mean and deviation of the samples' quality."""
    target = state["length_target"]
    values = [quality(s, args.reward) for s in scores]
    mean, std = statistics.fmean(values), statistics.pstdev(values)
    if state["quality_mean"] is not None:
        reached = [s.verdict == "ok" and len(words(one.story)) >= 0.8 * target for s, one in zip(scores, samples)]
        # The batch mean, by two standard errors: half of the samples lie below their mean, most of a weak model's near 0.
        worse = mean < state["quality_mean"] - 2 * state["quality_std"] / len(values) ** 0.5
        target = next_length_target(target, sum(reached) / len(reached), worse, state["length_low"], state["length_high"])
        mean = 0.9 * state["quality_mean"] + 0.1 * mean
        std = 0.9 * state["quality_std"] + 0.1 * std
    return state | {
        "length_target": target,
        "beta": adapt_beta(state["beta"], kl, args.kl_target),
        "quality_mean": mean,
        "quality_std": std,
        "skipped_in_a_row": state["skipped_in_a_row"] + 1 if skipped else 0,
    }


if __name__ == "__main__":
    run(main, Args)
