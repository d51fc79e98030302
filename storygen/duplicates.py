"""Duplicate rows: exact copies up to case and punctuation, and near copies that straddle two splits.

Near copies of prompts are found by an exact set join with prefix filtering (Bayardo et al. 2007), those of stories by
MinHash (Broder 1997): a story costs 64 bytes of memory, its text is not kept.
"""

import re
import zlib
from array import array
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

# A prompt matches another from half of its content words up: what two tellings of one idea share ("You sold your soul to
# the devil ..., I need a favor"). A story matches from half of its five-word runs up.
PROMPT_OVERLAP = 0.5
STORY_OVERLAP = 0.5
STORY_BINS = 16
EMPTY = np.iinfo(np.uint32).max  # a bin that none of a short story's runs fell into
PROMPTS_AT_ONCE, PAIRS_AT_ONCE = 1024, 1 << 18  # some 100 MB
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
    """Equal for texts that differ only in case, punctuation and white space (8 bytes of BLAKE2b)."""
    return key_of(words_of(text))


def key_of(words: Sequence[str]) -> bytes:
    """`text_key` of a text already split into words."""
    return blake2b(" ".join(words).encode(), digest_size=8).digest()


def story_sketch(words: Sequence[str]) -> np.ndarray:
    """(STORY_BINS,) uint32: one-permutation MinHash of runs of five `words`. Equal bins: the share of runs in common."""
    words = np.fromiter(map(zlib.crc32, map(str.encode, words)), np.uint64, len(words))
    if len(words) < 5:
        words = np.resize(words, 5) if len(words) else np.zeros(5, dtype=np.uint64)
    runs = np.zeros(len(words) - 4, dtype=np.uint64)
    for i in range(5):
        runs = (runs * np.uint64(0x9E3779B1) + words[i : len(words) - 4 + i]) & np.uint64(0xFFFFFFFFFFFF)
    runs = (runs * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(24)
    sketch = np.full(STORY_BINS, EMPTY, dtype=np.uint32)
    np.minimum.at(sketch, (runs % np.uint64(STORY_BINS)).astype(int), (runs >> np.uint64(8)).astype(np.uint32))
    return sketch


def crossing_stories(sketches: np.ndarray, splits: Sequence[str]) -> set[int]:
    """Rows of (n, STORY_BINS) `sketches` whose story has a near copy in another split: the side nearer to training."""
    rank = np.array([RANK[split] for split in splits])
    dropped = set()
    for column in sketches.T:
        order = np.argsort(column, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(column[order]) != 0, True])
        shared = np.flatnonzero(np.diff(starts) > 1)
        for start, end in zip(starts[shared], starts[shared + 1], strict=True):
            rows = order[start:end]
            if column[rows[0]] == EMPTY:
                continue
            if rank[rows].min() == rank[rows].max():
                continue
            for i in rows:
                better = rows[rank[rows] < rank[i]]
                filled = (sketches[better] != EMPTY) | (sketches[i] != EMPTY)
                alike = (sketches[better] == sketches[i]) & filled
                if (alike.sum(axis=1) >= STORY_OVERLAP * filled.sum(axis=1)).any():
                    dropped.add(int(i))
    return dropped


def crossing_prompts(prompts: Sequence[str], splits: Sequence[str]) -> set[int]:
    """Indices of prompts with a near copy in another split: the side nearer to training (test wins over all).

    Two sets that share at least m words share k of them among the n - m + k rarest of each (n words), so only those are
    multiplied out to find candidates; k = 2 leaves few pairs to compare.
    """
    from scipy.sparse import csr_array  # 0.2 s, which processes that only clean rows are spared

    number: dict[str, int] = {}
    flat, ends = array("i"), [0]
    for prompt in prompts:
        flat.extend(number.setdefault(word, len(number)) for word in _content(prompt))
        ends.append(len(flat))
    words, ends = np.array(flat), np.array(ends)
    n = np.diff(ends)
    owner = np.repeat(np.arange(len(n)), n)
    rank = np.argsort(np.argsort(np.bincount(words), kind="stable"))
    words = rank[words]
    words = words[np.lexsort((words, owner))]  # each prompt's own, rarest first

    def sets(words: np.ndarray, sizes: np.ndarray) -> csr_array:
        return csr_array((np.ones(len(words), np.int32), words, np.r_[0, np.cumsum(sizes)]), (len(n), len(rank)))

    least = np.ceil(PROMPT_OVERLAP * n).astype(int)
    k = np.minimum(2, least)
    is_rare = np.arange(len(words)) - ends[owner] < (n - least + k)[owner]
    whole, rare = sets(words, n), sets(words[is_rare], n - least + k)

    splits, known, crossing = np.array(splits), np.zeros(0, int), np.zeros(len(n), bool)
    for split in sorted(RANK, key=RANK.__getitem__):
        here = np.flatnonzero(splits == split)
        of_known = rare[known].T.tocsr()
        for rows in np.split(here, range(PROMPTS_AT_ONCE, len(here), PROMPTS_AT_ONCE)):
            shared = (rare[rows] @ of_known).tocoo()
            near = np.flatnonzero(shared.data >= k[rows[shared.row]])
            for some in np.split(near, range(PAIRS_AT_ONCE, len(near), PAIRS_AT_ONCE)):
                i, j = rows[shared.row[some]], known[shared.col[some]]
                both = whole[i].multiply(whole[j]).sum(axis=1)
                crossing[i[both >= PROMPT_OVERLAP * (n[i] + n[j] - both)]] = True
        if split != "train":
            known = np.r_[known, here[~crossing[here]]]
    return set(np.flatnonzero(crossing).tolist())


def _content(prompt: str) -> frozenset[str]:
    words = words_of(prompt)
    return frozenset(word for word in words if word not in FUNCTION_WORDS) or frozenset(words or [prompt])
