"""Diversity measures against calculations by hand."""

import math
import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storygen.diversity import Copies, bleu, distinct, nearest, self_bleu
from storygen.textstats import words


def test_distinct_counts_types_over_tokens():
    texts = [words("a b a b"), words("a b c")]
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 3 / 5  # ab ba ab | ab bc
    assert distinct([["a"], []], 2) == 0.0


def test_distinct_of_a_fixed_size_is_the_mean_over_all_draws():
    letters = words("a a a b b c")
    by_hand = [len(set(draw)) / 3 for draw in combinations(letters, 3)]
    assert distinct([letters], 1, size=3) == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-12)
    assert distinct([letters], 1, size=6) == distinct([letters], 1, size=60) == 1 / 2


def test_distinct_of_a_fixed_size_does_not_depend_on_how_much_text_there_is():
    draw = random.Random(0)
    short, long = ([[str(draw.randrange(50)) for _ in range(n)]] for n in (2_000, 20_000))
    assert distinct(long, 1) < distinct(short, 1) / 5
    assert distinct(long, 1, size=100) == pytest.approx(distinct(short, 1, size=100), abs=0.01)


def test_bleu_by_hand():
    # 1-grams: the cat sat on the mat: 'the' is clipped to 1, so 4 of 6 match; 2-grams: 'the cat', 'cat sat' of 5.
    score = bleu(words("the cat sat on the mat"), [words("the cat sat down on a chair")], n=2)
    assert score == pytest.approx(math.sqrt(4 / 6 * 2 / 5) * math.exp(1 - 7 / 6))
    assert bleu(words("a b c d"), [words("x y"), words("a b c d")]) == 1.0
    assert bleu(words("a b c"), [words("a b c")]) == 0.0


def test_bleu_without_a_match_of_some_order_is_small_and_not_zero():
    score = bleu(words("a b c d e"), [words("a x b y c")], n=2)
    assert score == pytest.approx(math.sqrt(3 / 5 * 0.1 / 4))


def test_self_bleu_tells_copies_from_different_texts():
    assert self_bleu([words("a b c d e")] * 3) == pytest.approx(1.0)
    different = self_bleu([[f"{i}{c}" for c in "abcdef"] for i in range(4)])
    assert 0 < different < 0.05
    assert self_bleu([words("a b c d"), ["a"]]) == 0.0
    mixed = [random.Random(i).choices("abcdefgh", k=60) for i in range(50)]
    assert self_bleu(mixed, references=40) > self_bleu(mixed, references=2)
    assert self_bleu(mixed, seed=1) == self_bleu(mixed, seed=1)


def longest_by_hand(text: list[str], others: list[list[str]]) -> int:
    found = 0
    for other in others:
        for i in range(len(text)):
            for j in range(len(other)):
                n = 0
                while i + n < len(text) and j + n < len(other) and text[i + n] == other[j + n]:
                    n += 1
                found = max(found, n)
    return found if found >= 3 else 0


TEXTS = st.lists(st.lists(st.sampled_from("abcd"), max_size=14), max_size=5)


@given(TEXTS, st.lists(st.sampled_from("abcdx"), max_size=14))
def test_longest_copied_run_is_that_of_a_plain_search(texts, text):
    assert Copies(texts).longest(text) == longest_by_hand(text, texts)


def test_a_copied_run_ends_with_its_text():
    assert Copies([list("abc"), list("def")]).longest(list("abcdef")) == 3
    assert Copies([list("xabcdefy")]).longest(list("zabcdefz")) == 6


def test_nearest_is_1_for_a_copy_and_0_for_other_words():
    others = ["the king sleeps in the wood", "a ferry leaves at nine"]
    copy, none, part = nearest([others[1], "zebras quarrel", "the king leaves"], others)
    assert copy == pytest.approx(1) and none == 0 and 0 < part < 1
