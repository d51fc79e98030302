import json
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from storygen.bertscore import fingerprint, minilm_folder
from storygen.cli import InputError
from storygen.idf import Idf, build_idf

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
