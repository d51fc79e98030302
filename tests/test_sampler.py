import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare
from tqdm import tqdm

from storygen.cli import InputError
from storygen.decoder import BLOCK, draw
from storygen.gpu_sampler import sample_rows
from storygen.logprobs import response_logps
from storygen.sampler import sample

PROMPTS = ["A dog.", "The king sleeps in the deep wood and nobody dares to wake him.", "Rain"]


def flat(results):
    return [completion for completions in results for completion in completions]


@pytest.mark.parametrize("onednn, activation", [(True, "gelu_new"), (False, "gelu_new"), (True, "relu")])
def test_logps_equal_a_full_unpadded_forward(tiny, monkeypatch, onednn, activation):
    if not onednn:  # as if torch was built without it, and on a GPU: plain products
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model, _, pattern = tiny
    prefixes = [pattern.prefix(p) for p in PROMPTS]
    results = sample(model, prefixes, 3, eos_id=pattern.eos_id, seed=3, max_rows=4, max_new_tokens=40)
    for prefix, completions in zip(prefixes, results):
        for completion in completions:
            ids = torch.tensor([prefix + completion.ids])
            with torch.no_grad():
                logps = model(ids).logits[0].log_softmax(-1)
            expected = logps[len(prefix) - 1 : -1].gather(-1, ids[0, len(prefix) :, None])[:, 0]
            assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-4)
            with torch.no_grad():
                ours = response_logps(model, [prefix + completion.ids], [len(prefix)], pattern.pad_id)
            assert torch.allclose(ours, expected, atol=1e-4)


@given(
    st.sampled_from([BLOCK, 3 * BLOCK, 6 * BLOCK]),
    st.integers(0, 10**6),
    st.floats(0, 0.999),
    st.sampled_from([0.0, 2**-24, 0.5, 1 - 2**-23, 1 - 2**-24]),
)
def test_a_draw_is_the_quantile_of_its_uniform(vocabulary, seed, impossible, uniform):
    """Against a cumulative sum in double precision; the ends of [0, 1) and tokens of probability zero included."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, generator=generator) * 5
    logits[torch.rand(3, vocabulary, generator=generator) < impossible] = -torch.inf
    logits[:, seed % vocabulary] = 0.0
    uniforms = torch.tensor([uniform, *torch.rand(2, generator=generator).tolist()])
    tokens, logps = draw(logits, uniforms, 1.0, 1.0)
    law = logits.double().softmax(-1)
    upto = law.cumsum(-1)
    for row, (token, u) in enumerate(zip(tokens.tolist(), uniforms.tolist(), strict=True)):
        assert law[row, token] > 0
        assert upto[row, token] - law[row, token] - 1e-6 <= u <= upto[row, token] + 1e-6
        assert logps[row].item() == pytest.approx(law[row, token].log().item(), abs=1e-5)


def test_a_draw_from_no_numbers_says_so_and_goes_on():
    tokens, logps = draw(torch.full((2, 3 * BLOCK), torch.nan), torch.tensor([0.0, 0.9]), 1.0, 1.0)
    assert all(0 <= token < 3 * BLOCK for token in tokens.tolist()) and logps.isnan().all()


def test_rows_beyond_the_vocabulary_are_no_part_of_the_law(tiny):
    model, _, pattern = tiny
    prefix = pattern.prefix("Rain")
    for completion in flat(sample(model, [prefix], 4, eos_id=-1, seed=3, vocabulary=300, max_new_tokens=20)):
        ids = prefix + completion.ids
        with torch.no_grad():
            law = model(torch.tensor([ids])).logits[0, len(prefix) - 1 : -1, :300].log_softmax(-1)
            ours = response_logps(model, [ids], [len(prefix)], pattern.pad_id, vocabulary=300)
        assert max(completion.ids) < 300
        expected = law.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(completion.logps), expected, atol=1e-4)
        assert torch.allclose(ours, expected, atol=1e-4)


def test_samples_do_not_depend_on_how_many_rows_run_beside_them(tiny):
    model, _, pattern = tiny
    prefixes = [pattern.prefix(p) for p in PROMPTS]
    runs = [
        [c.ids for c in flat(sample(model, prefixes, 4, eos_id=pattern.eos_id, seed=5, max_rows=rows, max_new_tokens=30))]
        for rows in (1, 5, 64)
    ]
    assert runs[0] == runs[1] == runs[2]
    other = [c.ids for c in flat(sample(model, prefixes, 4, eos_id=pattern.eos_id, seed=6, max_new_tokens=30))]
    assert other != runs[0]


def test_distribution_of_tokens_equals_the_models_law(tiny):
    """Chi-square over the first two tokens of 6,000 draws at temperature 0.3, against the softmax of plain forwards."""
    model, _, pattern = tiny
    prefix = pattern.prefix("Rain")
    drawn = flat(sample(model, [prefix], 6000, eos_id=-1, seed=0, max_rows=2000, temperature=0.3, max_new_tokens=2))
    with torch.no_grad():
        first = model(torch.tensor([prefix])).logits[0, -1].double().div(0.3).softmax(-1)
    common = int(first.argmax())
    with torch.no_grad():
        second = model(torch.tensor([prefix + [common]])).logits[0, -1].double().div(0.3).softmax(-1)
    for law, tokens in ((first, [c.ids[0] for c in drawn]), (second, [c.ids[1] for c in drawn if c.ids[0] == common])):
        n = len(tokens)
        big = torch.nonzero(law * n >= 5)[:, 0].tolist()
        counts = np.bincount(tokens, minlength=len(law))
        observed = [counts[i] for i in big] + [n - sum(counts[i] for i in big)]
        expected = [law[i].item() * n for i in big]
        expected.append(n - sum(expected))
        assert len(big) > 3 and chisquare(observed, expected).pvalue > 1e-3


def test_distribution_of_tokens_equals_generates(tiny):
    """Two samples of 4,000 rows of three tokens, from `generate` of transformers and from ours, position by position."""
    model, _, pattern = tiny
    prefix = pattern.prefix("Rain")
    ours = np.array(
        [c.ids for c in flat(sample(model, [prefix], 4000, eos_id=-1, seed=0, temperature=0.3, max_new_tokens=3))]
    )
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor([prefix] * 4000), do_sample=True, temperature=0.3, top_k=0, top_p=1.0, max_new_tokens=3,
            min_new_tokens=3, pad_token_id=pattern.pad_id, eos_token_id=pattern.eos_id, suppress_tokens=None,
        )[:, len(prefix) :].numpy()  # fmt: skip
    for place in range(3):
        counts = np.array([np.bincount(drawn[:, place], minlength=pattern.size + 1) for drawn in (ours, theirs)])
        common = counts.sum(0) >= 20
        table = np.column_stack([counts[:, common], counts[:, ~common].sum(1)])
        assert table.shape[1] > 4 and chi2_contingency(table).pvalue > 1e-3


def test_eos_ends_a_row_and_the_context_limits_it(tiny):
    model, _, pattern = tiny
    prefix = pattern.prefix("Rain")
    free = flat(sample(model, [prefix], 4, eos_id=-1, seed=1))
    assert all(len(prefix) + len(c.ids) == model.config.n_positions and not c.finished for c in free)
    stop = free[0].ids[7]
    stopped = flat(sample(model, [prefix], 4, eos_id=stop, seed=1))
    for a, b in zip(free, stopped):
        end = a.ids.index(stop) + 1 if stop in a.ids else len(a.ids)
        assert b.ids == a.ids[:end] and b.finished == (stop in a.ids)


def test_top_p_never_leaves_the_nucleus(tiny):
    model, _, pattern = tiny
    prefix = pattern.prefix("Rain")
    with torch.no_grad():
        law = model(torch.tensor([prefix])).logits[0, -1].softmax(-1)
    ordered, index = law.sort(descending=True)
    nucleus = set(index[: int((ordered.cumsum(0) < 0.3).sum()) + 1].tolist())
    drawn = flat(sample(model, [prefix], 200, eos_id=-1, seed=1, top_p=0.3, max_new_tokens=1))
    assert {c.ids[0] for c in drawn} <= nucleus


def test_prompt_that_fills_the_context_is_refused(tiny):
    model, _, pattern = tiny
    with pytest.raises(InputError, match="shorten the prompt"):
        sample(model, [pattern.prefix("word " * 300)], 1, eos_id=pattern.eos_id, seed=0)


@pytest.mark.parametrize("slots, top_p", [(1, 1.0), (5, 0.9), (64, 1.0)])
def test_the_gpus_loop_draws_the_same_tokens(tiny, slots, top_p):
    """Run on the CPU, without graphs: rows that end early, rows that fill their room, and slots that are refilled.

    Rounding turns one draw in some thousands into its neighbour in the vocabulary, and the row differs from there on.
    """
    model, _, pattern = tiny
    prefixes = [*(pattern.prefix(p) for p in PROMPTS), [7], pattern.prefix("A lamp " * 60)]
    law = {"temperature": 0.5, "top_p": top_p}
    eos = flat(sample(model, prefixes, 1, eos_id=-1, seed=2, max_new_tokens=9, **law))[1].ids[3]
    rooms = [min(256 - len(prefix), 150) for prefix in prefixes]

    def stream(p, k):
        return np.random.default_rng((2, p, k)).random(rooms[p], dtype=np.float32)

    expected = sample(model, prefixes, 4, eos_id=eos, seed=2, max_new_tokens=150, **law)
    with torch.no_grad(), tqdm(disable=True) as bar:
        rows = sample_rows(
            model, [(p, k) for p in range(5) for k in range(4)], prefixes, rooms, stream, slots=slots, eos_id=eos,
            vocabulary=None, dtype=torch.float32, bar=bar, **law,
        )  # fmt: skip
    assert len({len(ids) for ids, _ in rows.values()}) > 2 and any(ids[-1] == eos for ids, _ in rows.values())
    turned = 0
    for (p, k), (ids, logps) in rows.items():
        pairs = list(zip(ids, expected[p][k].ids))
        same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
        assert logps[:same] == pytest.approx(expected[p][k].logps[:same], abs=1e-3)
        if same < len(pairs):
            turned += 1
            assert abs(ids[same] - expected[p][k].ids[same]) < 20
        else:
            assert len(ids) == len(expected[p][k].ids)
    assert turned <= 4
