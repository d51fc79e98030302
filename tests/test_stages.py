"""The three scripts, run as a user runs them, on a few rows and a tiny random model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rl_train
from pattern_learning import Args, Row, batches, behind_examples, drill, load_examples, loss_sum
from storygen.checkpoint import save_model
from storygen.cli import claim
from storygen.pattern import Pattern
from tests.conftest import ROOT, tiny_gpt2

TIMES = {"tokens_per_second", "time/sample_s", "time/reward_s", "time/update_s", "time/step_s", "time/tokens_per_second"}
RL = [
    "--steps",
    "4",
    "--prompts",
    "2",
    "--k",
    "2",
    "--eval-every",
    "2",
    "--eval-prompts",
    "3",
    "--save-every",
    "1",
    "--precision",
    "fp32",
]


def launch(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)


ADJECTIVES = ["red", "old", "small", "brave", "tired", "happy", "quiet", "clever", "hungry", "golden", "broken", "lonely"]
NOUNS = ["fox", "king", "boat", "girl", "tree", "river", "key", "tower", "horse", "lamp", "baker", "storm"]
VERBS = [
    "found",
    "lost",
    "followed",
    "painted",
    "saved",
    "sold",
    "watched",
    "opened",
    "carried",
    "wanted",
    "missed",
    "broke",
]


def toy_rows(count):
    """Rows of a small grammar: simple enough for a tiny model to learn in seconds, different enough not to be duplicates."""
    random = np.random.default_rng(0)

    def sentence():
        a, b = random.choice(ADJECTIVES, 2)
        n, m = random.choice(NOUNS, 2)
        return f"The {a} {n} {random.choice(VERBS)} the {b} {m}."

    for _ in range(count):
        story = [sentence() for _ in range(10)]
        yield {"prompt": story[0], "outline": " ".join(story[:3]), "story": " ".join(story)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data folder of toy rows and a tiny random model."""
    path = tmp_path_factory.mktemp("stages")
    (path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_rows(120)))
    done = launch("data_prep.py", "--preset", "demo", "--source", path / "toy.jsonl", "--outlines", path / "toy.jsonl",
                  "--out", path / "data")  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, tokenizer = tiny_gpt2()
    save_model(model, tokenizer, path / "base")
    return path


LEARN = ["--eval-prompts", "4", "--batch-tokens", "2048", "--precision", "fp32", "--warmup", "5", "--lr", "0.01"]


def learn(home, mode, model, out, steps):
    return launch("pattern_learning.py", "--mode", mode, "--data", home / "data", "--model", model, "--out", out,
                  "--steps", steps, "--eval-every", steps // 2, *LEARN)  # fmt: skip


@pytest.fixture(scope="module")
def zeroshot(home):
    done = learn(home, "oneshot", home / "base", home / "oneshot", 6)
    assert done.returncode == 0, done.stderr
    done = learn(home, "zeroshot", home / "oneshot", home / "zeroshot", 120)
    assert done.returncode == 0, done.stderr
    return home / "zeroshot"


def without_times(path):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in path.read_text().splitlines()]


def test_model_folder_loads_with_plain_transformers_and_has_learnt(zeroshot):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(zeroshot), AutoTokenizer.from_pretrained(zeroshot)
    assert tokenizer.eos_token == "<eos>" and model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template
    metrics = without_times(zeroshot / "metrics.jsonl")
    assert {"val_loss", "val_objective", "well_formed"} <= set(metrics[59]) & set(metrics[119])
    assert [m["step"] for m in metrics] == list(range(1, 121))
    first = without_times(zeroshot.parent / "oneshot" / "metrics.jsonl")[0]["loss"]
    assert metrics[-1]["val_loss"] < first - 5 and metrics[-1]["well_formed"] >= 0.5
    assert json.loads((zeroshot / "run.json").read_text())["mode"] == "zeroshot"
    assert sorted(p.name for p in zeroshot.iterdir() if p.is_dir()) == ["tensorboard"]


def test_loss_is_on_the_real_rows_response_only(home):
    model, tokenizer = tiny_gpt2(context=512)
    pattern = Pattern(tokenizer)
    examples = load_examples(ROOT / "prompts" / "oneshot.jsonl", pattern)
    row = Row(*pattern.row("A dog.", "It barks.", "Once."))
    (shown,) = behind_examples([row], examples, np.random.default_rng(0), 512)
    ids, start = shown.ids, shown.start
    assert ids[start:] == row.ids[row.start :] and ids[: -len(row.ids)] in examples
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = -sum(logits[t - 1, ids[t]] for t in range(start, len(ids)))
    loss, tokens = loss_sum(model, [shown], pattern, torch.float32)
    assert tokens == len(ids) - start and torch.allclose(loss, expected, atol=1e-3)


def test_drills_teach_tags_and_nothing_else():
    model, tokenizer = tiny_gpt2(context=512)
    pattern = Pattern(tokenizer)
    text = {"prompt": "A dog.", "think": "It barks.", "story": 'One ran. "Two," he said.\nThree sat! Four?'}
    for seed in range(20):
        row = drill(text, pattern, np.random.default_rng(seed))
        parsed = pattern.parse(row.ids[row.start :])
        assert parsed.verdict == "ok" and text["story"].startswith(parsed.story) and parsed.think in text["story"]
        logps = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        tags = [t for t in range(row.start, len(row.ids)) if row.ids[t] in (pattern.story_id, pattern.eos_id)]
        loss, weight = loss_sum(model, [row], pattern, torch.float32, tag_weight=5.0)
        assert weight == 10 and torch.allclose(loss, -5 * sum(logps[t - 1, row.ids[t]] for t in tags), atol=1e-3)


def test_fine_tuning_takes_the_same_steps_whatever_the_micro_batches_and_processes(script, home):
    losses = []
    for micro, processes in (("60", 1), ("4000", 1), ("60", 2)):
        out = home / f"micro_{micro}_{processes}"
        arguments = ["--mode", "oneshot", "--data", home / "data", "--model", home / "base", "--out", out, *LEARN,
                     "--steps", "3", "--eval-every", "3", "--micro-tokens", micro]  # fmt: skip
        if processes == 1:
            done = script("pattern_learning.py", *arguments)
        else:
            torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", processes]
            done = launch(*torchrun, ROOT / "pattern_learning.py", *arguments)
        assert done.returncode == 0, done.stderr
        rows = without_times(out / "metrics.jsonl")
        losses.append([value for row in rows for key, value in row.items() if "loss" in key or key == "grad_norm"])
        assert rows[-1]["well_formed"] >= 0 and (out / "model.safetensors").exists()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] == pytest.approx(losses[2], rel=1e-4)


@pytest.mark.parametrize("share, expected", [(0.0, (0, 0)), (0.5, (5, 35)), (1.0, (40, 40)), (2.0, (80, 80))])
def test_drill_share_is_drills_a_row(share, expected):
    _, tokenizer = tiny_gpt2(context=512)
    pattern = Pattern(tokenizer)
    texts = [{"prompt": "A dog.", "think": "It barks.", "story": "One ran. Two sat. Three slept."}] * 40
    rows = [Row(*pattern.row(**text)) for text in texts]
    args = Args(mode="zeroshot", drill_share=share, batch_tokens=10**6)  # one batch is an epoch
    batch = next(batches(rows, texts, [], pattern, args, 512))
    assert expected[0] <= sum(row.tags_only for row in batch) <= expected[1]
    assert sum(not row.tags_only for row in batch) == 40


@pytest.fixture(scope="module")
def whole_run(zeroshot, home):
    done = launch("rl_train.py", "--data", home / "data", "--model", zeroshot, "--out", home / "rl", *RL)
    assert done.returncode == 0, done.stderr
    return home / "rl"


def test_rl_leaves_everything_it_promises(whole_run):
    metrics = without_times(whole_run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert 0 < metrics[0]["check/ratio"] < 1e-3  # sampler and training forward round differently
    assert metrics[0]["check/kl"] == 0 and metrics[1]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert {"eval/reward", "eval/parts/correlation"} <= set(metrics[0]) & set(metrics[2]) & set(metrics[4])
    assert metrics[1]["policy/sampler_gap"] < 1e-3 and metrics[0]["eval/samples/well_formed"] > 0
    samples = without_times(whole_run / "samples.jsonl")
    assert sum(s["split"] == "train" for s in samples) == 4 * 2 * 2
    assert sum(s["split"] == "validation" for s in samples) == 3 * 3
    assert all(s["reward"] == -1 for s in samples if s["verdict"] != "ok")
    for step in range(1, 5):
        group = [s["advantage"] for s in samples if s["step"] == step and s["split"] == "train"]
        assert sum(group[:2]) == pytest.approx(0, abs=1e-4)
    AutoModelForCausalLM.from_pretrained(whole_run / "final")
    assert "<html" in (whole_run / "report.html").read_text()


def test_a_run_rescored_under_its_own_config_prefers_what_it_preferred(whole_run, home, script):
    done = script("reward.py", "rescore", whole_run / "samples.jsonl", "--data", home / "data")
    assert "rank correlation 1.000" in done.stdout and "\n0 of " in done.stdout, done.stderr


def test_a_sample_is_explained_at_the_length_target_it_was_logged_with(whole_run, home, script):
    samples = without_times(whole_run / "samples.jsonl")
    number = next(n for n, s in enumerate(samples, 1) if s["split"] == "train" and s["verdict"] == "ok")
    done = script("reward.py", "explain", whole_run / "samples.jsonl", "--row", number, "--data", home / "data")
    assert f"reward {samples[number - 1]['reward']:.3f} " in done.stdout, done.stderr


def test_a_stopped_run_can_be_ended_where_it_is(whole_run, zeroshot, home, script):
    out = home / "ended"
    shutil.copytree(whole_run, out)
    shutil.rmtree(out / "checkpoints" / "step_000004")
    shutil.rmtree(out / "final")
    done = script("rl_train.py", "--data", home / "data", "--model", zeroshot, "--out", out, "--resume", *RL, "--steps", "3")
    assert done.returncode == 0, done.stderr
    metrics = without_times(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 3] and "eval/reward" in metrics[-1]
    assert f"{metrics[-1]['eval/reward']:.3f}" in (out / "final/README.md").read_text()


def test_a_model_without_a_story_to_its_name_has_a_length_target_too(script, home):
    """Its outlines run to the end of the context, and there is one prompt: they leave no room. Nor is there a human story."""
    out, data = home / "no_story", home / "prompts_alone"
    shutil.copytree(home / "data", data)
    (data / "sft.parquet").unlink()
    done = script("rl_train.py", "--data", data, "--model", home / "oneshot", "--out", out, *RL,
                  "--eval-prompts", "1", "--steps", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert without_times(out / "metrics.jsonl")[1]["length/target"] >= 1


@pytest.mark.parametrize(
    ("signals", "code"), [([signal.SIGKILL], -9), ([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT], 130)]
)
def test_killed_run_resumes_to_the_same_bytes(whole_run, zeroshot, home, signals, code):
    """The second Ctrl-C comes while the first is being handled: usually in the middle of a checkpoint."""
    out = home / f"rl_{signals[-1].name}"
    arguments = ["--data", home / "data", "--model", zeroshot, "--out", out, "--resume", *RL]
    command = [sys.executable, str(ROOT / "rl_train.py"), *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "step_000001").exists() and time.monotonic() < deadline:
            os.sched_yield()
        for number in signals:
            process.send_signal(number)
        assert process.wait(60) == code
    assert not (out / "final").exists()
    done = launch("rl_train.py", *arguments)
    assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_times(out / name) == without_times(whole_run / name)
    assert (out / "final/model.safetensors").read_bytes() == (whole_run / "final/model.safetensors").read_bytes()


SIGNALLED = """
import os, signal, sys
import rl_train
from storygen.cli import run

loss, calls, last = rl_train.policy_loss, [], int(sys.argv.pop(1))

def signalled(*arguments, **named):
    calls.append(len(calls) + 1)
    if calls[-1] == last:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss(*arguments, **named)

rl_train.policy_loss = signalled
try:
    run(rl_train.main, rl_train.Args)
finally:
    print("losses", len(calls))
"""


@pytest.mark.parametrize(("call", "step"), [(3, 1), (4, 2)])
def test_a_signal_while_it_learns_ends_the_step_only_where_weights_have_changed(whole_run, zeroshot, home, call, step):
    """Two minibatches per step, one loss each: the third call is before the second step's first change, the fourth after."""
    arguments = ["--data", home / "data", "--model", zeroshot, "--out", home / f"rl_call_{call}", "--resume", *RL]
    done = launch("-c", SIGNALLED, call, *arguments)
    assert done.returncode == 143 and f"stopped at step {step};" in done.stderr and f"losses {call}" in done.stdout
    done = launch("rl_train.py", *arguments)
    assert done.returncode == 0, done.stderr
    final = "final/model.safetensors"
    assert (home / f"rl_call_{call}" / final).read_bytes() == (whole_run / final).read_bytes()


def test_two_processes_and_then_one_take_the_steps_of_one(whole_run, zeroshot, home):
    """Up to rounding, which may turn a draw into another word: step 1's samples are equal, later ones have equal prompts."""
    out = home / "rl_shared"
    arguments = ["--data", home / "data", "--model", zeroshot, "--out", out, "--resume", *RL]
    done = launch("-m", "torch.distributed.run", "--nproc-per-node", 2, ROOT / "rl_train.py", *arguments, "--steps", 2)
    assert done.returncode == 0 and done.stdout.count("preset demo") == 1, done.stderr
    done = launch(ROOT / "rl_train.py", *arguments)
    assert done.returncode == 0, done.stderr
    shared, alone = (without_times(run / "samples.jsonl") for run in (out, whole_run))
    assert [(s["step"], s["prompt"]) for s in shared] == [(s["step"], s["prompt"]) for s in alone]
    assert [s["story"] for s in shared if s["step"] < 2] == [s["story"] for s in alone if s["step"] < 2]
    metrics = [without_times(run / "metrics.jsonl") for run in (out, whole_run)]
    assert metrics[0][1] == pytest.approx(metrics[1][1], rel=1e-4, abs=1e-5)
    assert [m["step"] for m in metrics[0]] == [0, 1, 2, 3, 4]


def test_a_killed_process_ends_the_others_and_the_run_can_be_resumed(zeroshot, home):
    out = home / "rl_lost"
    arguments = ["--data", home / "data", "--model", zeroshot, "--out", out, "--resume", *RL]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "rl_train.py"]
    command = [*map(str, (*torchrun, *arguments)), "--steps", "500"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as agent:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "step_000002").exists() and time.monotonic() < deadline:
            os.sched_yield()
        second = [one for one in psutil.Process(agent.pid).children() if one.environ().get("RANK") == "1"]
        second[0].kill()
        _, errors = agent.communicate(timeout=60)
    assert agent.returncode != 0 and errors.count("error: another process of this run has ended") == 1
    step = int(max((out / "checkpoints").glob("step_??????")).name[5:])
    done = launch(ROOT / "rl_train.py", *arguments, "--steps", step + 1)
    assert done.returncode == 0, done.stderr
    assert [m["step"] for m in without_times(out / "metrics.jsonl")] == list(range(step + 2))


def test_bad_input_is_told_once_by_all_processes(zeroshot, home):
    done = launch("-m", "torch.distributed.run", "--nproc-per-node", 2, ROOT / "rl_train.py", "--data", home / "data",
                  "--model", zeroshot, "--out", home / "bad", *RL, "--eval-prompts", 1)  # fmt: skip
    assert done.stderr.count("error: 2 processes") == 1 and not (home / "bad").exists()


@pytest.mark.parametrize("name", ["data_prep.py", "pattern_learning.py", "rl_train.py"])
def test_a_second_process_on_the_same_folder_is_refused(script, zeroshot, home, name):
    out = home / f"claimed_by_{name}"
    arguments = {
        "data_prep.py": ["--source", home / "toy.jsonl", "--outlines", home / "toy.jsonl"],
        "pattern_learning.py": ["--mode", "zeroshot", "--data", home / "data", "--model", zeroshot, *LEARN],
        "rl_train.py": ["--data", home / "data", "--model", zeroshot, *RL],
    }
    hold = (
        f"import pathlib, sys; sys.path.insert(0, {str(ROOT)!r}); from storygen.cli import claim; "
        f"lock = claim(pathlib.Path({str(out)!r})); print(1, flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    done = script(name, *arguments[name], "--out", out)
    assert done.returncode == 2 and f"{out} is being written by process {holder.pid}" in done.stderr and not out.exists()
    holder.kill()
    holder.wait()
    claim(out).close()  # the kernel has released the lock


def test_interrupted_fine_tuning_goes_on_to_the_same_bytes(home, zeroshot):
    out = home / "zeroshot_again"
    arguments = ["--mode", "zeroshot", "--data", home / "data", "--model", home / "oneshot", "--out", out,
                 "--steps", 120, "--eval-every", 60, *LEARN]  # fmt: skip
    command = [sys.executable, str(ROOT / "pattern_learning.py"), *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while (
            not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size) and time.monotonic() < deadline
        ):
            os.sched_yield()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    done = launch("pattern_learning.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert without_times(out / "metrics.jsonl") == without_times(zeroshot / "metrics.jsonl")
    assert (out / "model.safetensors").read_bytes() == (zeroshot / "model.safetensors").read_bytes()


def test_collapse_is_told(script, zeroshot, home):
    """Samples cut off after three tokens: none finishes, all earn the same, and each step says so."""
    out = home / "cut_off"
    done = script("rl_train.py", "--data", home / "data", "--model", zeroshot, "--out", out, *RL, "--max-new-tokens", "3")
    assert done.returncode == 0
    for step in range(1, 5):
        assert f"step {step}: only 0% of the samples finished" in done.stderr
        assert f"step {step}: all samples have the same reward" in done.stderr
    assert all(len(m["alarms"]) == 2 for m in without_times(out / "metrics.jsonl") if m["step"])
    assert all(s["verdict"] == "no_eos" and s["room"] == 0 for s in without_times(out / "samples.jsonl"))


def test_samples_that_are_not_the_policys_are_refused(monkeypatch, capsys, zeroshot, home):
    monkeypatch.setitem(rl_train.GAP_LIMIT, torch.float32, 0.0)
    args = rl_train.Args(
        data=home / "data", model=str(zeroshot), out=home / "gap", steps=1, prompts=2, k=2, precision="fp32"
    )
    with pytest.raises(SystemExit, match="sampler's log-probabilities"):
        rl_train.main(args)
    assert not (home / "gap/final").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--k", "1"], "--k must be at least 2"),
        (["--data", "nowhere"], "data_prep.py"),
        (["--model", "artifacts/nowhere"], "does not exist"),
        (["--model", "base_model"], "pattern_learning.py"),
        (["--out", "RUN"], "--resume"),
        (["--out", "FILE"], "is a file"),
        (["--out", "TAKEN"], "--resume"),
        (["--out", "TAKEN", "--resume"], "without its checkpoints"),
        (["--out", "MODEL"], "holds a model"),
        (["--out", "DATA"], "something else"),
        (["--beta", "1.5"], "--beta must be at most 1"),
        (["--advantage", "batch", "--prompts", "1", "--k", "1", "--minibatches", "1"], "--advantage batch"),
        (["--out", "RUN", "--resume", "--lr", "0.5"], "other settings (lr)"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--minibatches", "3"], "--minibatches"),
        (["--temperature", "0"], "--temperature must be above 0, not 0"),
        (["--lr", "nan"], "--lr must be above 0, not nan"),
        (["--warmup", "0"], "--warmup must be at least 1"),
        (["--kl-target", "inf"], "--kl-target"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_rl_refuses_bad_input_in_one_line(script, whole_run, zeroshot, home, arguments, says):
    taken = home / "taken"  # a finished run whose checkpoints were deleted to make room
    if not taken.exists():
        shutil.copytree(whole_run, taken, ignore=shutil.ignore_patterns("checkpoints"))
    names = {"RUN": str(whole_run), "FILE": str(home / "toy.jsonl"), "TAKEN": str(taken), "MODEL": str(zeroshot),
             "DATA": str(home / "data")}  # fmt: skip
    arguments = [names.get(a, a) for a in arguments]
    before = sorted(p.name for p in home.rglob("*"))
    done = script("rl_train.py", "--data", home / "data", "--model", zeroshot, "--out", home / "bad", *RL, *arguments)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
    assert sorted(p.name for p in home.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--data", "nowhere"], "data_prep.py"),
        (["--model", "artifacts/nowhere"], "does not exist"),
        (["--examples", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--steps", "0"], "--steps"),
        (["--micro-tokens", "0"], "--micro-tokens"),
        (["--drill-share", "-1"], "--drill-share must be at least 0, not -1"),
        (["--dropout", "1"], "--dropout"),
        (["--warmup", "0"], "--warmup"),
        (["--device", "cuda"], "no GPU"),
        (["--out", "DATA"], "something else"),
    ],
)
def test_fine_tuning_refuses_bad_input_in_one_line(script, home, arguments, says):
    arguments = [str(home / "data") if a == "DATA" else a for a in arguments]
    done = script(
        "pattern_learning.py", "--mode", "oneshot", "--data", home / "data", "--model", home / "base", "--out", home / "bad",
        *arguments,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
    assert not (home / "bad").exists()
