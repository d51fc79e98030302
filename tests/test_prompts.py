"""The static examples and the teacher's instruction."""

import json
import re
import string
from pathlib import Path

from storygen.corpus import read_rows

ROOT = Path(__file__).parents[1]
ROWS = [json.loads(line) for line in (ROOT / "prompts" / "oneshot.jsonl").read_text("utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def eight_grams(text: str) -> set[tuple[str, ...]]:
    listed = words(text)
    return {tuple(listed[i : i + 8]) for i in range(len(listed) - 7)}


def test_examples_are_short_plain_and_complete():
    assert len(ROWS) == 12
    for row in ROWS:
        assert list(row) == ["prompt", "think", "story"]
        lengths = [len(row[key].split()) for key in row]
        assert 12 <= lengths[0] <= 25 and 30 <= lengths[1] <= 50 and 90 <= lengths[2] <= 130, row["prompt"]
        assert all(text.isascii() and text == text.strip() for text in row.values()), row["prompt"]
        assert "\n" not in row["prompt"] + row["think"] and "\n\n" not in row["story"] and "\n" in row["story"]
        assert row["story"][-1] in '.!?"' and row["story"].count('"') % 2 == 0
        assert 2 <= len(re.findall(r"[.!?](?=\s|$)", row["think"].replace("Mr.", "Mr"))) <= 4, row["think"]
        assert not any(tag in text for tag in ("<prompt>", "<think>", "<story>", "<eos>") for text in row.values())
    assert sum('"' in row["story"] for row in ROWS) > 6


def test_names_of_the_outline_stand_in_the_story():
    for row in ROWS:
        # A capital letter inside a sentence: a name, apart from "Earth".
        names = {name for name in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", row["think"])} - {"Earth"}
        assert all(name in row["story"] for name in names), (names, row["story"])


def test_examples_differ_from_each_other():
    assert len({words(row["story"])[0] for row in ROWS}) >= 8
    for key in ("prompt", "think", "story"):
        assert len({row[key] for row in ROWS}) == len(ROWS)
    seen: set[tuple[str, ...]] = set()
    for row in ROWS:
        grams = eight_grams(row["story"])
        assert not grams & seen
        seen |= grams


def test_examples_share_no_eight_words_with_the_corpus():
    texts = [text for row in read_rows("corpus") for text in row.values() if text]
    known = set().union(*map(eight_grams, texts))
    for row in ROWS:
        for key, text in row.items():
            assert not eight_grams(text) & known, (row["prompt"], key)


def test_the_teacher_is_asked_with_prompt_and_story():
    text = (ROOT / "prompts" / "outline_teacher.txt").read_text("utf-8")
    fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    assert fields == ["prompt", "story"]
