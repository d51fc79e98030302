import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storygen import textstats as ts
from storygen.bertscore import load_encoder
from storygen.calibration import (
    PAIRS,
    TF,
    Calibration,
    Curve,
    band,
    calibrate,
    inputs_key,
    recall_key,
    repetition_curves,
    rising,
)
from storygen.cli import InputError
from storygen.idf import Idf
from tests.reward_data import corpus_rows, data_folder


@pytest.fixture(scope="module")
def calibration():
    return Calibration.load(data_folder() / "calibration.json")


def test_curve_is_linear_in_log_length_and_held():
    curve = Curve((10.0, 1000.0), (0.0, 1.0))
    assert curve(100) == pytest.approx(0.5)
    assert curve(10**1.5) == pytest.approx(0.25)
    assert (curve(0), curve(1), curve(10**6)) == (0, 0, 1)


@given(st.lists(st.floats(-5, 5), max_size=30))
def test_rising_is_isotonic_regression(values):
    fitted = rising(values)
    assert all(b >= a - 1e-9 for a, b in pairwise(fitted))
    # Its defining property: each value is max over starts, min over ends of the mean between them.
    for i in range(len(values)):
        best = max(min(np.mean(values[a : b + 1]) for b in range(i, len(values))) for a in range(i + 1))
        assert fitted[i] == pytest.approx(best, abs=1e-9)


def test_repetition_curves_by_hand():
    texts = [[f"{t}-{i}" for i in range(40)] for t in range(19)] + [["again"] * 40]
    curves = repetition_curves(texts, 2)
    assert curves["mean"](30) == pytest.approx((1 - 1 / 30) / 20, rel=0.05)
    assert curves["p95"](40) == pytest.approx(np.percentile([0] * 19 + [1 - 1 / 39], 95))
    assert curves["mean"](4000) == curves["mean"](40)


def test_bands_are_those_of_a_mean():
    values = np.random.default_rng(1).normal(3, 2, 400)
    (half,) = band(lambda rows: [values[rows].mean()], 400)
    assert half == pytest.approx(1.96 * values.std() / 20, rel=0.15)


def test_every_curve_has_a_band_that_its_rows_can_bear(calibration):
    curves = [*calibration.human.values(), *calibration.chance.values(), *calibration.repetition["2"].values()]
    assert all(len(curve.band) == len(curve.words) and min(curve.band) >= 0 for curve in curves)
    key = recall_key("think_story", "sublinear", True)
    gain = calibration.human[key](200) - calibration.chance[key](200)
    assert max(calibration.human[key].band) < 0.25 * gain


def test_inputs_key_is_of_everything_that_counts(monkeypatch):
    encoder, rows = load_encoder(), corpus_rows()[:3]
    idf = Idf.load(data_folder() / "idf.npz", encoder.tokenizer)
    keys = {inputs_key(rows, encoder, idf, seed, more) for seed in (0, 1) for more in ([], ["One more."])}
    keys |= {inputs_key(rows[::-1], encoder, idf, 0, []), inputs_key(rows, encoder, replace(idf, df=idf.df + 1), 0, [])}
    monkeypatch.setattr("storygen.calibration.METHODS", ("textstats",))
    assert len(keys | {inputs_key(rows, encoder, idf, 0, [])}) == 7


def test_quantiles_are_the_datas_own(calibration):
    train = [row for row in corpus_rows() if row["split"] == "train"]
    words = [len(ts.words(row["story"])) for row in train]
    assert calibration.n["stories"] == len(train)
    assert calibration.quantile("story_words", 50) == np.percentile(words, 50)
    assert calibration.quantile("dialogue", 75) == pytest.approx(
        np.percentile([ts.dialogue_share(r["story"]) for r in train], 75)
    )


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("tf", TF)
@pytest.mark.parametrize("capped", [True, False])
def test_human_is_above_chance_and_both_rise(calibration, pair, tf, capped):
    key = recall_key(pair, tf, capped)
    lengths = np.geomspace(3, 3000, 40)
    chance, human = ([curve(n) for n in lengths] for curve in (calibration.chance[key], calibration.human[key]))
    assert all(h > c + 0.05 for c, h in zip(chance, human, strict=True))
    assert (np.diff(chance) >= 0).all()
    assert (np.diff(human) >= 0).all()


def test_words_in_random_order_are_below_every_human_text(calibration):
    assert calibration.shuffled["order"] < calibration.quantile("order", 0) - 0.5
    assert calibration.shuffled["think_order"] < calibration.quantile("think_order", 1) - 0.5


def test_saved_is_loaded(calibration, tmp_path):
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json").n == calibration.n
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads((data_folder() / "calibration.json").read_text())
    (tmp_path / "bad.json").write_text('{"n": 3}')
    with pytest.raises(InputError, match="not a calibration"):
        Calibration.load(tmp_path / "bad.json")
    whole = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "bad.json").write_text(json.dumps(whole | {"quantiles": {}}))
    with pytest.raises(InputError, match="not a calibration"):
        Calibration.load(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"data_prep\.py first"):
        Calibration.load(tmp_path / "none.json")


def test_same_seed_same_calibration_and_few_rows():
    encoder = load_encoder()
    idf = Idf.load(data_folder() / "idf.npz", encoder.tokenizer)
    rows = corpus_rows()[:3]
    one, two = (calibrate(rows, encoder, idf, 5) for _ in range(2))
    assert one == two
    assert all(math.isfinite(v) for curve in (*one.chance.values(), *one.human.values()) for v in curve.value)
    with pytest.raises(InputError, match="at least 2 rows"):
        calibrate(rows[:1], encoder, idf, 0)
