"""Write stories with any checkpoint of any stage.

python generate.py "A lighthouse keeper finds a door in the sea."
python generate.py --prompts prompts.txt --num 4 --jsonl > stories.jsonl
echo "A dog learns to read." | python generate.py
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from storygen.checkpoint import load_model
from storygen.cli import InputError, pick_device, run
from storygen.logprobs import best_dtype
from storygen.pattern import Parsed, Pattern
from storygen.sampler import sample
from storygen.tracking import show_sample

STAGES = ("artifacts/rl/final", "artifacts/zeroshot", "artifacts/oneshot")


@dataclass
class Args:
    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """What to write about. Without it, and without --prompts, prompts are read from standard input, one a line."""
    prompts: Path | None = None
    """File of prompts: one a line, or .jsonl rows with a field "prompt"."""
    model: str | None = None
    """Model folder. Default: the last stage that has been run (RL, else zero-shot, else one-shot)."""
    num: int = 1
    """Stories for each prompt."""
    seed: int = 0
    """Same seed, same stories, on the same machine."""
    temperature: float = 1.0
    """Below 1 safer, above 1 wilder."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this much probability; 1 draws from all."""
    json: bool = False
    """Print one JSON array of rows instead of text."""
    jsonl: bool = False
    """Print one JSON row a line: prompt, think, story, finished, verdict."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def read_prompts(args: Args) -> list[str]:
    if args.prompt is not None and args.prompts is not None:
        raise InputError("give a prompt or --prompts FILE, not both")
    if args.prompt is not None:
        return [args.prompt]
    name = str(args.prompts) if args.prompts else "standard input"
    try:
        data = args.prompts.read_bytes() if args.prompts else sys.stdin.buffer.read()
        lines = data.decode("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{name}, line {line}: not UTF-8 text; convert the file first") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if args.prompts is not None and args.prompts.suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f'{name}, line {number}: not a JSON row with a field "prompt"') from None
            if not isinstance(line, str):
                raise InputError(f"{name}, line {number}: the prompt is not text")
        prompts.append(line)
    if not prompts:
        raise InputError(f"{name} holds no prompt")
    return prompts


def write_stories(args: Args, prompts: list[str]) -> list[tuple[str, Parsed]]:
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise InputError(f"prompt {number} is empty: say what the story should be about")
    if args.num < 1 or args.seed < 0 or args.temperature <= 0 or not 0 < args.top_p <= 1:
        raise InputError("--num must be at least 1, --seed at least 0, --temperature above 0 and --top-p in (0, 1]")
    source = args.model or next((stage for stage in STAGES if Path(stage).is_dir()), None)
    if source is None:
        raise InputError(f"none of {', '.join(STAGES)} is here: run the stages first, or give --model")
    device = pick_device(args.device)
    model, tokenizer = load_model(source, device)
    pattern = Pattern(tokenizer)
    drawn = sample(
        model, [pattern.prefix(prompt) for prompt in prompts], args.num, eos_id=pattern.eos_id,
        vocabulary=pattern.size, seed=args.seed, temperature=args.temperature, top_p=args.top_p, dtype=best_dtype(device),
        progress=True,
    )  # fmt: skip
    return [(prompt, pattern.parse(c.ids)) for prompt, completions in zip(prompts, drawn) for c in completions]


def main(args: Args) -> None:
    stories = write_stories(args, read_prompts(args))
    rows = [{"prompt": prompt, **vars(parsed)} for prompt, parsed in stories]
    if args.json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    elif args.jsonl:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    else:
        for prompt, parsed in stories:
            show_sample("" if parsed.verdict == "ok" else f"malformed: {parsed.verdict}", prompt, parsed.think, parsed.story)


if __name__ == "__main__":
    run(main, Args)
