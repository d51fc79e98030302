"""evaluate.py's statistics, its likelihoods against the plain forward pass, and one run of it with a stand-in reward."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import evaluate
from reward import Sample, Score
from storygen.checkpoint import save_model
from storygen.cli import InputError
from storygen.pattern import Pattern, add_pattern_tokens

BASE = Path(__file__).parents[1] / "base_model"


@pytest.fixture(scope="module")
def tiny():
    """A GPT-2 with two narrow layers that has memorised two rows, so that it writes well-formed ones, and its pattern."""
    if not (BASE / "tokenizer.json").is_file():
        pytest.skip("base_model/ has no tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with matrices this small, threads only wait for each other on a busy machine
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=96, n_embd=32, n_layer=2, n_head=2)).eval()
    add_pattern_tokens(model, tokenizer)
    pattern = Pattern(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    rows = [pattern.row("Write about door 1.", "A dog finds a door.", "The dog found a door.\nIt opened.")[0]]
    rows += [pattern.row("Write about door 2.", "A cat shuts a door.", "The cat shut it at night.\nIt rained.")[0]]
    for _ in range(60):
        sum(model(torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    yield model, pattern
    torch.set_num_threads(threads)


def plain_mean_logp(model, ids: list[int], start: int) -> float:
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(np.mean([logps[t - 1, ids[t]].item() for t in range(start, len(ids))]))


def test_mean_logps_equal_the_plain_forward_pass(tiny):
    model, pattern = tiny
    rows = [pattern.row("A prompt.", "A plan.", story) for story in ("One.", "Two words here, and some more.", "Three")]
    means = evaluate.mean_logps(model, [ids for ids, _ in rows], [start for _, start in rows])
    assert means == pytest.approx([plain_mean_logp(model, ids, start) for ids, start in rows], abs=2e-2)


def test_outline_worth_compares_with_an_outline_of_another_prompt(tiny):
    model, pattern = tiny
    samples = [
        Sample("P one", "A cat goes out.", "The cat went out.", True, "ok"),
        Sample("P two", "No.", "It rained.", True, "ok"),
    ]
    worth, prompts = evaluate.outline_worth(model, pattern, samples, seed=0)
    assert prompts == ["P one", "P two"]
    for i, (own, other) in enumerate(zip(samples, samples[::-1], strict=True)):
        rows = [pattern.row(own.prompt, think, own.story) for think in (own.think, other.think, "")]
        scored = [plain_mean_logp(model, ids, ids.index(pattern.story_id, start) + 1) for ids, start in rows]
        assert worth["other"][i] == pytest.approx(scored[0] - scored[1], abs=2e-2)
        assert worth["none"][i] == pytest.approx(scored[0] - scored[2], abs=2e-2)
    alike = [Sample(s.prompt, "The same plan.", s.story, True, "ok") for s in samples]
    assert evaluate.outline_worth(model, pattern, alike, seed=0)[0]["other"] == pytest.approx([0.0, 0.0], abs=1e-6)
    malformed = [Sample(s.prompt, s.think, s.story, False, "no_eos") for s in samples]
    for none in (samples[:1], malformed):
        assert all(len(values) == 0 for values in evaluate.outline_worth(model, pattern, none, seed=0)[0].values())


def test_unplanned_stories_stand_right_behind_an_empty_outline(tiny):
    """Each is what the plain model would have written there, and the grammar's verdict on it concerns the outline alone."""
    model, pattern = tiny
    args = evaluate.Args((), num=3, seed=2)
    prompts = ["Write about door 1.", "Write about door 2."]
    stories = evaluate.write_unplanned(model, pattern, prompts, args)
    assert len(stories) == 6 and any(stories)
    prefix = pattern.row(prompts[0], "", "x")[0]
    prefix = prefix[: prefix.index(pattern.story_id) + 1]
    drawn = evaluate.sample(model, [prefix], 3, eos_id=pattern.eos_id, vocabulary=pattern.size, seed=2)
    for story, one in zip(stories[:3], drawn[0], strict=True):
        assert story in ("", pattern.decode(one.ids[:-1]))


def test_a_long_outline_shortens_the_scored_story_on_both_sides(tiny):
    model, pattern = tiny
    samples = [
        Sample("P one", "Word " * 20, "Story " * 60, True, "ok"),
        Sample("P two", "No.", "It rained all day.", True, "ok"),
    ]
    worth, prompts = evaluate.outline_worth(model, pattern, samples, seed=0)
    assert all(len(values) == len(prompts) > 0 and np.isfinite(values).all() for values in worth.values())


def test_reference_nll_is_weighted_by_tokens_and_cut_at_the_context(tiny):
    model, pattern = tiny
    tokenizer, start = pattern.tokenizer, pattern.tokenizer.bos_token_id
    stories = ["It rained.", "A much longer story than that one, by far.", "word " * 300, ""]
    rows = [[start, *tokenizer(story, add_special_tokens=False)["input_ids"]][:96] for story in stories[:3]]
    total = sum(plain_mean_logp(model, ids, 1) * (len(ids) - 1) for ids in rows)
    expected = -total / sum(len(ids) - 1 for ids in rows)
    assert evaluate.reference_nll(model, tokenizer, stories) == pytest.approx(expected, abs=2e-2)
    assert evaluate.reference_nll(model, tokenizer, [""]) is None


def test_the_prompt_is_the_unit_of_the_bootstrap():
    assert evaluate.by_prompt([1, 2, 5, 3], ["a", "b", "a", "b"]).tolist() == [3.0, 2.5]
    values = np.random.default_rng(0).normal(0.5, 1.0, 400)
    result = evaluate.bootstrap(values, seed=0)
    half = 1.96 * values.std() / 20
    assert result["mean"] == pytest.approx(values.mean())
    assert result["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.01)
    assert result["p_mean_zero"] == 1 / evaluate.RESAMPLES
    assert evaluate.bootstrap(np.zeros(5), seed=0)["p_mean_zero"] == 1.0
    assert evaluate.bootstrap(np.zeros(0), seed=0) is None
    # Too few to be sure: one value has no spread, and three coins fall alike one time in four.
    assert evaluate.bootstrap(np.ones(1), seed=0) == {"mean": 1.0, "ci95": None, "p_mean_zero": None, "prompts": 1}
    assert evaluate.bootstrap(np.array([0.1, 0.2, 0.3]), seed=0)["p_mean_zero"] == 0.25


class WordCount:
    """A stand-in for the reward, which would need an encoder: longer is better."""

    calibration = SimpleNamespace(quantile=lambda measure, level: 20.0)
    config, idf, encoder = evaluate.RewardConfig(), None, None

    def __call__(self, samples, length_target):
        rewards = [min(1.0, len(s.story.split()) / length_target) for s in samples]
        return [Score(r, s.verdict, {"length": r}, {"copied": 0.5}, {}) for r, s in zip(rewards, samples, strict=True)]


@pytest.fixture
def folders(tiny, tmp_path, monkeypatch):
    model, pattern = tiny
    save_model(model, pattern.tokenizer, tmp_path / "a")
    save_model(model, pattern.tokenizer, tmp_path / "b")
    rows = [{"split": "test", "prompt": f"Write about door {i}."} for i in range(5)]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "prompts.parquet")
    told = {"split": "train", "prompt": "A dog.", "think": "It barks.", "story": "Once a dog barked at a door."}
    pq.write_table(pa.Table.from_pylist([told]), tmp_path / "data" / "sft.parquet")
    monkeypatch.setattr(evaluate.Reward, "load", staticmethod(lambda *_: WordCount()))
    monkeypatch.setattr(evaluate, "story_rewards", lambda reward, prompts, stories, target: [len(s) for s in stories])
    return tmp_path


def test_a_whole_comparison(folders, capsys):
    models = (str(folders / "a"), str(folders / "b"))
    args = evaluate.Args(
        models, folders / "data", folders / "out", json=True, num=2, prompts=4, device="cpu", reference=models[0]
    )
    evaluate.main(args)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((folders / "out" / "evaluation.json").read_text("utf-8"))
    first, second = printed["models"]
    assert printed["prompts"] == 4 and printed["length_target"] == 20.0
    assert printed["config"]["reward"]["length"]["weight"] == evaluate.RewardConfig().length.weight
    assert first["vs_first"] is None and second["vs_first"]["mean"] == 0.0
    assert first["reward"] == second["reward"] and first["reference_nll"] == second["reference_nll"] > 0
    assert 0 <= first["copied_run"]["p50"] <= first["copied_run"]["p100"] <= 7 and 0 <= first["nearest_story"]["p100"] <= 1
    assert first["planned"]["mean"] > 0 and first["unplanned"] == second["unplanned"]
    gain = first["planned"]["mean"] - first["unplanned"]["mean"]
    assert first["planning_gain"]["mean"] == pytest.approx(gain)
    page = (folders / "out" / "report.html").read_text("utf-8")
    assert all(f"<th>{name}</th>" in page for name in models) and page.count("<td>part ") == len(first["parts"])
    rows = [json.loads(line) for line in (folders / "out" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 2 * 4 * 2 and {"model", "prompt", "think", "story", "finished", "verdict", "reward"} <= set(rows[0])


def test_a_comparison_that_is_stopped_keeps_the_models_it_finished(folders, monkeypatch, capsys):
    models = (str(folders / "a"), str(folders / "b"))
    whole = evaluate.rollout

    def stopped_at_the_second(*args, **kwargs):
        if (folders / "out").exists():
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(evaluate, "rollout", stopped_at_the_second)
    monkeypatch.setattr(evaluate, "write_unplanned", lambda *_: ["A story."] * 6 + [""] * 2)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(evaluate.Args(models, folders / "data", folders / "out", num=2, prompts=4, device="cpu"))
    kept = json.loads((folders / "out" / "evaluation.json").read_text("utf-8"))["models"]
    assert [one["model"] for one in kept] == [models[0]] and models[0] in (folders / "out" / "report.html").read_text(
        "utf-8"
    )
    rows = [json.loads(line) for line in (folders / "out" / "samples.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 4 * 2 and kept[0]["unplanned_well_formed"] == 0.75
    assert "1 of 2 models" in capsys.readouterr().err


def test_a_folder_of_something_else_is_not_written_to(folders):
    """An RL run has files of the same names."""
    run = folders / "run"
    run.mkdir()
    (run / "samples.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="something else"):
        evaluate.main(evaluate.Args((str(folders / "a"),), folders / "data", run, device="cpu"))
    assert [p.name for p in run.iterdir()] == ["samples.jsonl"] and (run / "samples.jsonl").read_text() == "{}\n"


def test_a_plain_language_model_may_stand_in_the_table(folders):
    models = (str(folders / "a"), str(BASE))
    evaluate.main(evaluate.Args(models, folders / "data", folders / "out", num=1, prompts=2, device="cpu", unplanned=False))
    plain = json.loads((folders / "out" / "evaluation.json").read_text("utf-8"))["models"][1]
    assert plain["samples"] == 2 and plain["well_formed"] == 0 and plain["vs_first"] is not None


def test_a_folder_that_is_no_model_is_one_line_before_anything_is_sampled(folders):
    with pytest.raises(InputError, match="run the stage that makes it") as error:
        evaluate.main(evaluate.Args((str(folders / "a"), "artifacts/none"), folders / "data", folders / "out", device="cpu"))
    assert "\n" not in str(error.value)
    assert not (folders / "out").exists()
