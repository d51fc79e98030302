"""How varied a set of texts is: pure functions over tokenised texts."""

import math
import random
from collections import Counter
from collections.abc import Sequence

from storygen.textstats import ngrams


def distinct(texts: Sequence[Sequence[str]], n: int, size: int | None = None) -> float:
    """Distinct-n (Li et al. 2016): different n-grams over all n-grams of the texts taken together; 0 where there are none.

    The plain ratio falls as the texts get longer. With `size` it is that of `size` n-grams drawn without replacement, in
    expectation (rarefaction, Hurlbert 1971), which compares sets of unequal length; of all of them where there are fewer.
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
    """Self-BLEU (Zhu et al. 2018): mean BLEU-n of each text against others of the set; high where all texts are alike.

    It grows with the number of references, so at most `references` others are drawn for each text: compare only values of
    equal number. Texts of fewer than n words are left out; 0 where fewer than two remain.
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
