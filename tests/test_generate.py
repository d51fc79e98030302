import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import generate
from reward import Reward, Sample
from storygen.checkpoint import load_model, save_model
from storygen.logprobs import response_logps
from storygen.pattern import Pattern
from tests.conftest import ROOT, tiny_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(*tiny_gpt2(context=96), path / "tiny")
    return path / "tiny"


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A model that writes short rows, usually well-formed, in the words of these three."""
    path = tmp_path_factory.mktemp("writer") / "model"
    model, tokenizer = tiny_gpt2(context=96)
    pattern = Pattern(tokenizer)
    rows = [
        pattern.row("A dog.", "A dog waits at the gate.", "The dog waited. Nobody came home."),
        pattern.row("A dog.", "A dog finds a boat.", "It found a boat and rowed.\nThe sea was still — and grey."),
        pattern.row("A dog.", "A dog runs and runs.", "It ran and ran and ran and ran and ran and ran."),
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        (-response_logps(model, *map(list, zip(*rows, strict=True)), pattern.pad_id).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, path)
    return path


def test_rows_from_argument_file_and_standard_input_agree(script, folder, tmp_path):
    (tmp_path / "p.txt").write_text("A dog.\n\nA cat <story> here.\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "A dog."}\n{"prompt": "A cat <story> here."}\n')
    runs = [
        script("generate.py", "--prompts", tmp_path / "p.txt", "--model", folder, "--num", 2, "--seed", 3, "--jsonl"),
        script("generate.py", "--prompts", tmp_path / "p.jsonl", "--model", folder, "--num", 2, "--seed", 3, "--jsonl"),
        script("generate.py", "--model", folder, "--num", 2, "--seed", 3, "--jsonl", stdin=b"A dog.\nA cat <story> here.\n"),
    ]
    assert [r.returncode for r in runs] == [0, 0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout
    rows = [json.loads(line) for line in runs[0].stdout.splitlines()]
    assert [r["prompt"] for r in rows] == ["A dog."] * 2 + ["A cat <story> here."] * 2
    assert all(set(r) == {"prompt", "think", "story", "finished", "verdict"} for r in rows)


def test_text_and_json_show_the_same_story(script, folder):
    text, array = (script("generate.py", "A dog.", "--model", folder, *flag) for flag in ((), ("--json",)))
    (row,) = json.loads(array.stdout)
    assert all(word in text.stdout for word in ("prompt", "outline", "story", "A dog."))
    assert row["verdict"] in text.stdout or row["verdict"] == "ok"


def rows_of(done) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_rows_of_a_prompt_file_end_where_json_says(tmp_path):
    """A byte-order mark, which some editors write, is not text; a line separator inside a string does not end a row."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "One\u2028line."}\r\n{"prompt": "Two."}\n', "utf-8-sig")
    assert generate.read_prompts(generate.Args(prompts=path)) == ["One\u2028line.", "Two."]


class ByLength:
    """A reward whose best story is easy to see: the longer, the better."""

    calibration = SimpleNamespace(quantile=lambda name, level: 100.0)

    def __call__(self, samples: list[Sample], length_target: float) -> list[SimpleNamespace]:
        return [SimpleNamespace(reward=float(len(sample.story))) for sample in samples]


def test_best_of_keeps_the_story_of_the_highest_reward(script, writer, monkeypatch):
    monkeypatch.setattr(Reward, "load", lambda *_, **__: ByLength())
    law = ("A dog.", "--model", writer, "--temperature", 2, "--jsonl")
    every = rows_of(script("generate.py", *law, "--num", 6))
    kept = rows_of(script("generate.py", *law, "--num", 2, "--best-of", 3))
    assert len({len(row["story"]) for row in every}) > 2
    for row, first in zip(kept, (0, 3), strict=True):
        best = max(every[first : first + 3], key=lambda one: len(one["story"]))
        assert row == best | {"reward": len(best["story"])}


def test_an_outline_that_is_given_is_the_plan_of_every_story(script, writer):
    rows = rows_of(
        script(
            "generate.py",
            "A dog.",
            "--model",
            writer,
            "--outline",
            "It flies.\nIt lands.",
            "--num",
            3,
            "--temperature",
            2,
            "--jsonl",
        )
    )
    assert {row["think"] for row in rows} == {"It flies.\nIt lands."}
    assert len({row["story"] for row in rows}) > 1 and all(row["story"] for row in rows)


def test_a_story_goes_on_past_the_context_in_windows(script, folder):
    """The random model does not end its rows: every window adds what the context holds besides plan and newest part."""
    pattern = Pattern(load_model(folder)[1])
    lengths = []
    for windows in range(3):
        (row,) = rows_of(
            script("generate.py", "A dog.", "--model", folder, "--outline", "It flies.", "--continue", windows, "--jsonl")
        )
        assert not row["finished"] and row["think"] == "It flies."
        lengths.append(row["story"])
    assert lengths[1].startswith(lengths[0]) and lengths[2].startswith(lengths[1])
    head = len(pattern.prefix("A dog.")) + len(pattern.encode("It flies."))
    tokens = [len(pattern.encode(story)) for story in lengths]
    assert tokens[0] + 20 < tokens[1] and tokens[1] + 20 < tokens[2] and tokens[0] <= 96 - head + 4


def test_a_plan_that_fills_the_context_ends_its_story_and_not_the_command(script, folder):
    """Prompt, plan and <story> take 95 of 96 tokens: there is a first token, and no window for a second one."""
    pattern = Pattern(load_model(folder)[1])
    head = len(pattern.prefix("A dog.")) + len(pattern.encode("It"))
    outline = "It" + " dog" * (95 - head)
    assert len(pattern.prefix("A dog.")) + len(pattern.encode(outline)) == 95
    rows = rows_of(script("generate.py", "A dog.", "--model", folder, "--outline", outline, "--continue", 2, "--jsonl"))
    assert len(rows) == 1 and rows[0]["think"] == outline and not rows[0]["finished"]


def test_a_terminal_shows_the_story_as_it_is_written_the_outline_dimmed(script, writer):
    (row,) = rows_of(script("generate.py", "A dog.", "--model", writer, "--seed", 5, "--jsonl"))
    ours, theirs = os.openpty()
    command = [sys.executable, "generate.py", "A dog.", "--model", str(writer), "--seed", "5"]
    with subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=subprocess.DEVNULL):
        os.close(theirs)
        shown = b""
        while part := read(ours):
            shown += part
    shown = shown.decode().replace("\r\n", "\n")
    outline, story = (row[key].replace("\n", "\n    ") for key in ("think", "story"))
    assert row["verdict"] == "ok"
    assert shown.strip() == f"prompt\n    A dog.\n\n  outline\n    \033[2m{outline}\033[0m\n\n  story\n    {story}\033[0m"


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1000)
    except OSError:  # how a terminal says that the other side has closed
        return b""


@pytest.mark.parametrize(
    "arguments, stdin, says",
    [
        (["", "--model", "MODEL"], b"", "prompt 1 is empty"),
        (["--model", "MODEL"], b"", "standard input holds no prompt"),
        (["--model", "MODEL"], b"ok\n\xff\xfe\n", "line 2: not UTF-8"),
        (["--prompts", "MISSING", "--model", "MODEL"], b"", "cannot read"),
        (["--prompts", "BAD", "--model", "MODEL"], b"", "line 2"),
        (["--prompts", "HALF", "--model", "MODEL"], b"", "prompt 1 holds half a character"),
        (["x", "--outline", "\udcff y", "--model", "MODEL"], b"", "--outline holds half a character"),
        (["x", "--seed", "-1", "--model", "MODEL"], b"", "--seed must be at least 0"),
        (["x", "--prompts", "BAD", "--model", "MODEL"], b"", "not both"),
        (["word " * 200, "--model", "MODEL"], b"", "shorten the prompt"),
        (["x", "--model", "base_model"], b"", "pattern_learning.py"),
        (["x", "--model", "artifacts/nothing"], b"", "does not exist"),
        (["x", "--model", "MODEL", "--num", "0"], b"", "--num"),
        (["x", "--model", "MODEL", "--temperature", "nan"], b"", "--temperature must be above 0, not nan"),
        (["x", "--model", "MODEL", "--best-of", "0"], b"", "--best-of"),
        (["x", "--model", "MODEL", "--best-of", "2", "--data", "MISSING"], b"", "run data_prep.py first"),
        (["x", "--model", "MODEL", "--outline", " "], b"", "--outline"),
        (["x", "--model", "MODEL", "--outline", "a <story> b"], b"", "--outline"),
        (["x", "--model", "MODEL", "--device", "cuda"], b"", "no GPU"),
        (["x", "--model", "MODEL", "--device", "gpu"], b"", "--device gpu: it is auto, cpu, cuda or cuda:N"),
        (["x", "--model", "MODEL", "--best-of", "2", "--data", "BAD"], b"", "run data_prep.py first"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, folder, tmp_path, arguments, stdin, says):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "a \\ud800 b"}\n')
    names = {
        "MODEL": folder, "MISSING": tmp_path / "none.txt", "BAD": tmp_path / "bad.jsonl", "HALF": tmp_path / "half.jsonl"
    }  # fmt: skip
    done = script("generate.py", *(names.get(a, a) for a in arguments), stdin=stdin)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
