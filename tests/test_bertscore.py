import json
import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from storygen.bertscore import (
    MINILM_LAYER,
    Embedded,
    best_match,
    load_encoder,
    minilm_folder,
    precision_recall_f1,
    recall,
    token_weights,
    window_starts,
)
from storygen.cli import InputError
from storygen.idf import build_idf

ROWS = [json.loads(line) for line in (Path(__file__).parents[1] / "corpus/stories.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


@pytest.mark.parametrize("weighted", [False, True], ids=["flat", "idf"])
def test_raw_is_bert_score(encoder, weighted):
    """P, R and F1 of 200 pairs against bert-score 0.3.13 with the same weights, layer and idf."""
    bert_score = pytest.importorskip("bert_score")
    rows = ROWS[:200]
    references = [row["prompt"] for row in rows]
    candidates = [row["outline"] for row in rows[:195]] + [row["story"] for row in rows[195:]]
    idf = build_idf(encoder.tokenizer, candidates)
    table = idf.weights if weighted else encoder.flat_weights()
    theirs = bert_score.score(
        candidates,
        references,
        model_type=str(minilm_folder()),
        num_layers=MINILM_LAYER,
        idf={i: float(w) for i, w in enumerate(idf.weights)} if weighted else False,
        device="cpu",
    )
    x, y = encoder.embed(references), encoder.embed(candidates)
    ours = [precision_recall_f1(a, b, table, "raw") for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(np.array(ours).T, torch.stack(theirs).numpy(), atol=1e-5)


@pytest.mark.parametrize("tf", ["raw", "sublinear", "binary"])
def test_recall_by_hand(tf):
    rng = np.random.default_rng(0)
    x, y = (Embedded(rng.integers(0, 5, n), torch.nn.functional.normalize(torch.randn(n, 8), dim=1)) for n in (12, 7))
    idf = np.array([0.0, 0.5, 1.0, 2.0, 3.0], dtype=np.float32)
    factor = {"raw": lambda n: n, "sublinear": lambda n: 1 + math.log(n), "binary": lambda n: 1}[tf]
    counts = Counter(x.ids.tolist())
    above = below = 0.0
    for token, vector in zip(x.ids.tolist(), x.vectors, strict=True):
        weight = float(idf[token]) * factor(counts[token]) / counts[token]
        above += weight * max(float(vector @ other) for other in y.vectors)
        below += weight
    assert recall(x, y, idf, tf) == pytest.approx(above / below, abs=1e-6)


def test_repeating_a_word_earns_little():
    idf = np.array([1.0])
    for tf, total in (("raw", 9), ("sublinear", 1 + math.log(9)), ("binary", 1)):
        assert token_weights(np.zeros(9, dtype=int), idf, tf).sum() == pytest.approx(total)
    with pytest.raises(InputError, match="tf must be"):
        token_weights(np.zeros(1, dtype=int), idf, "cubic")


def test_empty_and_short_texts(encoder):
    empty, blank, one, prompt = encoder.embed(["", " \n", "cat", ROWS[0]["prompt"]])
    idf = encoder.flat_weights()
    assert len(empty.ids) == len(blank.ids) == 0
    assert len(one.ids) == 3
    assert recall(one, one, idf) == pytest.approx(1, abs=1e-5)
    for x, y in ((empty, prompt), (prompt, empty), (empty, empty)):
        assert precision_recall_f1(x, y, idf) == (0, 0, 0)
    assert encoder.embed([]) == []


def test_batches_and_order_do_not_matter(encoder):
    texts = [row["outline"] for row in ROWS[:6]] + [ROWS[0]["story"], "one", ROWS[0]["outline"]]
    shuffled = random.Random(0).sample(range(len(texts)), len(texts))
    together = encoder.embed([texts[i] for i in shuffled])
    for i, text in zip(shuffled, together, strict=True):
        alone = encoder.embed([texts[i]])[0]
        assert (alone.ids == text.ids).all()
        torch.testing.assert_close(alone.vectors, text.vectors, atol=2e-6, rtol=0)
        torch.testing.assert_close(text.vectors.norm(dim=1), torch.ones(len(text.ids)))


@pytest.mark.parametrize(("length", "window"), [(5, 10), (10, 10), (11, 10), (37, 10), (1000, 254), (9, 1), (7, 2)])
def test_windows_cover_every_token(length, window):
    starts = window_starts(length, window)
    covered = {i for start in starts for i in range(start, min(start + window, length))}
    assert covered == set(range(length))
    assert starts == sorted(set(starts))
    assert all(b - a <= max(1, window // 2) for a, b in pairwise(starts))


def test_long_text_takes_each_token_from_its_most_central_window(encoder):
    long = " ".join(row["story"] for row in ROWS[:4])
    ids = encoder.backend.encode(long, add_special_tokens=False).ids
    assert len(ids) > encoder.window
    whole = encoder.embed([long])[0]
    assert whole.ids.tolist() == [*encoder.prefix, *ids, *encoder.suffix]
    starts = window_starts(len(ids), encoder.window)
    runs = encoder._run([[*encoder.prefix, *ids[s : s + encoder.window], *encoder.suffix] for s in starts])
    for i in range(0, len(ids), 37):
        central = max(
            range(len(starts)),
            key=lambda k: min(i - starts[k], starts[k] + encoder.window - 1 - i) if starts[k] <= i else -math.inf,
        )
        torch.testing.assert_close(whole.vectors[i + 1], runs[central][i - starts[central] + 1], atol=2e-6, rtol=0)
    # What stands beyond the first window is there to be matched.
    last, start = encoder.embed([long[-200:], ROWS[0]["story"]])
    assert best_match(last, whole).mean() > best_match(last, start).mean() + 0.1


def test_layers_above_are_gone(encoder):
    assert len(encoder.model.encoder.layer) == MINILM_LAYER
    assert load_encoder(layer=1).model.config.num_hidden_layers == 1
    with pytest.raises(InputError, match="layers 1 to 6"):
        load_encoder(layer=7)


def test_unreachable_encoder_is_one_line():
    with pytest.raises(InputError, match="--encoder minilm") as error:
        load_encoder("no-such-owner/no-such-model")
    assert "\n" not in str(error.value)


def test_encoder_without_a_stated_length_is_windowed(tmp_path, encoder):
    """A tokenizer without model_max_length: the model's position table decides, RoBERTa's two unusable rows left out."""
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoder.backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=34, pad_token_id=0,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tiny = load_encoder(str(tmp_path))
    assert tiny.window == 33 - len(tiny.prefix) - len(tiny.suffix)
    assert len(tiny.embed([ROWS[0]["story"]])[0].ids) > 200
    assert tiny.sha256 == load_encoder(str(tmp_path)).sha256 != load_encoder(str(tmp_path), layer=2).sha256
