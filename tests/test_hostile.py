"""Malicious or accidental data: each row is cleaned or counted, each file read or refused with its place, quickly."""

import io
import json
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import Reward, Sample
from storygen.cleaning import MOST_CHARACTERS, Bounds
from storygen.cli import InputError
from storygen.corpus import load_prompts, load_sft, read_rows
from storygen.pattern import Pattern
from storygen.rowstore import RowStore, prepare_row
from storygen.workbench import read_rows as rows_to_score
from tests.reward_data import data_folder

LONG = "The ferry left at nine and the river was black, and he did not look at the woman who sat in the bow. " * 6
TAGS = "<eos> <story> <think> <prompt> <|endoftext|> [SEP] <pad>"
ROW = {"prompt": "A ferryman rows at night.", "think": "He rows and she waits for him.", "story": LONG}
SECONDS = 3.0  # for any row, on a busy machine

# Units to repeat into a text of any length, each aimed at a pattern that looks ahead, back or both.
UNITS = ["(", " '", "' ", "`", "``", "''", "* ", "*", "_a", "**a", "http://", "[ a ]( ", "[a](http://", "& ", "&amp;", "edit ",
         "edit: ", ". . . ", "\n", "\n ", " ", "- ", '" ', "thank you ", "a,'b", "a'B ", "[ WP ] ", "<newline>", "< br", "# ",
         "^", "~~", "\\*", "$ 5 ", "can not ", "gon na ", "part 2 ", "😍", "\u200b", "\u202e", "a\u0301", "漢", "/r/ab", "www.",
         "cont ", "a.'B", "\r", "A'B C-", "a ,", "\x00", "\ud800", "word "]  # fmt: skip


@pytest.mark.parametrize("field", ["prompt", "think", "story"])
@pytest.mark.parametrize("unit", UNITS)
def test_no_repetition_takes_long_and_none_survives_its_bounds(unit, field):
    most = MOST_CHARACTERS * {"prompt": 150, "think": 500, "story": 2000}[field]
    for length in (most, most + 1):
        text = ("A story. " + unit * length)[:length]
        clock = time.perf_counter()
        prepared = prepare_row(ROW | {field: text}, Bounds())
        assert time.perf_counter() - clock < SECONDS
        assert prepared.row is None or len(prepared.row[field].split()) <= 2000
        assert length == most or prepared.reason == "too_long"


def test_ten_megabytes_in_one_line_are_too_long_at_once(tmp_path):
    rows = [ROW | {field: "A long day. " * 900_000} for field in ROW] + [ROW]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clock = time.perf_counter()
    store, _ = stored(tmp_path, tmp_path / "rows.jsonl")
    assert time.perf_counter() - clock < 4 * SECONDS
    assert store["kept"] and store["dropped"]["too_long"].total() == 3


def stored(folder: Path, source: Path) -> tuple[dict, list[dict]]:
    """Counts of what was read, and the rows that a later stage will see."""
    store, wrong = RowStore(folder / "rows.parquet", Bounds()), Counter()
    try:
        store.add(read_rows(source, dropped=wrong), "source")
    finally:
        store.settle()
    store.write(folder)
    tally = store.tallies["source"]
    seen = [row for split in ("train", "validation", "test") for row in load_sft(folder, split)]
    prompts = [prompt for split in ("train", "validation", "test") for prompt in load_prompts(folder, split)]
    dropped = {**tally.dropped, "wrong_type": Counter(wrong)}
    return {"kept": tally.kept.total(), "dropped": dropped, "prompts": prompts}, seen


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([TAGS, LONG, "\x00", "\u202e"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.fixed_dictionaries({"prompt": VALUES, "outline": VALUES, "story": VALUES}), min_size=1, max_size=8))
def test_rows_of_every_type_are_kept_or_counted(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts, seen = stored(folder, folder / "rows.jsonl")
    assert counts["kept"] + sum(by.total() for by in counts["dropped"].values()) == len(rows)
    for row in seen:
        assert all(
            isinstance(value, str) and value.strip() and value.isprintable() or "\n" in value for value in row.values()
        )
        "".join(row.values()).encode()


def test_tags_and_odd_characters_of_a_row_never_become_tokens_of_the_pattern(tmp_path, tiny):
    odd = f"{TAGS} \ud800\x00\u202e\u200b😍 e\u0301"
    rows = [
        {"prompt": f"{odd} A ferryman {n} rows.", "outline": f"He rows. {odd}", "story": f"{LONG} {odd} {n}"}
        for n in range(5)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, seen = stored(tmp_path, tmp_path / "rows.jsonl")
    pattern: Pattern = tiny[2]
    assert len(seen) >= 1
    for row in seen:
        assert not set("\ud800\x00\u200b") & set("".join(row.values()))
        ids, start = pattern.row(**row)
        assert [ids.count(tag) for tag in (pattern.prompt_id, pattern.think_id, pattern.story_id, pattern.eos_id)] == [1] * 4
        assert ids[0] == pattern.prompt_id and ids[start - 2] == pattern.think_id and ids[-1] == pattern.eos_id


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


GOOD = json.dumps(ROW).encode() + b"\n"
FILES = [
    ("deep.jsonl", GOOD + b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n", "line 2"),
    ("deep_open.jsonl", GOOD + b"[" * 10_000 + b"\n", "line 2"),
    ("half.parquet", parquet([ROW] * 500)[:2000], "half.parquet"),
    ("no.parquet", b"PAR1" + b"\x00" * 500 + b"PAR1", "no.parquet"),
    ("stray.csv", b'prompt,story\n"A dog runs home.,It ran.\nA cat sits.,It sat.\n', "stray.csv, the row from line 2"),
    ("odd_quote.csv", b'prompt,story\n"A dog" runs home.,It ran.\n', "odd_quote.csv, the row from line 2"),
    ("nul.csv", b"prompt,story\nA dog runs\x00 home.,It ran.\n", None),
    ("number.jsonl", b"7\n", "line 1"),
    ("list.jsonl", GOOD + b"[1, 2]\n", "line 2"),
    ("latin.jsonl", GOOD + b'{"prompt": "caf\xe9"}\n', "line 2"),
    ("huge_number.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", "line 1"),
    ("twice.jsonl", b'{"prompt": "A dog runs home.", "prompt": 3}\n', None),
    ("torn.jsonl.gz", b"\x1f\x8b\x08\x00torn", "torn.jsonl.gz"),
    ("nothing.jsonl", b"\n\n\n", "no rows"),
    ("zeros.jsonl", b"\x00" * 100_000, "line 1"),
    ("odd.wp_source", b"A prompt without its story.\n", "odd.wp_target"),
]


@pytest.mark.parametrize(("name", "content", "place"), FILES, ids=[name for name, _, _ in FILES])
def test_hostile_files_are_read_or_refused_with_their_place(tmp_path, name, content, place):
    (tmp_path / name).write_bytes(content)
    clock = time.perf_counter()
    if place is None:
        stored(tmp_path, tmp_path / name)
    else:
        with pytest.raises(InputError) as refused:
            stored(tmp_path, tmp_path / name)
        assert place in str(refused.value) and "\n" not in str(refused.value)
    assert time.perf_counter() - clock < SECONDS


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"[" * 10_000 + b"]" * 10_000, ":2: not JSON"),
        (b"[1]", ":2: not a JSON object"),
        (json.dumps(ROW | {"finished": True, "story": "\ud800"}).encode(), ":2: 'story' holds half a character"),
        (json.dumps(ROW | {"finished": True, "think": "a " * 200_000}).encode(), ":2: 'think' has 400000 characters"),
        (json.dumps(ROW | {"finished": 1}).encode(), ":2: 'finished' must be a boolean"),
        (json.dumps(ROW | {"finished": True, "prompt": ["A dog."]}).encode(), ":2: 'prompt' must be a string"),
        (b"\xff", ":2: not UTF-8"),
    ],
)
def test_rows_to_score_are_refused_with_their_line(tmp_path, line, says):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(ROW | {"finished": True}).encode() + b"\n" + line + b"\n")
    with pytest.raises(InputError) as refused:
        rows_to_score(tmp_path / "rows.jsonl")
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_rows_to_score_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW | {"finished": True}).encode())
    assert len(rows_to_score(tmp_path / "rows.jsonl")) == 1


def test_odd_characters_are_scored_like_any_other():
    odd = [
        "\x00\x07",
        "\u202e\u200f",
        "😍👩‍👩‍👧",
        "e\u0301" * 50,
        "漢字",
        TAGS,
        "\u2028\x85",
        "ﷺ",
        "x" * 50_000,
        "' \" ` ``",
    ]
    samples = [Sample(f"{text} A ferryman rows.", f"{text} He rows.", f"{LONG} {text}", True) for text in odd]
    samples += [Sample(text, text, text, True) for text in odd]
    scores = Reward.load(data_folder())(samples, 200.0)
    assert all(-2 <= score.reward <= 1 for score in scores)
    assert all(0 <= value <= 1 for score in scores for value in (*score.parts.values(), *score.guards.values()))
