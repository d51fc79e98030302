import random

import numpy as np
import pytest
import torch

from storygen.bertscore import Embedded, load_encoder
from storygen.calibration import CAP, Calibration
from storygen.hacks import hack
from storygen.idf import Idf
from storygen.replaced import DISTURBANCES, Probe, answering, fit_probe, token_labels
from tests.reward_data import data_folder, held_out


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


@pytest.fixture(scope="module")
def probe():
    return Calibration.load(data_folder() / "calibration.json").probe


@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_disturbances_mark_what_they_change(disturb):
    """Without the marked words, the rest is in the original order; the same seed disturbs the same way."""
    row, other = ([f"{name}{i}" for i in range(60)] for name in "ab")
    marked = disturb(row, other, random.Random(3))
    assert marked == disturb(row, other, random.Random(3))
    kept = [word for word, changed in marked if not changed]
    assert kept == [word for word in row if word in set(kept)]
    assert any(changed for _, changed in marked)
    assert disturb(["one", "two", "three", "four"], ["five"], random.Random(0))


def test_labels_are_of_the_pieces_of_marked_words(encoder):
    marked = [("an", False), ("extraordinarily", True), ("old,", False), ("wyvern", True)]
    pieces = encoder.tokenizer.tokenize("an extraordinarily old, wyvern")
    labels = token_labels(marked, encoder).tolist()
    joined = "".join(piece.removeprefix("##") for piece, label in zip(pieces, labels, strict=True) if label)
    assert joined == "extraordinarilywyvern"


def test_belongs_by_hand(encoder):
    """A logistic regression on the vectors before, at and after a token; special tokens always belong."""
    torch.manual_seed(0)
    text = Embedded(np.arange(5), torch.nn.functional.normalize(torch.randn(5, 4), dim=1))
    probe = Probe(torch.randn(3, 4).tolist(), 0.3)
    before, here, after = (np.array(row) for row in probe.weights)
    v = text.vectors.numpy()
    expected = [1 / (1 + np.exp(before @ v[i - 1] + here @ v[i] + after @ v[i + 1] + 0.3)) for i in (1, 2, 3)]
    np.testing.assert_allclose(probe.belongs(text, encoder).numpy(), [1, *expected, 1], rtol=1e-5)
    assert len(probe.belongs(encoder.embed([""])[0], encoder)) == 0
    assert probe.home(encoder.embed([""])[0], encoder, np.zeros(0)) == 0


def test_a_word_gives_its_weight_to_its_best_match():
    x = Embedded(np.arange(3), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]))
    y = Embedded(np.arange(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert answering(x, y, np.array([1.0, 2.0, 4.0])).tolist() == [5.0, 2.0]


def test_thrown_in_words_are_found(probe, encoder):
    """On held-out stories: a text with words thrown in always belongs less, and those words far less than the others."""
    idf = Idf.load(data_folder() / "idf.npz", encoder.tokenizer).capped(CAP)
    rows = held_out(12)
    strewn = [hack("strewn_outline_words", rows, i) for i in range(len(rows))]
    honest, hacked = (encoder.embed([row["story"] for row in some]) for some in (rows, strewn))
    for before, after in zip(honest, hacked, strict=True):
        assert probe.home(after, encoder, idf[after.ids]) < probe.home(before, encoder, idf[before.ids])
    thrown, own = [], []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        marked = DISTURBANCES[0](row["story"].split(), other["story"].split(), random.Random(0))
        text = encoder.embed([" ".join(word for word, _ in marked)])[0]
        labels, belongs = token_labels(marked, encoder), probe.belongs(text, encoder).numpy()[1:-1]
        thrown.append(belongs[labels].mean())
        own.append(belongs[~labels].mean())
    assert np.mean(thrown) < 0.5 < np.mean(own) - 0.1


def test_nothing_to_learn_from(encoder):
    blank = fit_probe(["two words", ""], encoder, encoder.flat_weights(), 0)
    text = encoder.embed(["any text at all"])[0]
    assert blank.belongs(text, encoder).tolist()[1:-1] == [0.5] * 4
