"""Make the embedded base model from plain text.

    python base_model/pretrain.py --text children.jsonl.gz more.txt --out base_model --steps 12000

Trains an 8K byte-level BPE tokenizer and a GPT-2 of about 7M parameters on prose plus the training rows of `corpus/`, with a
separate share for its simple stories: a model this small learns most from short stories in words a child knows (Eldan & Li
2023, TinyStories). Muon for the matrices and AdamW for the rest; the learning rate warms up, stays constant, and falls
linearly over the last `--decay_share` of the steps, so a run can be stopped (Ctrl-C or SIGTERM saves its state) and ended
early by a second call with a smaller `--steps`.
"""

import gzip
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from storygen.cli import InputError, run
from storygen.corpus import split_of

ROOT = Path(__file__).resolve().parent.parent
END = "<|endoftext|>"
NATIVE_BF16 = torch.cpu._is_avx512_bf16_supported()


@dataclass
class Args:
    text: tuple[Path, ...]
    """Prose: .txt (one document per file) or .jsonl/.jsonl.gz (one document per row, in the field "text")."""
    out: Path = ROOT / "base_model"
    """Model folder; the training state is kept in it as `<out>/state.pt` until the last step."""
    corpus: Path = ROOT / "corpus"
    """Folder of `stories.jsonl`, `simple.jsonl` and `prompts.txt`; only rows of the training split are trained on."""
    start: Path | None = None
    """Model folder to start from, including its tokenizer. Default: random weights and a new tokenizer."""
    leave_out: tuple[str, ...] = ()
    """Authors to skip, where rows name one."""
    corpus_share: float = 0.06
    """Share of the batch rows drawn from the corpus's other stories and its prompts; the rest comes from the prose."""
    simple_share: float = 0.06
    """Share of the batch rows drawn from the corpus's simple stories."""
    vocab: int = 8192
    """Tokenizer size, tokens."""
    layers: int = 6
    width: int = 256
    heads: int = 4
    context: int = 768
    """Context length, tokens."""
    batch: int = 4
    """Rows of `context` tokens per step. Small batches: a short run needs many steps rather than smooth ones."""
    steps: int = 4700
    warmup: int = 200
    decay_share: float = 0.35
    lr_matrix: float = 4e-3
    """Muon's learning rate, with updates scaled to AdamW's root mean square."""
    lr_rest: float = 3e-3
    """AdamW's learning rate for embeddings, biases and layer norms."""
    weight_decay: float = 0.1
    compile: bool = True
    """Fuse the step with `torch.compile` (needs a C++ compiler on the CPU)."""
    eval_every: int = 500
    seed: int = 0


def documents(paths: tuple[Path, ...], leave_out: tuple[str, ...]) -> list[str]:
    """Prose with straight quotes and one newline between paragraphs, like the corpus."""
    straight = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "\u2060": None})
    texts = []
    for path in paths:
        if path.suffix == ".txt":
            texts.append(path.read_text("utf-8"))
            continue
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            rows = map(json.loads, lines)
            texts += [row["text"] for row in rows if row.get("author") not in leave_out]
    return ["\n".join(line.strip() for line in t.translate(straight).splitlines() if line.strip()) for t in texts]


def story_documents(path: Path, split: str) -> list[str]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return ["\n\n".join((r["prompt"], r["outline"], r["story"])) for r in rows if split_of(r["prompt"]) == split]


def corpus_documents(folder: Path, split: str) -> list[str]:
    texts = story_documents(folder / "stories.jsonl", split)
    prompts = (folder / "prompts.txt").read_text("utf-8").splitlines()
    prompts = [p for p in prompts if split_of(p) == split]
    return texts + ["\n".join(prompts[i : i + 10]) for i in range(0, len(prompts), 10)]


def train_tokenizer(texts: list[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=context)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one stream of token ids, `<|endoftext|>` after each: (tokens,) uint16."""
    rows = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    end = tokenizer.eos_token_id
    return np.concatenate([np.array(row.ids + [end], dtype=np.uint16) for row in rows])


def draw(stream: np.ndarray, rows: int, context: int, generator: np.random.Generator) -> torch.Tensor:
    starts = generator.integers(0, len(stream) - context - 1, size=rows)
    return torch.from_numpy(np.stack([stream[s : s + context + 1] for s in starts]).astype(np.int64))


def loss_of(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood, nats per token, of (rows, context + 1) tokens."""
    with torch.autocast("cpu", torch.bfloat16, enabled=NATIVE_BF16):
        logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def validate(model: GPT2LMHeadModel, stream: np.ndarray, context: int, rows: int = 48) -> float:
    generator = np.random.default_rng(1)
    model.eval()
    losses = [loss_of(model, draw(stream, 4, context, generator)).item() for _ in range(rows // 4)]
    model.train()
    return sum(losses) / len(losses)


def orthogonal_fp32(grad: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Muon's Newton-Schulz iteration (Jordan et al. 2024) in float32: (rows, columns) with singular values near 1."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


def schedule(step: int, args: Args) -> float:
    """The factor on both learning rates: warm-up, constant, linear decay to zero."""
    decay = max(1, int(args.steps * args.decay_share))
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / decay)


def main(args: Args) -> None:
    if not (min(args.corpus_share, args.simple_share) >= 0 and args.corpus_share + args.simple_share <= 1):
        raise InputError("--corpus-share and --simple-share are shares of the rows: at least 0 each, at most 1 together")
    if args.heads < 1 or args.width % args.heads:
        raise InputError(f"--width {args.width} is not a multiple of --heads {args.heads}")
    if missing := [str(path) for path in args.text if not path.is_file()]:
        raise InputError(f"--text: no file {', '.join(missing)}")
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    prose = documents(args.text, args.leave_out)
    held_out = [t for t in prose if split_of(t[:200]) == "test"][:40]
    held_out_keys = set(held_out)
    prose = [t for t in prose if t not in held_out_keys]
    corpus, corpus_unseen = (corpus_documents(args.corpus, split) for split in ("train", "validation"))
    simple, simple_unseen = (story_documents(args.corpus / "simple.jsonl", split) for split in ("train", "validation"))
    learnt = {"prose": prose, "corpus": corpus, "simple": simple}
    unseen = {"prose": held_out, "corpus": corpus_unseen, "simple": simple_unseen}
    state_file = args.out / "state.pt"
    log_file = args.out / "training_log.jsonl"

    if state_file.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    elif args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        tokenizer.save_pretrained(args.out)
    else:
        # The pattern indents every line by two spaces: indented copies teach the tokenizer that piece.
        indented = ["\n  " + t.replace("\n", "\n  ") + "\n" for t in corpus + simple]
        tokenizer = train_tokenizer(prose + corpus + simple + indented, args.vocab, args.context)
        tokenizer.save_pretrained(args.out)
        log_file.unlink(missing_ok=True)
    streams, checks = ({name: encode(tokenizer, texts) for name, texts in sets.items()} for sets in (learnt, unseen))
    shares = (1 - args.corpus_share - args.simple_share, args.corpus_share, args.simple_share)
    print({k: f"{len(v):,} tokens" for k, v in streams.items()}, {k: f"{len(v):,} held out" for k, v in checks.items()})

    config = GPT2Config(
        vocab_size=args.vocab, n_positions=args.context, n_embd=args.width, n_layer=args.layers, n_head=args.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel.from_pretrained(args.start, dtype=torch.float32) if args.start else GPT2LMHeadModel(config)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr_matrix, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr_rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    if not NATIVE_BF16:
        # torch's Muon iterates in bfloat16, which such a processor emulates: 13 s per step where this takes 0.3 s.
        torch.optim._muon._zeropower_via_newtonschulz = orthogonal_fp32
    base_lrs = [args.lr_matrix, args.lr_rest]
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    def save_state(step: int) -> None:
        state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        torch.save(state, state_file.with_suffix(".tmp"))
        os.replace(state_file.with_suffix(".tmp"), state_file)

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: stop.append(n))

    clock = time.perf_counter()
    model.train()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step", disable=None)
    for step in bar:
        generator = np.random.default_rng((args.seed, step))
        counts = generator.multinomial(args.batch, shares)
        parts = [draw(stream, n, args.context, generator) for stream, n in zip(streams.values(), counts) if n]
        loss = step_loss(model, torch.cat(parts))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in zip(optimizers, base_lrs):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, args)
            optimizer.step()
            optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            sys.exit(f"loss is not finite at step {step}")
        bar.set_postfix(loss=f"{loss.item():.3f}")
        done = step + 1
        if done % args.eval_every == 0 or done == args.steps:
            row = {"step": done, "tokens": done * args.batch * args.context, "train_loss": round(loss.item(), 4),
                   "grad_norm": round(norm.item(), 3), "seconds": round(time.perf_counter() - clock)}  # fmt: skip
            row |= {f"val_{k}": round(validate(model, v, args.context), 4) for k, v in checks.items()}
            with open(log_file, "a") as log:
                log.write(json.dumps(row) + "\n")
            tqdm.write(json.dumps(row))
            save_state(done)
        if stop:
            save_state(done)
            sys.exit(128 + stop[0])

    model.half().save_pretrained(args.out)
    (args.out / "pretrain.json").write_text(json.dumps(asdict(args), default=str, indent=1))
    state_file.unlink()


if __name__ == "__main__":
    run(main, Args)
