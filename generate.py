"""Write stories with any checkpoint of any stage.

python generate.py "A lighthouse keeper finds a door in the sea."         # on a terminal, word by word
python generate.py "A lighthouse keeper finds a door in the sea." --best-of 8 --outline "He opens it and finds his own kitchen."
python generate.py --prompts prompts.txt --num 4 --jsonl > stories.jsonl
echo "A dog learns to read." | python generate.py
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from reward import Reward, Sample
from storygen.batching import context_length
from storygen.checkpoint import load_model
from storygen.cli import InputError, check_flags, pick_device, run
from storygen.logprobs import best_dtype
from storygen.pattern import Pattern, text_verdict
from storygen.sampler import sample
from storygen.tracking import show_sample
from storygen.workbench import SURROGATE

STAGES = ("artifacts/rl/final", "artifacts/zeroshot", "artifacts/oneshot")


@dataclass
class Args:
    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """What to write about. If neither this nor --prompts is given, prompts are read from standard input, one per line."""
    prompts: Path | None = None
    """File of prompts: one per line, or .jsonl rows with a field "prompt"."""
    model: str | None = None
    """Model folder. Default: the last stage that has been run (RL, else zero-shot, else one-shot)."""
    num: int = 1
    """Stories per prompt."""
    seed: int = 0
    """Same seed, same stories, on the same machine."""
    temperature: float = 1.0
    """Below 1 safer, above 1 wilder."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this much probability; 1 draws from all."""
    best_of: int = 1
    """Candidates written for each story; the one with the highest reward, as measured with --data, is kept."""
    outline: str | None = None
    """Write every story to this plan instead of the model's own."""
    more: Annotated[int, tyro.conf.arg(name="continue")] = 0
    """Times to continue a story that fills the model's context, with its plan and its newest part in view."""
    data: Path = Path("artifacts/data")
    """Folder made by data_prep.py, for --best-of."""
    json: bool = False
    """Print one JSON array of rows instead of text."""
    jsonl: bool = False
    """Print one JSON row per line: prompt, think, story, finished, verdict."""
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
        lines = data.decode("utf-8-sig").split("\n")  # not splitlines, which cuts at line separators inside a JSON string
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
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(f'{name}, line {number}: not a JSON row with a field "prompt"') from None
            if not isinstance(line, str):
                raise InputError(f"{name}, line {number}: the prompt is not text")
        prompts.append(line.rstrip("\r"))
    if not prompts:
        raise InputError(f"{name} holds no prompt")
    return prompts


def check(args: Args, prompts: list[str]) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise InputError(f"prompt {number} is empty: say what the story should be about")
        if SURROGATE.search(prompt):
            raise InputError(f"prompt {number} holds half a character (a lone surrogate), or is not UTF-8 text")
    check_flags(args, {"num": 1, "best_of": 1, "seed": 0}, ("temperature", "top_p"))
    if args.top_p > 1:
        raise InputError(f"--top-p must be at most 1, not {args.top_p:g}")
    if args.more < 0:
        raise InputError(f"--continue must be at least 0, not {args.more}")
    if args.outline is not None and SURROGATE.search(args.outline):
        raise InputError("--outline holds half a character (a lone surrogate), or is not UTF-8 text")
    if args.outline is not None and text_verdict(args.outline, "A story.", True) != "ok":
        raise InputError("--outline must hold some text, and none of the pattern's tags")


class Live:
    """Prints a story as its tokens arrive: the outline dimmed, the story plain."""

    def __init__(self, pattern: Pattern, prompt: str, outline: str | None):
        self.pattern, self.ids, self.shown = pattern, [], 0
        self.say("\n  prompt\n    " + prompt.strip() + "\n\n  outline\n    \033[2m")
        if outline is not None:
            self.say("\n    ".join(outline.strip().splitlines()))
            self.story_begins()

    def say(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def story_begins(self) -> None:
        self.ids, self.shown = [], 0
        self.say("\033[0m\n\n  story\n    ")

    def __call__(self, _prompt: int, _completion: int, token: int) -> None:
        if token == self.pattern.story_id:
            self.story_begins()
        elif token == self.pattern.eos_id:
            self.say("\033[0m\n\n")
        else:
            self.ids.append(token)
            text = self.pattern.decode(self.ids).replace("\n", "\n    ")
            if not text.endswith("\ufffd"):  # a character whose last tokens are still to come
                self.say(text[self.shown :])
                self.shown = len(text)


def write_stories(args: Args, prompts: list[str], live: bool) -> list[dict]:
    """`args.num` rows {prompt, think, story, finished, verdict} per prompt, plus `reward` with --best-of."""
    check(args, prompts)
    source = args.model or next((stage for stage in STAGES if Path(stage).is_dir()), None)
    if source is None:
        raise InputError(f"none of {', '.join(STAGES)} is here: run the stages first, or give --model")
    device = pick_device(args.device)
    dtype = best_dtype(device)
    model, tokenizer = load_model(source, device)
    pattern, context = Pattern(tokenizer), context_length(model)
    reward = Reward.load(args.data, device=device, dtype=dtype) if args.best_of > 1 else None
    begun = [] if args.outline is None else [*pattern.encode(args.outline)[1:], pattern.story_id]

    def write(prefixes: list[list[int]], num: int, seed: tuple[int, ...]) -> list[list[int]]:
        drawn = sample(
            model, prefixes, num, eos_id=pattern.eos_id, vocabulary=pattern.size, seed=seed, temperature=args.temperature,
            top_p=args.top_p, dtype=dtype, progress=not live, on_token=Live(pattern, prompts[0], args.outline) if live else None,
        )  # fmt: skip
        return [one.ids for completions in drawn for one in completions]

    each = args.num * args.best_of
    of_prompt = [prompt for prompt in prompts for _ in range(each)]
    written = write([pattern.prefix(prompt) + begun for prompt in prompts], each, (args.seed,))
    responses = [begun + ids for ids in written]
    for window in range(1, args.more + 1):
        # The plan, then the newest part of the story, filling half of the rest, from a paragraph's start if there is one.
        open_rows, prefixes = [], []
        for i, ids in enumerate(responses):
            if ids[-1] == pattern.eos_id or pattern.story_id not in ids:
                continue
            border = ids.index(pattern.story_id) + 1
            head = pattern.prefix(of_prompt[i]) + ids[:border]
            if len(head) > context - 2:
                continue  # prompt and plan leave no room for an old token and a new one
            open_rows.append(i)
            newest = ids[border:][-max(1, (context - len(head)) // 2) :]
            prefixes.append(head + newest[pattern.paragraph(newest) :])
        for i, ids in zip(open_rows, write(prefixes, 1, (args.seed, window)) if open_rows else [], strict=True):
            responses[i] = responses[i] + ids
    rows = [{"prompt": prompt, **vars(pattern.parse(ids))} for prompt, ids in zip(of_prompt, responses, strict=True)]
    if reward is None:
        return rows
    scores = reward([Sample(**row) for row in rows], reward.calibration.quantile("story_words", 50))
    rows = [row | {"reward": round(score.reward, 4)} for row, score in zip(rows, scores, strict=True)]
    return [max(rows[i : i + args.best_of], key=lambda row: row["reward"]) for i in range(0, len(rows), args.best_of)]


def main(args: Args) -> None:
    prompts = read_prompts(args)
    one = len(prompts) * args.num * args.best_of == 1 and not args.more
    live = one and sys.stdout.isatty() and not (args.json or args.jsonl)
    rows = write_stories(args, prompts, live)
    if args.json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    elif args.jsonl:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    elif live:
        if rows[0]["verdict"] != "ok":
            print(f"\033[0m\n\n  malformed: {rows[0]['verdict']}")
    else:
        for row in rows:
            title = "" if row["verdict"] == "ok" else f"malformed: {row['verdict']}"
            title += f"reward {row['reward']:.3f}" if "reward" in row and not title else ""
            show_sample(title, row["prompt"], row["think"], row["story"])


if __name__ == "__main__":
    run(main, Args)
