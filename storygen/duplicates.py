"""Rows that say the same twice: exact copies up to case and punctuation, and near copies that straddle two splits.

Near copies of prompts are found by an exact set join with prefix filtering (Bayardo et al. 2007), those of stories by
MinHash (Broder 1997): a story costs 64 bytes of memory, its text is not kept.
"""

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain

import numpy as np

# A prompt matches another from half of its content words on: what two tellings of one idea share ("You sold your soul to
# the devil ..., I need a favor"). A story matches from half of its five-word runs on.
PROMPT_OVERLAP = 0.5
STORY_OVERLAP = 0.5
STORY_BINS = 16
RANK = {"test": 0, "validation": 1, "train": 2}
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
FUNCTION_WORDS = frozenset(
    WORD.findall(
        """a an the and or but if so of to in on at by for with from into as than that this these those there here it its
        it's is are was were be been being am do does did has have had will would can could should may might must not
        no i you he
        she we they me him her us them my your his our their who whom whose which what when where why how all any each one
        you're you've i'm write story tell about just only also very get gets up out""",
    )
)


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation, in order."""
    return WORD.findall(text.lower())


def text_key(text: str) -> bytes:
    """Equal for texts that differ in case, punctuation and white space alone (8 bytes of BLAKE2b)."""
    return key_of(words_of(text))


def key_of(words: Sequence[str]) -> bytes:
    """`text_key` of a text whose words are known."""
    return blake2b(" ".join(words).encode(), digest_size=8).digest()


def story_sketch(words: Sequence[str]) -> np.ndarray:
    """(STORY_BINS,) uint32: one-permutation MinHash of the runs of five `words`. Equal bins: the share of runs in common."""
    words = np.fromiter(map(zlib.crc32, map(str.encode, words)), np.uint64, len(words))
    if len(words) < 5:
        words = np.resize(words, 5) if len(words) else np.zeros(5, dtype=np.uint64)
    runs = np.zeros(len(words) - 4, dtype=np.uint64)
    for i in range(5):
        runs = (runs * np.uint64(0x9E3779B1) + words[i : len(words) - 4 + i]) & np.uint64(0xFFFFFFFFFFFF)
    runs = (runs * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(24)
    sketch = np.full(STORY_BINS, np.iinfo(np.uint32).max, dtype=np.uint32)
    np.minimum.at(sketch, (runs % np.uint64(STORY_BINS)).astype(int), (runs >> np.uint64(8)).astype(np.uint32))
    return sketch


def crossing_stories(sketches: np.ndarray, splits: Sequence[str]) -> set[int]:
    """Rows of (n, STORY_BINS) `sketches` whose story nearly stands in another split too: the side nearer to training."""
    rank = np.array([RANK[split] for split in splits])
    dropped = set()
    for column in sketches.T:
        order = np.argsort(column, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(column[order]) != 0, True])
        shared = np.flatnonzero(np.diff(starts) > 1)
        for start, end in zip(starts[shared], starts[shared + 1], strict=True):
            rows = order[start:end]
            if rank[rows].min() == rank[rows].max():
                continue
            for i in rows:
                better = rows[rank[rows] < rank[i]]
                if ((sketches[better] == sketches[i]).mean(axis=1) >= STORY_OVERLAP).any():
                    dropped.add(int(i))
    return dropped


def crossing_prompts(prompts: Sequence[str], splits: Sequence[str]) -> set[int]:
    """Indices of prompts that nearly stand in another split too: the side nearer to training (test wins over all).

    Two sets that share at least m words share k of them among the n - m + k rarest of each (n words), so only those need an
    index; k = 2 leaves few pairs to compare.
    """
    sets = [_content(prompt) for prompt in prompts]
    frequency = Counter(word for words in sets for word in words)
    index: dict[str, list[int]] = defaultdict(list)
    dropped = set()
    for split in sorted(RANK, key=RANK.__getitem__):
        fresh = []
        for i, words in enumerate(sets):
            if splits[i] != split:
                continue
            least = math.ceil(PROMPT_OVERLAP * len(words))
            k = min(2, least)
            rare = sorted(words, key=lambda word: (frequency[word], word))[: len(words) - least + k]
            shared = Counter(chain.from_iterable(index[word] for word in rare if word in index))
            candidates = (j for j, count in shared.items() if count >= k)
            if any(len(words & sets[j]) >= PROMPT_OVERLAP * len(words | sets[j]) for j in candidates):
                dropped.add(i)
            elif split != "train":
                fresh.append((i, rare))
        for i, rare in fresh:
            for word in rare:
                index[word].append(i)
    return dropped


def _content(prompt: str) -> frozenset[str]:
    words = words_of(prompt)
    return frozenset(word for word in words if word not in FUNCTION_WORDS) or frozenset(words or [prompt])
