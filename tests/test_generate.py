import json

import pytest

from storygen.checkpoint import save_model
from tests.conftest import tiny_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(*tiny_gpt2(context=96), path / "tiny")
    return path / "tiny"


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


@pytest.mark.parametrize(
    "arguments, stdin, says",
    [
        (["", "--model", "MODEL"], b"", "prompt 1 is empty"),
        (["--model", "MODEL"], b"", "standard input holds no prompt"),
        (["--model", "MODEL"], b"ok\n\xff\xfe\n", "line 2: not UTF-8"),
        (["--prompts", "MISSING", "--model", "MODEL"], b"", "cannot read"),
        (["--prompts", "BAD", "--model", "MODEL"], b"", "line 2"),
        (["x", "--prompts", "BAD", "--model", "MODEL"], b"", "not both"),
        (["word " * 200, "--model", "MODEL"], b"", "shorten the prompt"),
        (["x", "--model", "base_model"], b"", "pattern_learning.py"),
        (["x", "--model", "artifacts/nothing"], b"", "does not exist"),
        (["x", "--model", "MODEL", "--num", "0"], b"", "--num"),
        (["x", "--model", "MODEL", "--device", "cuda"], b"", "no GPU"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, folder, tmp_path, arguments, stdin, says):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    names = {"MODEL": folder, "MISSING": tmp_path / "none.txt", "BAD": tmp_path / "bad.jsonl"}
    done = script("generate.py", *(names.get(a, a) for a in arguments), stdin=stdin)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
