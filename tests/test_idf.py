import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from storygen import idf as idf_module
from storygen.bertscore import backend, fingerprint, minilm_folder
from storygen.cli import InputError
from storygen.idf import Idf, Pieces, build_idf, count_whole, cut_at_blanks, mark_of

STORIES = [
    json.loads(line)["story"] for line in (Path(__file__).parents[1] / "corpus/stories.jsonl").read_text().splitlines()[:150]
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(minilm_folder())


def test_is_bert_scores_table(tokenizer):
    utils = pytest.importorskip("bert_score.utils")
    theirs = utils.get_idf_dict(STORIES, tokenizer, nthreads=0)
    idf = build_idf(tokenizer, iter(STORIES))
    special = set(tokenizer.all_special_ids)
    for token in range(len(tokenizer)):
        assert idf.weights[token] == pytest.approx(0.0 if token in special else theirs[token], abs=1e-6)


TOKENS = backend(AutoTokenizer.from_pretrained(minilm_folder()))
VOCABULARY = TOKENS.get_vocab_size()
# What could make a text's tokens differ from those of its pieces: odd blanks, controls, combining marks, special tokens.
ODD = st.sampled_from(
    [" ", "\n", "\t", "\x1c", "\x85", "\u00a0", "\u2028", "\u200b", "\u0301", "e\u0301", "[PAD]", "[SEP]", "##s"]
)
TEXT = st.lists(
    ODD | st.text(max_size=8) | st.sampled_from(["don't", "Well-known,", "naïve", "漢字", "x" * 120]), max_size=12
)


@given(st.lists(TEXT.map("".join), min_size=1, max_size=6))
def test_piece_by_piece_counts_what_whole_texts_count(texts):
    pieces = Pieces(TOKENS, VOCABULARY, mark_of(TOKENS))
    expected = count_whole(TOKENS, VOCABULARY, texts)
    for _ in range(2):  # the second time no piece is new
        np.testing.assert_array_equal(pieces.count(texts, cut_at_blanks(texts)), expected)


def test_pieces_that_are_too_many_are_forgotten(tokenizer, monkeypatch):
    whole = build_idf(tokenizer, STORIES).df
    monkeypatch.setattr(idf_module, "MOST_PIECES", 100)
    monkeypatch.setattr(idf_module, "BATCH", 10)
    np.testing.assert_array_equal(build_idf(tokenizer, STORIES).df, whole)


def test_other_tokenizers_read_whole_texts():
    """A byte-level one joins what is on both sides of a blank."""
    other = Tokenizer(models.WordLevel({"[UNK]": 0, "Ġcat": 1, "cat": 2}, unk_token="[UNK]"))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    idf = build_idf(PreTrainedTokenizerFast(tokenizer_object=other, unk_token="[UNK]"), ["cat cat", "cat"])
    assert idf.df.tolist() == [0, 1, 2]


def test_small_corpus_by_hand(tokenizer):
    idf = build_idf(tokenizer, ["the cat the cat", "the dog", ""])
    cat, dog, the = tokenizer.convert_tokens_to_ids(["cat", "dog", "the"])
    assert idf.documents == 3
    assert idf.df[[cat, dog, the]].tolist() == [1, 1, 2]
    np.testing.assert_allclose(idf.weights[[cat, dog, the]], np.log([4 / 2, 4 / 2, 4 / 3]), rtol=1e-6)
    assert idf.weights[tokenizer.convert_tokens_to_ids("zebra")] == pytest.approx(math.log(4))
    assert idf.weights[tokenizer.cls_token_id] == 0


def test_whole_texts_are_counted(tokenizer):
    idf = build_idf(tokenizer, ["word " * 3000 + "zebra"])
    assert idf.df[tokenizer.convert_tokens_to_ids("zebra")] == 1


def test_no_texts(tokenizer):
    assert (build_idf(tokenizer, []).weights == 0).all()


def test_cap_is_a_percentile_of_incidences(tokenizer):
    idf = build_idf(tokenizer, STORIES)
    seen = np.sort(np.repeat(idf.weights, idf.df))
    seen = seen[seen > 0]
    for percentile in (50, 90, 99):
        ceiling = seen[min(len(seen) - 1, math.ceil(len(seen) * percentile / 100) - 1)]
        capped = idf.capped(percentile)
        assert capped.max() == pytest.approx(ceiling)
        np.testing.assert_array_equal(capped[idf.weights <= ceiling], idf.weights[idf.weights <= ceiling])


def test_save_and_load(tokenizer, tmp_path):
    idf = build_idf(tokenizer, STORIES[:20])
    idf.save(tmp_path / "idf.npz")
    again = Idf.load(tmp_path / "idf.npz", tokenizer)
    np.testing.assert_array_equal(again.weights, idf.weights)
    assert (again.documents, again.fingerprint) == (20, fingerprint(tokenizer))

    other = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="another tokenizer"):
        Idf.load(tmp_path / "idf.npz", PreTrainedTokenizerFast(tokenizer_object=other, unk_token="[UNK]"))
    with pytest.raises(InputError, match=r"run data_prep\.py first"):
        Idf.load(tmp_path / "none.npz", tokenizer)
    whole = (tmp_path / "idf.npz").read_bytes()
    for torn in (b"", b"PK", whole[: len(whole) // 2], b"not an archive"):
        (tmp_path / "torn.npz").write_bytes(torn)
        with pytest.raises(InputError, match="damaged"):
            Idf.load(tmp_path / "torn.npz", tokenizer)


def test_fingerprint_ignores_truncation_and_padding(tokenizer):
    before = fingerprint(tokenizer)
    tokenizer(["a b c"], truncation=True, max_length=8, padding="max_length")
    assert fingerprint(tokenizer) == before
