import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storygen import textstats as ts

ROWS = [json.loads(line) for line in (Path(__file__).parents[1] / "corpus/stories.jsonl").read_text().splitlines()]
TEXT = st.text(alphabet="abc .,!?\"'“”’:\n", max_size=80)
WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "the", "of"]), max_size=60)


def test_words():
    assert ts.words("It’s a well-known FACT — 3 cats’ tails, _really_!") == [
        "it's", "a", "well", "known", "fact", "3", "cats", "tails", "really",
    ]  # fmt: skip
    assert ts.words(" … —") == []


@pytest.mark.parametrize(
    "hidden", ["o\u200bld k\u00ading", "óld kîng", "old-king", "o\u0301ld\u2060 king", "OLD\ufeff  KING"]
)
def test_what_an_encoder_reads_through_hides_no_word(hidden):
    assert ts.words(hidden) == ["old", "king"]


def test_repeated_share():
    assert ts.repeated_share(["a", "b", "a", "b", "a", "b"], 2) == pytest.approx(1 - 2 / 5)
    assert ts.repeated_share(["a"], 2) == 0


@given(WORDS, st.integers(1, 4))
def test_repeated_share_counts_duplicates(text, n):
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert ts.repeated_share(text, n) == pytest.approx(again / len(grams) if grams else 0)


def test_copied_share():
    source = ["the", "old", "king", "lost", "his", "crown"]
    assert ts.copied_share(["then", "the", "old", "king", "lost", "his", "crown", "again"], [source]) == pytest.approx(3 / 5)
    assert ts.copied_share(["the"], [source]) == 0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ('"Come in," she said.', 2 / 4),
        ("“Come in,” she said.", 2 / 4),
        ("«Come in», she said.", 2 / 4),
        ("'Come in,' she said.", 2 / 4),
        ("‘It’s late,’ she said.", 2 / 4),
        ("The dogs' bowls and the cat's dish, 'twas all.", 0),
        ('He said, "I left it\nand went home.', 3 / 8),
        ("He said, “I left it\nand went home.", 3 / 8),
        ("Anna: Where are you?\nBen (low): Here.\nHe waved.", 7 / 9),
        ("He knew one thing: it was late.", 0),
        ('"a" b "c" d', 2 / 4),
        ("", 0),
    ],
)
def test_dialogue_share(text, share):
    assert ts.dialogue_share(text) == pytest.approx(share)


@given(TEXT)
def test_dialogue_share_is_a_share(text):
    assert 0 <= ts.dialogue_share(text) <= 1


@given(WORDS, st.integers(1, 20))
def test_mattr_is_the_mean_over_windows(text, window):
    spans = [text[i : i + window] for i in range(max(1, len(text) - window + 1))]
    expected = sum(len(set(span)) / len(span) for span in spans) / len(spans) if text else 0
    assert ts.mattr(text, window) == pytest.approx(expected)


def test_shares_of_words():
    text = ["the", "king", "and", "the", "crown", "of", "the", "king"]
    assert ts.stop_share(text) == pytest.approx(5 / 8)
    assert ts.borrowed_share(text, ["the", "king"]) == pytest.approx(2 / 8)
    assert ts.stop_share([]) == ts.borrowed_share([], ["king"]) == 0


@given(WORDS, WORDS, st.integers(1, 10))
def test_densest_share_is_the_best_window(text, source, window):
    content = set(source) - ts.STOP_WORDS
    counts = [sum(word in content for word in text[i : i + window]) for i in range(max(1, len(text)))]
    assert ts.densest_share(text, source, window) == pytest.approx(max(counts) / window)


@pytest.mark.parametrize(
    ("text", "ended"),
    [("He left.", True), ('He said, "Go!"', True), ("“Go…”\n", True), ("He left the", False), ("", False), ("Yes,”", False)],
)
def test_is_ended(text, ended):
    assert ts.is_ended(text) is ended


def test_word_order_tells_shuffled_words():
    """Every held-out story scores above every shuffled one."""
    order = ts.WordOrder.count(row["story"] for row in ROWS[100:])
    rng = random.Random(0)
    human, mixed = [], []
    for row in ROWS[:100]:
        words = row["story"].split()
        human.append(order.score(row["story"]))
        mixed.append(order.score(" ".join(rng.sample(words, len(words)))))
    assert min(human) > max(mixed) + 0.3
    assert order.score("") == ts.WordOrder({}).score("") == 0


def test_word_order_by_hand():
    order = ts.WordOrder({". the": 3, "the *": 4, "* .": 3, "* the": 1})
    # From the skeleton ". the *": p(the) = 5/12, p(*) = 5/12.
    first = (3 + 5 * 5 / 12) / (3 + 5) / (5 / 12)
    second = (4 + 5 * 5 / 12) / (4 + 5) / (5 / 12)
    assert order.score("the cat") == pytest.approx((math.log(first) + math.log(second)) / 2)
