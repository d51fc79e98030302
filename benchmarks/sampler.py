"""How fast does the sampler write, compared with `generate` of transformers?

    python benchmarks/sampler.py --model artifacts/zeroshot [--gpt2-tokenizer FOLDER] [--quick]

Both have the same model, prompts (of unequal length, left-padded for `generate`), distribution (temperature 1, no
truncation), arithmetic and threads, and run in turn in one process. `fixed`: every row has `--new-tokens` tokens. `spread`:
rows end where they end; `generate` carries its finished rows along until the last one has ended. Models: the given one and,
with --gpt2-tokenizer, a GPT-2 124M with random weights, whose end token is made likely enough that rows have 150 tokens on
average.

ratio_b1, ratio_b32_fixed, ratio_b32_spread   `generate`'s seconds over ours, medians, for --model (`gpt2_…`: for GPT-2)
roofline_b32                                  share of our time, at batch 32 and fixed length, that arithmetic or memory
                                              traffic alone would take at the rates of a large product and a large read here
peak_gb                                       peak memory of this process, both sides included
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

sys.path[0] = str(Path(__file__).resolve().parents[1])
from storygen.checkpoint import load_model
from storygen.cli import pick_device
from storygen.corpus import load_prompts
from storygen.logprobs import autocast, pick_dtype
from storygen.memory import peak_memory
from storygen.pattern import Pattern, add_pattern_tokens
from storygen.sampler import sample

MEAN_LENGTH = 150  # tokens per row of the random GPT-2, where rows may end


@dataclass
class Args:
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py."""
    model: str = "artifacts/zeroshot"
    """Model folder made by pattern_learning.py."""
    gpt2_tokenizer: Path | None = None
    """GPT-2's tokenizer; if given, a GPT-2 124M with random weights runs too."""
    batches: list[int] = field(default_factory=lambda: [1, 8, 32, 64])
    new_tokens: int = 128
    """Tokens per row in `fixed`."""
    longest: int = 640
    """Cap on the tokens of a row in `spread`."""
    rounds: int = 3
    """Rounds; each side runs once per round."""
    device: str = "cpu"
    """cpu or cuda."""
    quick: bool = False
    """Batches 1 and 32, 48 tokens, spread rows of at most 200, one round."""


def random_gpt2(tokenizer_folder: Path) -> tuple[GPT2LMHeadModel, Pattern]:
    """GPT-2 124M with random weights and the pattern's tokens; `<eos>` has probability 1 / MEAN_LENGTH at every position."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    add_pattern_tokens(model, tokenizer)
    pattern = Pattern(tokenizer)
    with torch.no_grad():
        # The final norm sets every state's first component to 1, and only the end token's row reads it.
        norm, rows = model.transformer.ln_f, model.transformer.wte.weight
        norm.weight[0], norm.bias[0], rows[:, 0] = 0.0, 1.0, 0.0
        states = model.transformer(torch.arange(200)[None]).last_hidden_state[0]
        others = (states @ rows.T)[:, : pattern.size].logsumexp(-1).mean()
        rows[pattern.eos_id] = 0.0
        rows[pattern.eos_id, 0] = others - math.log(MEAN_LENGTH - 1)
    return model, pattern


def by_generate(
    model: PreTrainedModel, pattern: Pattern, prefixes: list[list[int]], most: int, fixed: bool, dtype: torch.dtype
) -> int:
    """Number of response tokens that `generate` wrote."""
    width = max(map(len, prefixes))
    ids = torch.tensor([[pattern.pad_id] * (width - len(p)) + p for p in prefixes], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prefixes], device=model.device)
    with torch.no_grad(), autocast(model.device, dtype):
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=most,
            min_new_tokens=most if fixed else None, eos_token_id=pattern.eos_id, pad_token_id=pattern.pad_id,
        )[:, width:]  # fmt: skip
    ended = (out == pattern.eos_id).cumsum(1) - (out == pattern.eos_id).long()
    return int((ended == 0).sum())


def by_us(model, pattern: Pattern, prompts: list[list[int]], k: int, most: int, fixed: bool, dtype, seed: int) -> int:
    """Number of response tokens that our sampler wrote, in `k` rows per prompt."""
    eos = -1 if fixed else pattern.eos_id  # -1: an end that is never drawn
    drawn = sample(model, prompts, k, eos_id=eos, vocabulary=pattern.size, seed=seed, max_new_tokens=most, dtype=dtype)
    return sum(len(one.ids) for row in drawn for one in row)


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large read, best of ten."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    large = torch.randn(2**26, device=device)

    def best(call: Callable[[], torch.Tensor]) -> float:
        times = []
        for _ in range(10):
            clock = time.perf_counter()
            call().flatten()[0].item()  # waits for a GPU
            times.append(time.perf_counter() - clock)
        return min(times)

    return 2 * 2048**3 / best(lambda: a @ b), large.numel() * 4 / best(large.sum)


def roofline(model: PreTrainedModel, pattern: Pattern, rows: int, prefix: float, new: int, dtype: torch.dtype) -> float:
    """Least seconds for `new` tokens in each of `rows` rows: per step, products or reading weights and cache."""
    flops, traffic = rates(model.device, dtype)
    width, size = model.config.n_embd, torch.finfo(dtype).bits / 8
    weights = sum(p.numel() for name, p in model.named_parameters() if ".h." in name) + pattern.size * width
    total = 0.0
    for t in range(new):
        cache = 2 * model.config.n_layer * width * (prefix + t)
        total += max(2 * rows * (weights + cache) / flops, size * (weights + rows * cache) / traffic)
    return total


def in_turn(
    model, pattern: Pattern, prompts: list[list[int]], k: int, most: int, fixed: bool, dtype: torch.dtype, rounds: int
) -> dict[str, list[float]]:
    """Tokens/s of our sampler and of `generate` in every round, on `k` rows per prompt."""
    prefixes = [p for p in prompts for _ in range(k)]
    sides = {
        "ours": lambda new, seed: by_us(model, pattern, prompts, k, new, fixed, dtype, seed),
        "generate": lambda new, seed: by_generate(model, pattern, prefixes, new, fixed, dtype),
    }
    speed: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides.values():
        side(4, 0)
    for seed in range(rounds):
        torch.manual_seed(seed)
        for name, side in sides.items():
            clock = time.perf_counter()
            wrote = side(most, seed)
            speed[name].append(wrote / (time.perf_counter() - clock))
    return speed


def measure(name: str, model: PreTrainedModel, pattern: Pattern, args: Args, dtype: torch.dtype) -> dict[str, float]:
    figures = {}
    prompts = [pattern.prefix(p) for p in load_prompts(args.data, "validation")]
    prompts = [p for p in prompts if len(p) <= 64]
    for batch in args.batches:
        k = min(batch, 8)
        few = prompts[: batch // k]
        for kind, most in (("fixed", args.new_tokens), ("spread", args.longest)):
            if kind == "spread" and batch < 32:
                continue
            speed = in_turn(model, pattern, few, k, most, kind == "fixed", dtype, args.rounds)
            spans = [f"{min(one):8.0f} {statistics.median(one):8.0f} {max(one):8.0f}" for one in speed.values()]
            ratio = statistics.median(speed["ours"]) / statistics.median(speed["generate"])
            print(f"{name:8} {batch:5} {kind:7} {spans[0]} {spans[1]} {ratio:7.2f}", flush=True)
            figures["ratio_b1" if batch == 1 else f"ratio_b{batch}_{kind}"] = ratio
            if batch == 32 and kind == "fixed":
                least = roofline(model, pattern, 32, statistics.fmean(map(len, few)), most, dtype)
                figures["roofline_b32"] = least * statistics.median(speed["ours"]) / (32 * most)
                print(f"{name:8} {batch:5} {'':7} {figures['roofline_b32']:.0%} of our time is the machine's limit")
    return figures


def main(args: Args) -> None:
    if args.quick:
        args = replace(args, batches=[1, 32], new_tokens=48, longest=200, rounds=1)
    device, dtype = pick_device(args.device), pick_dtype("auto", args.device)
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads; tokens/s")
    print(
        f"{'model':8} {'batch':>5} {'':7} {'ours min':>8} {'median':>8} {'max':>8} {'generate':>9} {'median':>8} {'max':>8} {'ratio':>7}"
    )
    model, tokenizer = load_model(args.model, device)
    figures = measure("demo", model, Pattern(tokenizer), args, dtype)
    if args.gpt2_tokenizer:
        model, pattern = random_gpt2(args.gpt2_tokenizer)
        found = measure("gpt2", model.to(device), pattern, args, dtype)
        figures |= {f"gpt2_{key}": value for key, value in found.items()}
    print(json.dumps({"bench": "sampler", **figures, "peak_gb": peak_memory(device)}))


if __name__ == "__main__":
    main(tyro.cli(Args))
