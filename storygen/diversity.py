"""How varied a set of texts is, and how new compared with others: pure functions."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from storygen.textstats import ngrams

SEED_RUN = 3  # words a copied run needs to be found


def distinct(texts: Sequence[Sequence[str]], n: int, size: int | None = None) -> float:
    """Distinct-n (Li et al. 2016): distinct n-grams over all n-grams of the texts taken together; 0 if there are none.

    The plain ratio falls as the texts get longer. With `size` it is the expected ratio of `size` n-grams drawn without
    replacement (rarefaction, Hurlbert 1971), which compares sets of unequal length; of all n-grams if there are fewer.
    """
    counts = Counter(gram for text in texts for gram in ngrams(text, n))
    total = counts.total()
    if not total:
        return 0.0
    if size is None or size >= total:
        return len(counts) / total

    def log_choose(top: int) -> float:
        return math.lgamma(top + 1) - math.lgamma(size + 1) - math.lgamma(top - size + 1)

    # A type is missed with probability C(total - count, size) / C(total, size).
    missed = (math.exp(log_choose(total - c) - log_choose(total)) if total - c >= size else 0.0 for c in counts.values())
    return (len(counts) - sum(missed)) / size


def bleu(hypothesis: Sequence[str], references: Sequence[Sequence[str]], n: int = 4) -> float:
    """Sentence BLEU (Papineni et al. 2002) in [0, 1], uniform weights over 1- to n-grams, closest reference length.

    An n-gram order without any match counts 0.1 matches (method 1 of Chen & Cherry 2014). 0 for fewer than n words.
    """
    if len(hypothesis) < n:
        return 0.0
    log_precision = 0.0
    for k in range(1, n + 1):
        counts = Counter(ngrams(hypothesis, k))
        found = [Counter(ngrams(reference, k)) for reference in references]
        matches = sum(min(count, max(f[gram] for f in found)) for gram, count in counts.items())
        log_precision += math.log((matches or 0.1) / counts.total()) / n
    closest = min((len(reference) for reference in references), key=lambda length: (abs(length - len(hypothesis)), length))
    return math.exp(log_precision + min(0.0, 1 - closest / len(hypothesis)))


def self_bleu(texts: Sequence[Sequence[str]], n: int = 4, references: int = 32, seed: int = 0) -> float:
    """Self-BLEU (Zhu et al. 2018): mean BLEU-n of each text against others of the set; high if all texts are alike.

    It grows with the number of references, so at most `references` others are drawn for each text: compare only values of
    equal number. Texts of fewer than n words are left out; 0 if fewer than two remain.
    """
    texts = [text for text in texts if len(text) >= n]
    if len(texts) < 2:
        return 0.0
    draw = random.Random(seed)
    scores = []
    for i, text in enumerate(texts):
        others = [j for j in range(len(texts)) if j != i]
        scores.append(bleu(text, [texts[j] for j in draw.sample(others, min(references, len(others)))], n))
    return sum(scores) / len(scores)


class Copies:
    """Longest runs of words that texts share with given ones, found by an index of the latter's runs of SEED_RUN words."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        self.numbers = {word: i for i, word in enumerate(dict.fromkeys(word for text in texts for word in text), start=1)}
        # 0 after every text, a word that no text contains: runs end there.
        self.words = np.array([n for text in texts for n in (*(self.numbers[word] for word in text), 0)], dtype=np.int64)
        codes = self._codes(self.words)
        self.order = np.argsort(codes, kind="stable")
        self.codes = codes[self.order]

    def _codes(self, numbers: np.ndarray) -> np.ndarray:
        """One number for every run of SEED_RUN words."""
        padded = np.concatenate([numbers, np.zeros(SEED_RUN, dtype=np.int64)])
        runs = np.lib.stride_tricks.sliding_window_view(padded, SEED_RUN)[: len(numbers)]
        return runs @ ((len(self.numbers) + 2) ** np.arange(SEED_RUN))[::-1]

    def longest(self, text: Sequence[str]) -> int:
        """Length in words of the longest run that is also in one of the texts; 0 if shorter than SEED_RUN."""
        unknown = len(self.numbers) + 1
        own = np.array([*(self.numbers.get(word, unknown) for word in text), -1], dtype=np.int64)
        codes = self._codes(own[:-1])[: max(0, len(text) - SEED_RUN + 1)]
        first, last = np.searchsorted(self.codes, codes, "left"), np.searchsorted(self.codes, codes, "right")
        here = np.repeat(np.arange(len(codes)), last - first)
        there = self.order[np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)] or [[]]).astype(int)]
        length = SEED_RUN - 1
        while len(here):
            length += 1
            end = np.minimum(there + length, len(self.words) - 1)
            goes_on = own[here + length] == self.words[end]
            here, there = here[goes_on], there[goes_on]
        return length if length >= SEED_RUN else 0


def nearest(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Largest tf-idf cosine of each text with any of the others, (texts,): 1 for a copy. scikit-learn's, sublinear tf."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True)
    known = vectors.fit_transform(others)
    return (vectors.transform(texts) @ known.T).max(axis=1).toarray()[:, 0]
