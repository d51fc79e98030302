import json
import math
import random
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from bert_score import BERTScorer, score
from bert_score.utils import bert_encode, get_model, greedy_cos_idf, model2layers, sent_encode
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from storygen.bertscore import (
    BATCH_TOKENS,
    MINILM_LAYER,
    TUNED_LAYERS,
    Embedded,
    best_match,
    default_layer,
    load_encoder,
    minilm_folder,
    precision_recall_f1,
    recall,
    token_weights,
    windows,
)
from storygen.cli import InputError
from storygen.idf import build_idf

ROWS = [json.loads(line) for line in (Path(__file__).parents[1] / "corpus/stories.jsonl").read_text().splitlines()]
LENGTHS = (1, 2, 100, 509, 510)
SIZE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


def text_of(encoder, length: int, seed: int) -> str:
    """A text of exactly `length` word pieces."""
    words, left = [], length
    stream = " ".join(row["story"] for row in random.Random(seed).sample(ROWS, 3 + length // 100)).split()
    for word in stream:
        pieces = len(encoder.backend.encode(word, add_special_tokens=False).ids)
        if pieces <= left:
            words.append(word)
            left -= pieces
    assert left == 0
    return " ".join(words)


def uncut(folder):
    model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    return model.get_encoder() if model.config.is_encoder_decoder else model


def hidden_states(model, ids) -> tuple[torch.Tensor, ...]:
    """Every layer's (n, d) for one text alone, without padding."""
    ids = torch.tensor([list(ids)])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    return tuple(layer[0] for layer in out.hidden_states)


def by_library(x: list[Embedded], y: list[Embedded], table: np.ndarray) -> np.ndarray:
    """(pairs, 3): bert-score's P, R and F of candidates y against references x from our vectors, in one padded batch."""

    def padded(texts):
        masks = pad_sequence([torch.ones(len(text.ids)) for text in texts], batch_first=True)
        weights = pad_sequence([torch.from_numpy(table[text.ids]).double() for text in texts], batch_first=True)
        return pad_sequence([text.vectors for text in texts], batch_first=True, padding_value=2.0), masks, weights

    return torch.stack(greedy_cos_idf(*padded(x), *padded(y)), dim=1).numpy()


def by_us(x, y, table, tf="raw") -> np.ndarray:
    return np.array([precision_recall_f1(a, b, table, tf) for a, b in zip(x, y, strict=True)])


@pytest.fixture(scope="module")
def pairs(encoder):
    """References and candidates: every pairing of LENGTHS, corpus texts, and texts that tokenizers stumble over."""
    made = product(*([text_of(encoder, length, seed) for length in LENGTHS] for seed in (1, 2)))
    odd = [
        ("the [SEP] cat [CLS] sat", "a cat"), ("a cat", "the [SEP] cat [CLS] sat"), (" \tThe cat\n", "the  cat "),
        ("\u200b", "a cat"), ("a cat", "\u200b"), ("Żółw — «naïve» 猫が座った", "🐢🐈 cat"), ("cat " * 300, "cat"),
    ]  # fmt: skip
    corpus = [(row["prompt"], row["outline"]) for row in ROWS[:40]] + [(row["story"], row["prompt"]) for row in ROWS[:4]]
    return [list(side) for side in zip(*made, *odd, *corpus, strict=True)]


@pytest.fixture(scope="module")
def embedded(encoder, pairs):
    return [encoder.embed(side) for side in pairs]


def all_positive(x, y) -> np.ndarray:
    """Pairs in which every token has some cosine above 0: in a padded batch the library raises the others' best to 0."""
    sides = zip([*x, *y], [*y, *x], strict=True)
    return np.array([best_match(a, b).min(initial=0) >= 0 for a, b in sides]).reshape(2, -1).all(axis=0)


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("weighted", [False, True], ids=["flat", "idf"])
def test_raw_is_bert_score(encoder, pairs, embedded, weighted, batch):
    """P, R and F1 against bert-score 0.3.13 with the same weights, layer and idf."""
    references, candidates = pairs
    table = build_idf(encoder.tokenizer, candidates).weights if weighted else encoder.flat_weights()
    theirs = score(
        candidates,
        references,
        model_type=str(minilm_folder()),
        num_layers=MINILM_LAYER,
        idf={i: float(w) for i, w in enumerate(table)} if weighted else False,
        device="cpu",
        batch_size=batch,
    )
    ours, theirs = by_us(*embedded, table), torch.stack(theirs, dim=1).numpy()
    same = all_positive(*embedded) | (batch == 1)
    assert (~same).sum() <= 6
    np.testing.assert_allclose(ours[same], theirs[same], atol=1e-5)


def test_raw_is_bert_score_with_the_librarys_own_idf(encoder):
    references, candidates = ([row[part] for row in ROWS[:40]] for part in ("prompt", "outline"))
    scorer = BERTScorer(
        model_type=str(minilm_folder()), num_layers=MINILM_LAYER, idf=True, idf_sents=references, nthreads=0, device="cpu"
    )
    table = build_idf(encoder.tokenizer, references).weights
    ours = by_us(encoder.embed(references), encoder.embed(candidates), table)
    np.testing.assert_allclose(ours, torch.stack(scorer.score(candidates, references), dim=1), atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True], ids=["flat", "idf"])
def test_raw_is_bert_scores_matching_of_our_vectors(encoder, pairs, embedded, weighted):
    table = build_idf(encoder.tokenizer, pairs[0]).weights if weighted else encoder.flat_weights()
    x, y = zip(*((a, b) for a, b in zip(*embedded, strict=True) if len(a.ids) and len(b.ids)), strict=True)
    assert {len(text.ids) - 2 for text in x} & {len(text.ids) - 2 for text in y} >= set(LENGTHS)
    same = all_positive(x, y)
    assert (~same).sum() <= 6
    np.testing.assert_allclose(by_us(x, y, table)[same], by_library(x, y, table)[same], atol=1e-5)
    # Texts of several windows, which the library would have cut.
    long = encoder.embed([" ".join(row["story"] for row in ROWS[i : i + 5]) for i in (0, 10, 20)])
    assert all(len(text.ids) > 2 * encoder.window for text in long)
    for left, right in ((long, long[1:] + long[:1]), (long[:1], x[:1]), (x[:1], long[:1])):
        np.testing.assert_allclose(by_us(left, right, table), by_library(left, right, table), atol=1e-5)


def test_a_negative_best_cosine_stays(encoder):
    """bert-score keeps it when a pair is scored alone and drops it when a longer pair pads the batch."""
    ids, axes, table = np.array([*encoder.prefix, 5, *encoder.suffix]), torch.eye(2), encoder.flat_weights()
    x, y = Embedded(ids, axes[[0, 0, 0]]), Embedded(ids, -axes[[0, 0, 0]])
    longer = Embedded(np.insert(ids, 1, 5), axes[[0, 0, 0, 0]])
    assert by_us([x], [y], table)[0, :2].tolist() == by_library([x], [y], table)[0, :2].tolist() == [-1, -1]
    assert by_library([x, longer], [y, longer], table)[0, :2].tolist() == [0, 0]


def test_specials_answer_but_weigh_nothing(encoder, embedded):
    cls, sep = encoder.prefix + encoder.suffix
    axes = torch.eye(4)
    x = Embedded(np.array([cls, 5, sep]), axes[[0, 1, 2]])
    y = Embedded(np.array([cls, 6, sep]), axes[[1, 3, 0]])
    table = encoder.flat_weights()
    # Only y's [CLS] answers x's token; y's own token has no answer. Were the specials weighed, R would be 2/3.
    assert precision_recall_f1(x, y, table, "raw") == (0, 1, 0)
    assert by_library([x], [y], table).tolist() == [[0, 1, 0]]
    # They answer in real texts too.
    bare = [Embedded(text.ids[1:-1], text.vectors[1:-1]) for text in embedded[1]]
    lost = by_us(*embedded, table)[:, 1] - by_us(embedded[0], bare, table)[:, 1]
    assert lost.min() >= -1e-6 and (lost > 1e-3).sum() >= 5
    # A text of only specials weighs nothing.
    only = encoder.embed(["[SEP] [CLS]"])[0]
    assert len(only.ids) == 4 and precision_recall_f1(only, only, table) == (0, 0, 0)


def by_hand(ids: list[int], vectors: list[list[float]], others: list[list[float]], idf: list[float], tf: str) -> float:
    """Recall as a mean over types: a type weighs idf * g(tf) and is answered as well as its occurrences on average."""
    above = below = 0.0
    for token in set(ids):
        own = [vector for i, vector in zip(ids, vectors, strict=True) if i == token]
        best = [max(sum(a * b for a, b in zip(v, other, strict=True)) for other in others) for v in own]
        weight = idf[token] * {"raw": len(own), "sublinear": 1 + math.log(len(own)), "binary": 1}[tf]
        above += weight * sum(best) / len(best)
        below += weight
    return above / below if below else 0.0


IDS = st.lists(st.integers(0, 4), min_size=3, max_size=20)


@pytest.mark.parametrize("tf", ["raw", "sublinear", "binary"])
@settings(max_examples=60, deadline=None)
@given(IDS, IDS, st.integers(0, 999), st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.5]), min_size=5, max_size=5))
def test_scores_by_hand(tf, left, right, seed, idf):
    rng = torch.Generator().manual_seed(seed)
    x, y = (Embedded(np.array(ids), normalize(torch.randn(len(ids), 3, generator=rng), dim=1)) for ids in (left, right))
    a, b = x.vectors.tolist(), y.vectors.tolist()
    p, r = by_hand(right, b, a, idf, tf), by_hand(left, a, b, idf, tf)
    f = 2 * p * r / (p + r) if p + r > 0 else 0.0
    table = np.array(idf, dtype=np.float32)
    assert recall(x, y, table, tf) == pytest.approx(r, abs=1e-6)
    assert precision_recall_f1(x, y, table, tf) == pytest.approx((p, r, f), abs=1e-5)
    if tf == "raw" and table[x.ids].any() and table[y.ids].any() and p + r > 1e-3:
        np.testing.assert_allclose(by_library([x], [y], table), [(p, r, f)], atol=1e-5)


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


def test_up_to_one_window_is_the_plain_model(encoder):
    model = uncut(minilm_folder())
    for length, text in zip(LENGTHS, encoder.embed([text_of(encoder, n, 3) for n in LENGTHS]), strict=True):
        assert len(text.ids) == length + 2
        expected = normalize(hidden_states(model, text.ids)[MINILM_LAYER], dim=1)
        torch.testing.assert_close(text.vectors, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [1, 1200, 100_000])
def test_batches_and_order_do_not_matter(encoder, monkeypatch, tokens):
    texts = [row["outline"] for row in ROWS[:4]] + [text_of(encoder, n, n) for n in (1, 510, 511, 900, 1700)]
    alone = [encoder.embed([text])[0] for text in texts]
    assert max(len(text.ids) for text in alone) == 1702
    monkeypatch.setitem(BATCH_TOKENS, "cpu", tokens)
    shuffled = random.Random(tokens).sample(range(len(texts)), len(texts))
    shuffled.append(shuffled[0])
    for i, text in zip(shuffled, encoder.embed([texts[i] for i in shuffled]), strict=True):
        assert (alone[i].ids == text.ids).all()
        torch.testing.assert_close(alone[i].vectors, text.vectors, atol=2e-6, rtol=0)
        torch.testing.assert_close(text.vectors.norm(dim=1), torch.ones(len(text.ids)))


@pytest.mark.parametrize(("length", "window"), [(5, 10), (10, 10), (11, 10), (37, 10), (1000, 254), (9, 1), (7, 2)])
def test_windows_cover_every_token(length, window):
    runs = windows(length, window)
    assert {i for start, end in runs for i in range(start, end)} == set(range(length))
    assert runs == sorted(set(runs)) and len({end - start for start, end in runs}) == 1
    assert all(end - start <= window for start, end in runs)
    assert all(end - start >= window // 16 - 1 for (_, end), (start, _) in pairwise(runs))


def test_long_text_takes_each_token_from_its_most_central_window(encoder):
    long = " ".join(row["story"] for row in ROWS[:4])
    ids = encoder.backend.encode(long, add_special_tokens=False).ids
    assert len(ids) > encoder.window
    whole = encoder.embed([long])[0]
    assert whole.ids.tolist() == [*encoder.prefix, *ids, *encoder.suffix]
    places, model = windows(len(ids), encoder.window), uncut(minilm_folder())
    runs = [
        normalize(hidden_states(model, [*encoder.prefix, *ids[a:b], *encoder.suffix])[MINILM_LAYER], dim=1)
        for a, b in places
    ]
    expected = [runs[0][0]]
    for i in range(len(ids)):
        inside = [k for k, (a, b) in enumerate(places) if a <= i < b]
        central = max(inside, key=lambda k: min(i - places[k][0], places[k][1] - 1 - i))
        expected.append(runs[central][i - places[central][0] + 1])
    torch.testing.assert_close(whole.vectors, torch.stack([*expected, runs[-1][-1]]), atol=1e-5, rtol=0)
    # Text beyond the first window can be matched.
    last, start = encoder.embed([long[-200:], ROWS[0]["story"]])
    assert best_match(last, whole).mean() > best_match(last, start).mean() + 0.1


def test_layers_above_are_gone(encoder):
    assert len(encoder.model.encoder.layer) == MINILM_LAYER
    assert load_encoder(layer=1).model.config.num_hidden_layers == 1
    with pytest.raises(InputError, match="layers 1 to 6"):
        load_encoder(layer=7)


def test_layers_are_bert_scores():
    for name in TUNED_LAYERS:
        assert default_layer(name, 99) == model2layers[name]
    for depth, layer in ((1, 1), (2, 1), (3, 2), (6, 4), (12, 8), (22, 15), (24, 16)):
        assert default_layer("some/encoder", depth) == layer
    assert default_layer("minilm", 6) == MINILM_LAYER
    assert default_layer("google-bert/bert-base-uncased", 12) == 9


def test_unreachable_encoder_is_one_line():
    with pytest.raises(InputError, match="--encoder minilm") as error:
        load_encoder("no-such-owner/no-such-model")
    assert "\n" not in str(error.value)


def tiny(folder, encoder, family: str, length: int | None = 512, **config):
    """A random model of a family in `folder`, with MiniLM's word pieces and the stated length."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoder.backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        **({} if length is None else {"model_max_length": length}),
    )  # fmt: skip
    kinds = getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}Model")
    kinds[1](kinds[0](vocab_size=len(tokenizer), pad_token_id=0, **config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


DEBERTA = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_biased_input": False}
FAMILIES = {
    "Bert": SIZE,
    "Roberta": SIZE | {"max_position_embeddings": 514},
    "DistilBert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "initializer_range": 0.2},
    "Albert": SIZE | {"embedding_size": 16},
    "MPNet": SIZE | {"max_position_embeddings": 514},
    "Deberta": SIZE | DEBERTA,
    "DebertaV2": SIZE | DEBERTA | {"position_buckets": 64, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "Electra": SIZE | {"embedding_size": 16},
    "ModernBert": SIZE | {"max_position_embeddings": 8192, "local_attention": 16},
    "XLM": {"emb_dim": 32, "n_layers": 3, "n_heads": 2, "embed_init_std": 0.2, "init_std": 0.2},
    "Bart": {
        "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.2,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_any_encoder(tmp_path, encoder, family):
    folder = tiny(tmp_path, encoder, family, **FAMILIES[family])
    texts = ["cat", ROWS[0]["prompt"], ROWS[1]["story"], text_of(encoder, 510, 4)]
    model = uncut(folder)
    assert load_encoder(folder).layer == 2
    for layer in (1, 2, 3):
        cut = load_encoder(folder, layer)
        assert cut.window == 510
        library = get_model(folder, layer)
        for text in cut.embed(texts):
            expected = hidden_states(model, text.ids)[layer]
            if layer < 3 and hasattr(model, "final_norm"):
                expected = model.final_norm(expected)
            torch.testing.assert_close(text.vectors, normalize(expected, dim=1), atol=1e-5, rtol=0)
            ids = torch.from_numpy(text.ids)[None]
            theirs = normalize(bert_encode(library, ids, torch.ones_like(ids))[0], dim=1)
            torch.testing.assert_close(text.vectors, theirs, atol=1e-5, rtol=0)


def test_a_long_context_needs_no_windows(tmp_path, encoder):
    folder = tiny(tmp_path, encoder, "ModernBert", 8192, **FAMILIES["ModernBert"])
    modern, model = load_encoder(folder, 3), uncut(folder)
    assert modern.window == 8190
    long, short = modern.embed([text_of(encoder, 1500, 5), "cat"])
    assert len(long.ids) == 1502
    for text in (long, short):
        expected = normalize(hidden_states(model, text.ids)[3], dim=1)
        torch.testing.assert_close(text.vectors, expected, atol=1e-5, rtol=0)


def test_encoder_without_a_stated_length_is_windowed(tmp_path, encoder):
    """A tokenizer without model_max_length: the model's position table decides, RoBERTa's two unusable rows left out."""
    folder = tiny(tmp_path, encoder, "Roberta", None, **SIZE | {"max_position_embeddings": 34})
    short = load_encoder(folder)
    assert short.window == 33 - len(short.prefix) - len(short.suffix)
    assert len(short.embed([ROWS[0]["story"]])[0].ids) > 200
    assert short.sha256 == load_encoder(folder).sha256 != load_encoder(folder, layer=1).sha256


@pytest.mark.parametrize("prefix_space", [False, True], ids=["bare", "space"])
@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, RobertaTokenizer, GPT2Tokenizer])
def test_byte_level_encoder(tmp_path, kind, prefix_space):
    """Byte-level BPE without a stated length, where bert-score fails; with a length, and no empty text, both agree."""
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    coder.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    coder.train_from_iterator([row["story"] for row in ROWS[:50]], trainer)
    coder.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=prefix_space)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if kind is PreTrainedTokenizerFast:
        tokenizer = kind(tokenizer_object=coder, cls_token="<s>", sep_token="</s>", **names)
    else:
        bpe = json.loads(coder.to_str())["model"]
        merges = [tuple(merge) for merge in bpe["merges"]]
        tokenizer = kind(vocab=bpe["vocab"], merges=merges, add_prefix_space=prefix_space, **names)
    torch.manual_seed(0)
    config = transformers.RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=130, pad_token_id=1, **SIZE)
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    ours = load_encoder(str(tmp_path))
    specials = 0 if kind is GPT2Tokenizer else 2
    assert len(ours.prefix) + len(ours.suffix) == specials and ours.window == 128 - specials
    table = ours.flat_weights()
    texts = [ROWS[0]["prompt"], ROWS[1]["prompt"], "Żółw 猫 🐢\n«naïve»", ROWS[0]["story"], "The cats"]
    x = ours.embed(texts)
    assert len(x[3].ids) > 2 * ours.window
    for text in x:
        assert text.vectors.isfinite().all()
        assert precision_recall_f1(text, text, table) == pytest.approx((1, 1, 1), abs=1e-5)
    empty, bare, led = ours.embed(["", "The cats", " \n The cats"])
    assert precision_recall_f1(empty, x[0], table) == precision_recall_f1(x[0], empty, table) == (0, 0, 0)
    assert bare.ids.tolist() == led.ids.tolist() == tokenizer("The cats").input_ids
    assert ours.backend.encode("cats", add_special_tokens=False).tokens[0].startswith("Ġ") == prefix_space
    np.testing.assert_allclose(by_us(x, x[1:] + x[:1], table), by_library(x, x[1:] + x[:1], table), atol=1e-5)

    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(tmp_path)
    library = AutoTokenizer.from_pretrained(tmp_path)
    assert [text.ids.tolist() for text in x[:3]] == [sent_encode(library, text) for text in texts[:3]]
    theirs = score(texts[1:3], texts[:2], model_type=str(tmp_path), num_layers=2, batch_size=2, device="cpu")
    np.testing.assert_allclose(by_us(x[:2], x[1:3], table), torch.stack(theirs, dim=1), atol=1e-5)
