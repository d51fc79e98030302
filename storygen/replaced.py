"""Which words do not belong where they stand: a linear probe on the encoder's vectors.

Replaced token detection (ELECTRA, Clark et al. 2020, arXiv 2003.10555), with random disturbances in place of a generator:
human texts are disturbed at known places and a logistic regression learns to find them. BERTScore cannot detect a word that
was thrown in, because it is there to be matched; the vectors around it can.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from storygen.bertscore import Embedded, Encoder
from storygen.textstats import STOP_WORDS, words

# A disturbed text has about one disturbed word in 16.
RATE = 16
# Inverse strength of the L2 penalty: between 1 and 30 the figures do not change.
C = 3.0
# Floor on a token's probability of belonging, so that a single one cannot sink a text.
FLOOR = 1e-3

Marked = list[tuple[str, bool]]


@dataclass(frozen=True)
class Probe:
    """weights: (3, d), for the vectors of the token before, the token itself and the one after. bias: at even prior odds."""

    weights: list[list[float]]
    bias: float

    @cached_property
    def matrix(self) -> torch.Tensor:
        """The weights as (d, 3)."""
        return torch.tensor(self.weights).T.contiguous()

    def belongs(self, text: Embedded, encoder: Encoder) -> torch.Tensor:
        """Probability that each token is where its author put it, (n,) fp32, at even prior odds; 1 for special tokens."""
        if not len(text.ids):
            return torch.ones(0, device=text.vectors.device)
        before, here, after = (text.vectors @ self.matrix.to(text.vectors.device)).unbind(1)
        score = here + self.bias
        score[1:] += before[:-1]
        score[:-1] += after[1:]
        belongs = torch.sigmoid(-score)
        belongs[: len(encoder.prefix)] = 1.0
        belongs[len(belongs) - len(encoder.suffix) :] = 1.0
        return belongs

    def discounted(self, text: Embedded, encoder: Encoder) -> Embedded:
        """The text with its matches discounted: every token's cosines are multiplied by its `belongs`."""
        return Embedded(text.ids, text.vectors * self.belongs(text, encoder)[:, None]) if len(text.ids) else text

    def home(self, text: Embedded, encoder: Encoder, weights: np.ndarray) -> float:
        """Geometric mean of `belongs` over a text's tokens, by weights (n,); 0 if all weights are 0.

        Geometric, because a few words that plainly do not belong are what distinguishes a disturbed text from a loose one.
        """
        logs = self.belongs(text, encoder).clamp_min(FLOOR).log().double().cpu().numpy()
        return float(np.exp(weights @ logs / weights.sum())) if weights.sum() > 0 else 0.0


def answering(x: Embedded, y: Embedded, weights: np.ndarray) -> np.ndarray:
    """How much of x's weights (n_x,) each token of y answers, (n_y,): each token of x gives its weight to its best match."""
    answered = np.zeros(len(y.ids))
    if len(x.ids) and len(y.ids):
        np.add.at(answered, (x.vectors @ y.vectors.T).argmax(dim=1).cpu().numpy(), weights)
    return answered


def fit_probe(texts: Sequence[str], encoder: Encoder, idf: np.ndarray, seed: int) -> Probe:
    """Disturb each text in one way, encode, and fit. idf: (vocab,) weights of the tokens in the fit.

    Heavy words earn the reward, so the probe should know those best. Texts under four words are left out; with no texts at
    all, the probe says that everything belongs equally.
    """
    from sklearn.linear_model import LogisticRegression

    rng = random.Random(seed)
    split = [text.split() for text in texts if len(text.split()) >= 4]
    if not split:
        return Probe([[0.0] * encoder.model.config.hidden_size] * 3, 0.0)
    marked = [DISTURBANCES[i % len(DISTURBANCES)](row, rng.choice(split), rng) for i, row in enumerate(split)]
    coded = encoder.embed([" ".join(word for word, _ in row) for row in marked])
    head, tail = len(encoder.prefix), len(encoder.suffix)
    features, labels, weights = [], [], []
    for row, text in zip(marked, coded, strict=True):
        v = text.vectors.cpu().numpy()
        edge = np.zeros((1, v.shape[1]), dtype=v.dtype)
        around = np.concatenate([np.concatenate([edge, v[:-1]]), v, np.concatenate([v[1:], edge])], axis=1)
        features.append(around[head : len(v) - tail])
        labels.append(token_labels(row, encoder))
        weights.append(idf[text.ids[head : len(v) - tail]] + 0.2)
    x, y, w = np.concatenate(features), np.concatenate(labels), np.concatenate(weights)
    fitted = LogisticRegression(C=C, max_iter=500).fit(x, y, sample_weight=w)
    share = (w * y).sum() / w.sum()
    rows = fitted.coef_[0].reshape(3, -1)
    return Probe(
        [[float(f"{value:.5g}") for value in row] for row in rows],
        float(fitted.intercept_[0] - np.log(share / (1 - share))),
    )


def token_labels(row: Marked, encoder: Encoder) -> np.ndarray:
    """Whether each token of the space-joined words is part of a disturbed one, (n,) bool, without special tokens."""
    ends = np.cumsum([len(word) + 1 for word, _ in row])
    offsets = encoder.backend.encode(" ".join(word for word, _ in row), add_special_tokens=False).offsets
    return np.array([row[np.searchsorted(ends, start, side="right")][1] for start, _ in offsets])


def content(row: list[str]) -> list[str]:
    """The words that are not function words; all words if none are left."""
    return [word for word in row if words(word) and words(word)[0] not in STOP_WORDS] or row


def strewn(row: list[str], other: list[str], rng: random.Random) -> Marked:
    """Content words of another text inserted anywhere."""
    out, pool = [(word, False) for word in row], content(other)
    for _ in range(max(2, len(row) // RATE)):
        out.insert(rng.randrange(len(out) + 1), (rng.choice(pool), True))
    return out


def spliced(row: list[str], other: list[str], rng: random.Random) -> Marked:
    """Runs of three words of another text inserted anywhere."""
    out = [(word, False) for word in row]
    for _ in range(max(1, len(row) // (3 * RATE))):
        start, at = rng.randrange(max(1, len(other) - 2)), rng.randrange(len(out) + 1)
        out[at:at] = [(word, True) for word in other[start : start + 3]]
    return out


def swapped(row: list[str], other: list[str], rng: random.Random) -> Marked:
    """Pairs of words that change places."""
    out = [(word, False) for word in row]
    for _ in range(max(1, len(row) // (2 * RATE))):
        a, b = rng.randrange(len(out)), rng.randrange(len(out))
        out[a], out[b] = (out[b][0], True), (out[a][0], True)
    return out


def shuffled(row: list[str], other: list[str], rng: random.Random) -> Marked:
    """A run of 5 to 15 words in random order."""
    n = min(len(row), rng.randint(5, 15))
    start = rng.randrange(len(row) - n + 1)
    span = rng.sample(row[start : start + n], n)
    return [(w, False) for w in row[:start]] + [(w, True) for w in span] + [(w, False) for w in row[start + n :]]


def replaced(row: list[str], other: list[str], rng: random.Random) -> Marked:
    """Words replaced by content words of another text."""
    out, pool = [(word, False) for word in row], content(other)
    for _ in range(max(2, len(row) // RATE)):
        out[rng.randrange(len(out))] = (rng.choice(pool), True)
    return out


DISTURBANCES = (strewn, spliced, swapped, shuffled, replaced)
