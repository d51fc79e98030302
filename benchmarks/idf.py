"""How fast is the idf table counted, compared with bert-score's, and in how much memory?

    python benchmarks/idf.py [--prose FOLDER] [--quick]

Documents are runs of sentences of real prose, about 600 words each, from random places (seeded), made on demand so that a
larger build needs no more memory for them. Both sides count the same documents with the packaged MiniLM's tokenizer, in turn
in one process: the library with its best number of processes, ours with the tokenizer's own threads. The library cuts a
document at 512 tokens, but only after reading all of it; ours counts all of it. Making the documents is part of our time in
the largest build, and runs at some 250,000 per second.

ratio_vs_bert_score  our texts/s over those of get_idf_dict, medians over rounds, on the same documents
texts_per_s          ours in the largest build, which runs once, in a process of its own
peak_gb              peak memory of that process, including Python, torch, the encoder and the prose; the table also shows
                     it without the build
equal                whether all idf values agree, to fp32, on documents short enough for the library to read whole. The
                     formula is the same, ln((N + 1) / (df + 1)), ln(N + 1) for tokens never seen. Special tokens are left
                     out: ours are 0; the library's are 0 too where it adds them itself ([CLS], [SEP]), and are otherwise
                     counted as words ([UNK]).
"""

import gzip
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

sys.path[0] = str(Path(__file__).resolve().parents[1])
from storygen.bertscore import backend, load_encoder
from storygen.idf import build_idf
from storygen.memory import keep_freed_memory, peak_memory

SENTENCE_END = re.compile(r"(?<=[.!?”’\"'])\s+|\n+")
SHORT = 300  # words of a document that fits the library's 512 tokens
MOST_EQUAL = 3_000  # such documents whose idf is compared


@dataclass
class Args:
    prose: Path = Path("corpus")
    """Folder of jsonl or jsonl.gz files whose rows hold prose under `text` or `story`."""
    words: int = 600
    """Words per document; it ends with the sentence that reaches this count."""
    compared: int = 20_000
    """Documents that both sides count in every round."""
    largest: int = 200_000
    """Documents of the build that runs once, in a process of its own."""
    rounds: int = 3
    """Rounds; every contender runs once in each."""
    seed: int = 0
    """Draws the places where documents begin."""
    quick: bool = False
    """2,000 documents compared, one round, 5,000 in the largest build."""
    only: bool = False
    """The largest build alone, for its peak memory."""


class Prose:
    """Prose as one run of UTF-8 bytes, with the offset of each sentence and the number of words before it."""

    def __init__(self, folder: Path):
        parts, self.starts, self.before = [], array("q", [0]), array("q", [0])
        for sentence in sentences(folder):
            parts.append(sentence.encode() + b" ")
            self.starts.append(self.starts[-1] + len(parts[-1]))
            self.before.append(self.before[-1] + len(sentence.split()))
        self.text = b"".join(parts)

    def documents(self, count: int, words: int, seed: int) -> Iterator[str]:
        """`count` runs of sentences of at least `words` words, each from a random place."""
        rng, last = random.Random(seed), bisect_left(self.before, self.before[-1] - words)
        if last < 1:
            sys.exit(f"the prose holds {self.before[-1]} words, a document needs {words}")
        for _ in range(count):
            first = rng.randrange(last)
            end = bisect_left(self.before, self.before[first] + words)
            yield self.text[self.starts[first] : self.starts[end] - 1].decode()


def sentences(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl*")):
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield from filter(None, SENTENCE_END.split(row.get("text") or row["story"]))


def seconds(call: Callable[[], object]) -> float:
    clock = time.perf_counter()
    call()
    return time.perf_counter() - clock


def alone(args: Args) -> dict:
    """The largest build in a process of its own."""
    command = [sys.executable, __file__, "--only", "--prose", args.prose]
    command += ["--words", args.words, "--largest", args.largest, "--seed", args.seed]
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def agree(tokenizer, documents: Iterator[str]) -> tuple[bool, int, int]:
    """Whether both give the same idf on the documents that the library does not cut; counts of those and of tokens seen."""
    from bert_score.utils import get_idf_dict

    coder = backend(tokenizer)
    whole = [text for text in documents if len(coder.encode(text)) <= tokenizer.model_max_length]
    ours, theirs = build_idf(tokenizer, whole), get_idf_dict(whole, tokenizer, nthreads=0)
    words = np.setdiff1d(np.arange(len(ours.weights)), tokenizer.all_special_ids)
    table = np.array([theirs[i] for i in words])
    return bool(np.allclose(ours.weights[words], table, rtol=1e-6, atol=1e-7)), len(whole), int((ours.df > 0).sum())


def main(args: Args) -> None:
    if args.quick:
        args = replace(args, compared=2_000, largest=5_000, rounds=1)
    keep_freed_memory()  # as data_prep does
    if args.only:
        prose, tokenizer = Prose(args.prose), load_encoder().tokenizer
        before, took = (
            peak_memory(),
            seconds(lambda: build_idf(tokenizer, prose.documents(args.largest, args.words, args.seed))),
        )
        print(json.dumps({"texts_per_s": args.largest / took, "before_gb": before, "peak_gb": peak_memory()}))
        return
    large = alone(args)

    from bert_score.utils import get_idf_dict

    prose, tokenizer = Prose(args.prose), load_encoder().tokenizer
    equal, whole, tokens = agree(tokenizer, prose.documents(min(args.compared, MOST_EQUAL), SHORT, args.seed))
    compared = list(prose.documents(args.compared, args.words, args.seed))
    theirs = lambda texts, processes: get_idf_dict(texts, tokenizer, nthreads=processes)
    cores = len(os.sched_getaffinity(0))
    few, coder = compared[: min(args.compared // 4, 1_000)], backend(tokenizer)
    processes = min(sorted({0, cores, 4}), key=lambda n: seconds(lambda: theirs(few, n)))

    contenders = {
        f"library, {processes or 'no'} processes": lambda: theirs(compared, processes),
        "ours": lambda: build_idf(tokenizer, compared),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, call in contenders.items():
            rates[name].append(args.compared / seconds(call))
    words, tokens_each = (statistics.mean(map(len, each)) for each in (map(str.split, few), map(coder.encode, few)))
    print(
        f"{cores} cores, {prose.before[-1]} words of prose, documents of {words:.0f} words and {tokens_each:.0f} tokens, "
        f"{args.rounds} rounds; texts/s"
    )
    print(f"{'':24} {'documents':>10} {'min':>9} {'median':>9} {'max':>9}")
    for name, each in rates.items():
        print(f"{name:24} {args.compared:10} {min(each):9.0f} {statistics.median(each):9.0f} {max(each):9.0f}")
    print(f"{'ours, largest, once':24} {args.largest:10} {'':9} {large['texts_per_s']:9.0f}")
    print(f"peak of the largest: {large['peak_gb']:.3f} GB, {large['before_gb']:.3f} GB before it began")
    print(f"idf of {tokens} tokens in {whole} documents of {SHORT} words: {'equal' if equal else 'DIFFERENT'}")
    library, ours = (statistics.median(each) for each in rates.values())
    print(json.dumps({
        "bench": "idf",
        "ratio_vs_bert_score": ours / library,
        "texts_per_s": large["texts_per_s"],
        "peak_gb": large["peak_gb"],
        "equal": equal,
    }))  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
