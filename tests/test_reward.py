import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest

import rew_config
from rew_config import GUARDS, PARTS, Correlation, Guard, Guards, Length, OwnPart, Power, Prose, Repetition, RewardConfig
from reward import Reward, Sample
from rl_train import part_rewards
from storygen.bertscore import recall, token_weights
from storygen.calibration import CAP, Calibration
from storygen.cli import InputError
from tests.reward_data import data_folder, held_out

ROWS = held_out(8)


@pytest.fixture(scope="module")
def reward():
    return Reward.load(data_folder())


@pytest.fixture(scope="module")
def raw(reward):
    return reward.measure([Sample(**ROWS[0])])[0]


def bare(calibration_of: Reward, config: RewardConfig) -> Reward:
    return Reward(config, calibration_of.calibration)


def test_formula_by_hand(reward, raw):
    human = reward.calibration
    score = reward.combine(raw | {"room": 16.0}, "ok", 300)
    parts = {}
    for pair, n in (("think_story", "story"), ("prompt_think", "think"), ("prompt_story", "story")):
        low, high = (curve[f"{pair}:sublinear"](raw[f"{n}_words"]) for curve in (human.chance, human.human))
        gain = raw[f"{pair}:sublinear"] - raw[f"{pair}:sublinear:chance"]
        parts[pair] = min(1, max(0, gain / (high - low)))
    correlation = 0.5 * parts["think_story"] + 0.25 * parts["prompt_think"] + 0.25 * parts["prompt_story"]
    length = min(1, raw["story_words"] / 300)
    excess = raw["repeated_2"] - human.repetition["2"]["p95"](raw["story_words"])
    repetition = min(1, max(0, 1 - excess / 0.15))
    prose = min(1, max(0, (0.8 - raw["dialogue"]) / (0.8 - human.quantile("dialogue", 75))))
    product = 1.0
    for value in score.guards.values():
        product *= value
    weighted = 0.5 * correlation + 0.3 * length + 0.2 * repetition + 0.15 * prose
    expected = product * weighted / 1.15 - 0.3 * (1 - 16 / 64)
    assert score.reward == pytest.approx(expected)
    assert set(score.parts) == {*PARTS, *parts}
    assert set(score.guards) == set(GUARDS)


def test_recalls_are_those_of_the_texts(reward, raw):
    """The prompt's as in bert-score; the outline's with each cosine times the probability that the answer belongs."""
    prompt, x, y = reward.encoder.embed([ROWS[0]["prompt"], ROWS[0]["think"], ROWS[0]["story"]])
    table = reward.idf.capped(CAP)
    assert raw["prompt_story:sublinear"] == pytest.approx(recall(prompt, y, table), abs=1e-6)
    assert raw["prompt_think:sublinear"] == pytest.approx(recall(prompt, x, table), abs=1e-6)
    belongs = reward.calibration.probe.belongs(y, reward.encoder)
    best = ((x.vectors @ y.vectors.T) * belongs).amax(1).double().numpy()
    weights = token_weights(x.ids, table)
    assert raw["think_story:sublinear"] == pytest.approx(weights @ best / weights.sum(), abs=1e-6)
    assert raw["think_story:sublinear"] < recall(x, y, table)


def test_chance_is_what_the_same_text_answers_of_other_rows(reward, raw):
    panel = reward.calibration.panel["think"]
    assert len(panel) == 32 and ROWS[0]["think"] not in panel
    story, *others = reward.encoder.embed([ROWS[0]["story"], *panel])
    story = reward.calibration.probe.discounted(story, reward.encoder)
    expected = sum(recall(other, story, reward.idf.capped(CAP)) for other in others) / len(others)
    assert raw["think_story:sublinear:chance"] == pytest.approx(expected, abs=1e-6)


def test_a_story_about_something_else_gains_nothing_by_length(reward):
    """Twice the words answer more of any outline; that must not look like carrying out this one."""
    rows = [Sample(row["prompt"], row["think"], ROWS[i - 1]["story"], True) for i, row in enumerate(ROWS)]
    long = [replace(row, story=row.story + "\n" + ROWS[i - 2]["story"]) for i, row in enumerate(rows)]
    short, long = ([m["think_story:sublinear"] for m in measured] + [m["think_story:sublinear:chance"] for m in measured]
                   for measured in map(reward.measure, (rows, long)))  # fmt: skip
    n = len(ROWS)
    recalls = [b - a for a, b in zip(short[:n], long[:n])]
    gains = [(long[i] - long[n + i]) - (short[i] - short[n + i]) for i in range(n)]
    assert sum(recalls) / n > 0.015
    assert abs(sum(gains) / n) < 0.01


def test_malformed(reward):
    score = reward([Sample("p", "t", "s", False), Sample("p", "t", "s", True, verdict="two_story_tags")], 200)
    assert [s.verdict for s in score] == ["no_eos", "two_story_tags"]
    assert all(s.reward == -1 and not any(s.parts.values()) and not any(s.guards.values()) for s in score)
    assert reward([], 200) == []


def test_human_rows_score_high_and_alone_as_together(reward):
    together = reward([Sample(**row) for row in ROWS], reward.calibration.quantile("story_words", 50))
    own_length = [reward.combine(s.raw, "ok", s.raw["story_words"]).reward for s in together]
    assert sorted(own_length)[len(ROWS) // 2] >= 0.8
    alone = reward([Sample(**ROWS[3])], reward.calibration.quantile("story_words", 50))[0]
    assert alone.reward == pytest.approx(together[3].reward, abs=1e-5)
    assert all(0 <= v <= 1 for s in together for v in (*s.parts.values(), *s.guards.values()))


@pytest.mark.parametrize(
    ("key", "values", "better"),
    [
        ("think_story:sublinear", (0.2, 0.45, 0.55, 0.7), "more"),
        ("prompt_think:sublinear", (0.2, 0.45, 0.55, 0.7), "more"),
        ("repeated_2", (0.0, 0.1, 0.2, 0.5), "less"),
        ("dialogue", (0.0, 0.3, 0.7, 1.0), "less"),
        ("copied", (0.0, 0.1, 0.2, 0.5), "less"),
        ("mattr", (0.2, 0.6, 0.7, 0.9), "more"),
        ("order", (-1.0, 0.0, 0.3, 0.6), "more"),
        ("densest", (0.1, 0.3, 0.5, 0.9), "less"),
        ("copied_short", (0.0, 0.03, 0.05, 0.2), "less"),
        ("repeated_4", (0.0, 0.05, 0.1, 0.5), "less"),
        ("belongs", (0.1, 0.4, 0.6, 0.7), "more"),
        ("think_belongs", (0.1, 0.4, 0.6, 0.7), "more"),
        ("answers_belong", (0.1, 0.4, 0.6, 0.8), "more"),
        ("room", (0.0, 10.0, 64.0, 500.0), "more"),
    ],
)
def test_monotone(reward, raw, key, values, better):
    rewards = [reward.combine(raw | {key: value}, "ok", 200).reward for value in values]
    assert rewards == sorted(rewards, reverse=better == "less")
    assert rewards[0] != rewards[-1]


def test_outlines_may_be_neither_too_short_nor_too_long(reward, raw):
    rewards = [reward.combine(raw | {"think_words": n}, "ok", 200).reward for n in (1.0, 30.0, 55.0, 90.0, 300.0)]
    assert rewards[0] == rewards[-1] == 0
    assert max(rewards) == rewards[2]


def test_guard_switched_off_is_still_logged(reward, raw):
    off = bare(reward, RewardConfig(guards=replace(Guards(), copied=Guard(on=False))))
    copied = raw | {"copied": 0.9}
    assert reward.combine(copied, "ok", 200).reward == 0
    assert off.combine(copied, "ok", 200).reward == pytest.approx(reward.combine(raw, "ok", 200).reward)
    assert off.combine(copied, "ok", 200).guards["copied"] == 0


def test_weights_are_scaled_and_a_part_without_weight_is_a_monitor(reward, raw):
    config = RewardConfig(
        correlation=Correlation(weight=0), length=Length(0.3), prose=Prose(weight=0), repetition=Repetition(0.1, 0.2)
    )
    assert config.weights() == pytest.approx(
        {"correlation": 0, "length": 0.75, "repetition": 0.25, "repetition4": 0, "prose": 0}
    )
    assert config.effective().endswith("correlation 0.00, length 0.75, repetition 0.25, repetition4 0.00, prose 0.00")
    assert bare(reward, config).combine(raw, "ok", 200).parts["correlation"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Length(weight=1.5), r"length\.weight must be between 0 and 1, not 1.5"),
        (lambda: Length(weight=float("nan")), r"length\.weight"),
        (lambda: Repetition(0.1, 0), r"repetition\.slack"),
        (lambda: Prose(zero_at=0), r"prose\.zero_at"),
        (lambda: Correlation(tf="log"), r"correlation\.tf"),
        (lambda: Correlation(think_story=0, prompt_think=0, prompt_story=0), "all 0"),
        (lambda: Guard(level=20), "level"),
        (lambda: Power(power=0), "power"),
        (lambda: Correlation(full_at=0), r"correlation\.full_at"),
        (lambda: RewardConfig(malformed_score=1), "malformed_score"),
        (lambda: RewardConfig(Correlation(0), Length(0), Repetition(0, 1), Repetition(0, 1), Prose(0)), "all weights are 0"),
    ],
)
def test_config_names_the_bad_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_own_part(reward):
    def exclamation(sample):
        marks = sample.story.count("!")
        return (1.0 if marks <= 3 else 0.0), {"marks": marks}

    rew_config.OWN_PARTS.append(OwnPart("calm", 1.0, exclamation))
    try:
        mine = Reward(RewardConfig(), reward.calibration, reward.idf, reward.encoder)
        score = mine([Sample("p", ROWS[0]["think"], ROWS[0]["story"] + "!!!!", True)], 200)[0]
        assert score.parts["calm"] == 0
        assert score.raw["own:calm:marks"] >= 4
        assert mine.weights["calm"] == pytest.approx(1 / 2.15)
        for taken in ("calm", "length", "think_story", "two words"):  # think_story: the guards read it under that name
            with pytest.raises(ValueError, match="identifier"):
                OwnPart(taken, 0.1, exclamation)
    finally:
        rew_config.OWN_PARTS.clear()


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"data_prep\.py first"):
        Reward.load(tmp_path)
    for name in ("manifest.json", "idf.npz"):
        (tmp_path / name).write_bytes((data_folder() / name).read_bytes())
    other = replace(
        Calibration.load(data_folder() / "calibration.json"), encoder={"name": "other", "layer": 9, "sha256": ""}
    )
    other.save(tmp_path / "calibration.json")
    with pytest.raises(InputError, match="another encoder"):
        Reward.load(tmp_path)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_score_rows(script, tmp_path, reward):
    # A verdict from before a row was mended says nothing of it now; that of tokens which no text shows still does.
    rows = [
        ROWS[0] | {"id": 7, "verdict": "no_eos"},
        ROWS[1] | {"finished": False, "note": "ünfinished", "verdict": "ok"},
        ROWS[1] | {"id": 8, "verdict": "stray_token"},
        ROWS[1] | {"id": 9, "verdict": 5, "story": ROWS[1]["story"] + " <story> Again."},
    ]
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "scored.jsonl"
    result = script("reward.py", "score", path, "--data", data_folder(), "--out", out, "--length-target", "150")
    assert result.returncode == 0, result.stderr
    scored = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] if "id" in row else row["note"] for row in scored] == [7, "ünfinished", 8, 9]
    assert [row["verdict"] for row in scored] == ["ok", "no_eos", "stray_token", "two_story_tags"]
    assert scored[0]["reward"] == pytest.approx(reward([Sample(**ROWS[0])], 150)[0].reward, abs=1e-5)
    assert (scored[1]["reward"], scored[1]["verdict"]) == (-1, "no_eos")


def test_scores_are_not_written_where_a_folder_is(script, tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[0]])
    for out, says in ((tmp_path, "is a folder"), (path / "scored.jsonl", "is a file")):
        result = script("reward.py", "score", path, "--data", data_folder(), "--out", out)
        assert result.returncode == 2 and says in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not JSON"),
        ("[1]", ":2: not a JSON object"),
        ('{"prompt": "p", "think": "t", "story": 3, "finished": true}', ":2: 'story' must be a string"),
        ('{"prompt": "p", "think": "t", "story": "s"}', ":2: 'finished' must be a boolean"),
    ],
)
def test_score_bad_row(script, tmp_path, line, message):
    path, out = write(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "scored.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    result = script("reward.py", "score", path, "--data", data_folder(), "--out", out)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("words", ["0", "-5", "nan"])
def test_score_refuses_a_length_target_that_no_story_has(script, tmp_path, words):
    path = write(tmp_path / "rows.jsonl", ROWS[:1])
    result = script("reward.py", "score", path, "--data", data_folder(), "--length-target", words)
    assert result.returncode == 2 and result.stderr.startswith("error: --length-target must be above 0, not "), result.stderr


def test_explain(script, tmp_path):
    result = script("reward.py", "explain", write(tmp_path / "r.jsonl", ROWS[:2]), "--row", "2", "--data", data_folder())
    assert result.returncode == 0, result.stderr
    for word in ("think_story", "on_prompt", "answered by", "similarity"):
        assert word in result.stdout
    assert script("reward.py", "explain", tmp_path / "r.jsonl", "--row", "3", "--data", data_folder()).returncode == 2


def test_explain_as_a_page(script, tmp_path):
    hostile = '<script>document.title="out"</script>'
    rows = [ROWS[1] | {"think": ROWS[1]["think"] + f" {hostile}"}, ROWS[1] | {"story": f"{hostile} <story>"}]
    page = tmp_path / "page.html"
    for number in (1, 2):
        arguments = ("--row", number, "--data", data_folder(), "--html", page)
        result = script("reward.py", "explain", write(tmp_path / "r.jsonl", rows), *arguments)
        assert result.returncode == 0, result.stderr
        text = page.read_text(encoding="utf-8")
        assert text.count("<script") == 1 and "&lt;" in text
        assert not re.findall(r"(?:src|href)\s*=|url\(|@import", text)
        if number == 2:
            assert "malformed: two_story_tags" in text
            continue
        # The texts appear in full, and each answered outline word points at a story word that exists.
        plain = {name: html.unescape(re.sub(r"<[^>]+>", "", re.search(f'id="{name}">(.*?)</div>', text, re.DOTALL)[1]))
                 for name in ("think", "story")}  # fmt: skip
        assert plain == {"think": rows[0]["think"], "story": rows[0]["story"]}
        asked = re.findall(r'data-story="(\d+)" data-says', text)
        links = re.findall(r'<button(?: class="odd" title="belongs: 0\.[01]\d")? data-story="(\d+)">', text)
        assert len(asked) > 15 and set(asked) <= set(links)
        assert 'class="odd"' in text
        for part in ("outline by story", "length, weight 0.26", "repetition, weight 0.17", "prose, weight 0.13"):
            assert part in text


def test_rescore(script, tmp_path, reward):
    """Two samples of one prompt: the longer one wins on length alone, the better planned one on correlation."""
    long = {"prompt": "p", "think": ROWS[0]["think"], "story": ROWS[1]["story"], "finished": True}
    short = long | {"story": " ".join(ROWS[0]["story"].split()[:60]) + "."}
    rows = [row | {"step": 1} for row in (long, short)]
    for row in rows:
        row["raw"] = reward.measure([Sample(row["prompt"], row["think"], row["story"], True)])[0]
        row["reward"] = reward.combine(row["raw"], "ok", 200).reward
    assert rows[1]["reward"] > rows[0]["reward"]
    path = write(tmp_path / "samples.jsonl", rows)
    base = ("reward.py", "rescore", path, "--data", data_folder(), "--length-target", "200")
    same = script(*base)
    assert "rank correlation 1.000" in same.stdout
    assert "0 of 1 pairs" in same.stdout
    changed = script(
        *base, "--reward.correlation.weight", "0", "--reward.length.weight", "1", "--reward.repetition.weight", "0",
        "--reward.prose.weight", "0", "--reward.guards.on-plan.no-on", "--reward.guards.on_prompt.no_on",
    )  # fmt: skip
    assert changed.returncode == 0, changed.stderr
    assert "rank correlation -1.000" in changed.stdout
    assert "1 of 1 pairs" in changed.stdout
    other = script(*base, "--reward.correlation.no-idf-cap")
    assert other.returncode == 2
    assert "logged under another idf_cap" in other.stderr and other.stderr.count("\n") == 1


def test_an_own_part_that_was_rewritten_is_scored_anew(script, tmp_path, reward):
    """The log holds what the part said before; a rescore asks what it says now."""
    rows = [ROWS[0] | {"prompt": "p", "step": 1}, ROWS[0] | {"prompt": "p", "step": 1, "story": ROWS[0]["story"] + " Oh!"}]
    for row, before in zip(rows, (1.0, 0.0)):
        raw = reward.measure([Sample(row["prompt"], row["think"], row["story"], True)])[0]
        row |= {"raw": raw | {"own:calm": before}, "reward": before, "finished": True}
    rew_config.OWN_PARTS.append(OwnPart("calm", 1.0, lambda sample: (float("!" in sample.story), {})))
    try:
        result = script("reward.py", "rescore", write(tmp_path / "samples.jsonl", rows), "--data", data_folder())
    finally:
        rew_config.OWN_PARTS.clear()
    assert "1 of 1 pairs" in result.stdout, result.stderr


@pytest.mark.parametrize("tf", ["raw", "binary"])
def test_another_tf_needs_no_encoder(reward, tf):
    """What was logged under the default tf, combined under another one, equals scoring anew under that one."""
    samples = [Sample(row["prompt"], row["think"], ROWS[(i + i % 2) % 6]["story"], True) for i, row in enumerate(ROWS[:6])]
    config = RewardConfig(correlation=Correlation(tf=tf))
    anew = Reward(config, reward.calibration, reward.idf, reward.encoder)(samples, 200)
    without_encoder = Reward(config, reward.calibration)
    logged = [without_encoder.combine(raw, "ok", 200).reward for raw in reward.measure(samples)]
    assert logged == pytest.approx([score.reward for score in anew], abs=1e-9)
    assert logged != [score.reward for score in reward(samples, 200)]


def test_bad_knob_on_the_command_line(script):
    result = script("reward.py", "audit", "--data", data_folder(), "--reward.length.weight", "7")
    assert result.returncode == 2
    assert "length.weight" in result.stderr


def test_without_an_outline_the_outline_does_not_matter(reward):
    """Under `without_outline` any outline gives the same reward, and a story's own merits still count."""
    alone = Reward(reward.config.without_outline(), reward.calibration, reward.idf, reward.encoder)
    row = ROWS[0]
    thinks = (row["think"], row["prompt"], ROWS[1]["think"], "A plan.")
    scores = alone([Sample(row["prompt"], think, row["story"], True) for think in thinks], 200)
    assert [s.reward for s in scores] == pytest.approx([scores[0].reward] * 4)
    other, shuffled = ROWS[1]["story"], " ".join(sorted(row["story"].split()))
    worse = alone([Sample(row["prompt"], row["think"], story, True) for story in (other, shuffled)], 200)
    assert max(s.reward for s in worse) < scores[0].reward


@pytest.mark.parametrize("change, verdict", [({}, "ok"), ({"room": 16.0}, "ok"), ({"copied": 0.9}, "ok"), ({}, "no_eos")])
def test_what_a_sample_earns_by_its_parts_adds_up_to_its_reward(reward, raw, change, verdict):
    """By the parts' weights: guards, overlong penalty and malformed score affect every part alike."""
    score = reward.combine(raw | change if verdict == "ok" else {}, verdict, 300)
    earned = part_rewards(score, reward.config)
    assert np.dot(earned, list(reward.config.weights().values())) == pytest.approx(score.reward, abs=1e-9)
    if verdict != "ok":
        assert set(earned) == {reward.config.malformed_score}
