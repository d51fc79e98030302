"""Reading, cleaning, dropping, splitting: what reaches the model is what the authors wrote, in plain English."""

import csv
import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storygen.cleaning import Bounds, clean_prompt, clean_row, clean_story
from storygen.cli import InputError
from storygen.corpus import Columns, load_manifest, load_prompts, load_sft, read_rows, split_of, spread
from storygen.duplicates import crossing_prompts, crossing_stories, story_sketch, text_key, words_of
from storygen.rowstore import RowStore

REAL = Path(__file__).parents[2] / "shared" / "data" / "writingprompts" / "train.jsonl"
real_rows = pytest.mark.skipif(not REAL.is_file(), reason=f"the real WritingPrompts rows ({REAL.name}) are not here")
LONG = "The old man walked down to the river and he looked at the water for a long time before he said a word. " * 4


def letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).casefold()


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("[ WP ] You die .\n", "You die."),
        ("[WP] You die.", "You die."),
        ("[ wp ] [ NSFW ] You die .", "You die."),
        ("( EU ) You die .", "You die."),
        ("[ WP/IP ] : You die .", "You die."),
        ("You die . [ WP ]", "You die."),
        ("[ WP ] `` Life.EXE has stopped working . ''", '"Life.EXE has stopped working."'),
        ("He says `` I 've got millions . What else ? ''", 'He says "I\'ve got millions. What else?"'),
        ("The sword 's owner ca n't , wo n't and does n't care", "The sword's owner can't, won't and doesn't care"),
        ("You 're gon na lose $ 5M ( or 20 % ) .", "You're gonna lose $5M (or 20%)."),
        (
            "'T was dark. They were n't were they ? What I don't is mine .",
            "'Twas dark. They weren't were they? What I don't is mine.",
        ),
        ("the `` save slot '' in your life", 'the "save slot" in your life'),
        ("A guy who doesn ’ t want to be president .", "A guy who doesn't want to be president."),
        ("punched '6666 ' into the others ' ritual", "punched '6666' into the others' ritual"),
        ("pass the time . . .", "pass the time..."),
        ("A dog [ not a cat ] walks in", "A dog [not a cat] walks in"),
    ],
)
def test_prompts_become_plain_english(raw, plain):
    assert clean_prompt(raw) == plain


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("`` Hello,'' she said. `` I do n't know.''", '"Hello," she said. "I don\'t know."'),
        ("Bob left . <newline> <newline> `` Hi , '' he said .", 'Bob left.\n"Hi," he said.'),
        ("One.<br>Two.<br />Three.", "One.\nTwo.\nThree."),
        ("He ran &mdash; fast &amp; far. & nbsp; \n \n & nbsp; Gone.", "He ran — fast & far.\nGone."),
        ("“ We ’ re going, ” he said. “ Child ’ s play. ”", '"We\'re going," he said. "Child\'s play."'),
        ("One. \n \n -- -- -- - \n \n Two. \n ***** \n Three.", "One.\n***\nTwo.\n***\nThree."),
        ("*Might as well,* he thought. It was **his** day. *Gone. *", "Might as well, he thought. It was his day. Gone."),
        ("Stop that, you f***ing idiot.", "Stop that, you f***ing idiot."),
        ("We went to [ the docks ] ( http: //a.com/watch? v=x ) together.", "We went to the docks together."),
        ("The fifth sentence. \n \n Edit: typo", "The fifth sentence."),
        ("The end of it. EDIT 2: thanks for the gold!", "The end of it."),
        ("The end of it. \n \n -- - \n \n /r/someonewrites", "The end of it."),
        ("The end of it. \n *** \n Thanks for reading! More on my blog.", "The end of it."),
        ("( First post here, feedback welcome! ) \n \n It rained.", "It rained."),
        ("`` I am king. `` He sat. `` Out, `` she said.", '"I am king." He sat. "Out," she said.'),
        ("He told him'Thank you! But no.' and left.", "He told him 'Thank you! But no.' and left."),
        ("then he turned,'' I'm sorry,'' he said. ''Well''", 'then he turned, "I\'m sorry," he said. "Well"'),
    ],
)
def test_stories_become_plain_english(raw, plain):
    assert clean_story(raw) == plain


@pytest.mark.parametrize(
    "story",
    [
        '"Thank you for reading to me," she said.',
        "The editor read the edit twice: it was bad.",
        "He wrote to the moderator of the debate. I hope you like it, said the note on the cake.",
        "The part of the king was played by a goat.",
    ],
)
def test_a_story_that_sounds_like_a_note_is_kept(story):
    assert clean_story(f"It began.\n{story}") == f"It began.\n{story}"


def test_the_embedded_corpus_is_plain_already():
    for row in read_rows("corpus"):
        assert clean_prompt(row["prompt"]) == row["prompt"]
        for text in filter(None, (row["think"], row["story"])):
            assert clean_story(text) == text
        assert clean_row(row, Bounds())[1] is None


PIECES = st.sampled_from(
    ["word", "Word", "don't", " n't", " 's", "'", "''", "```", "``", '"', "“", "”", "‘", "’", "(", ")", "[", "]", ".", ","]
    + ["...", "--", "-", "***", "*", "**", "_", "#", ">", "^", "~~", "\\", "&", "&amp;", "&amp;lt;br&gt;", "& nbsp;", "<br>"]
    + [" ", " ", " ", "<newline>", "\n", "\n\n", "\t", "\u00a0", "\x00", "\ud800", "edit:", "/r/abc", "http://a.b", "[ WP ]"]
    + [
        "(http://a.b)",
        "[WP]",
        "WP:",
        ":",
        "EDIT:",
        "wan na",
        "can not",
        "$ 5",
        " %",
        "Thanks for reading",
        "5",
        "é",
        "中",
        "😍",
    ]
)


@settings(max_examples=600, deadline=None)
@given(st.lists(PIECES, max_size=25).map("".join) | st.text(max_size=80))
def test_cleaning_twice_changes_nothing(text):
    for clean in (clean_prompt, clean_story):
        once = clean(text)
        assert clean(once) == once
        once.encode()
        assert "\x00" not in once


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["ab", "It", "he's", "cat.", "dog,", "(x)", "'y'", '"Hi"', "so—", "no-", "«q»"]), max_size=30
    ).map(" ".join)
)
def test_words_of_ordinary_prose_survive(text):
    assert letters(clean_story(text)) == letters(text)


# What the treebank's tokeniser splits off a word: do n't, gon na, got ta, gim me, can not.
REJOINED = [["n"], ["na"], ["ta"], ["me"], ["not"]]


@real_rows
def test_no_word_of_a_real_story_is_lost_split_or_merged():
    about_the_story = re.compile(
        r"/[ru]/|\br/\w|\bedit|reddit|feedback|critique|critici|reading|tl;? ?dr|prompt|first (time|post|story)|below|format"
        r"|continued|cont\b|apolog|sorry if|afterword|i write things",
        re.IGNORECASE,
    )
    whole = 0
    for row in read_rows(REAL):
        clean, _ = clean_row(row, Bounds())
        if clean is None or re.search(r"http|& ?\w+ ?;|dropcap", row["story"]):  # links and entities are removed on purpose
            continue
        raw, kept = (re.findall(r"[^\W_]+", text.casefold()) for text in (row["story"], clean["story"]))
        start = "".join(raw).find("".join(kept))
        assert start >= 0  # notes are removed at head and foot, and nothing in between
        begins, at = {sum(map(len, raw[:i])): i for i in range(len(raw))}, start
        for word in kept:
            first, at = begins[at], at + len(word)
            parts = raw[first : begins.get(at, len(raw))]
            assert "".join(parts) == word and (len(parts) == 1 or parts[1:] in REJOINED), parts
        paragraphs = [p for p in re.split(r"\s*\n\s*", row["story"]) if p]
        if not about_the_story.search(" ".join(paragraphs[:1] + paragraphs[-4:])):
            assert len("".join(kept)) == len("".join(raw))
            whole += 1
    assert whole > 300


@real_rows
def test_real_rows_end_up_without_treebank_leftovers():
    leftovers = re.compile(
        r"``|''| n't\b| '(?:s|re|ve|ll)\b| [,;:?!](?:\s|$)|\( | \)|<newline>|&\w+;|^\[ ?wp ?\]", re.IGNORECASE
    )
    found = Counter()
    for row in read_rows(REAL):
        clean, _ = clean_row(row, Bounds())
        if clean:
            found["rows"] += 1
            found["prompt"] += bool(leftovers.search(clean["prompt"]))
            found["story"] += bool(leftovers.search(clean["story"]))
    assert found["rows"] > 400 and found["prompt"] == 0 and found["story"] <= 5


@pytest.mark.parametrize(
    ("prompt", "story", "reason"),
    [
        ("  ", LONG, "empty_prompt"),
        ("[ WP ]", LONG, "empty_prompt"),
        ("You wake up late.", " \n ", "empty_story"),
        ("You wake up late.", "[deleted]", "deleted"),
        ("You wake up late.", "[ removed ]", "deleted"),
        ("[ OT ] What do you read when you are sad?", LONG, "off_topic"),
        ("[ Modpost ] Call for Moderators ! !", LONG, "off_topic"),
        ("You wake up late.", "**Off-Topic Discussion: ** Reply here for non-story comments. " + LONG, "moderator"),
        ("You wake up late.", "It rained. He left.", "too_short"),
        ("Rain.", LONG, "too_short"),
        ("You wake up late.", LONG * 30, "too_long"),
        ("You wake up " * 60, LONG, "too_long"),
        (
            "You wake up late.",
            "El viejo bajó al río y miró el agua durante mucho tiempo antes de hablar. " * 6,
            "not_english",
        ),
        ("老人走到河边 看着 水面", LONG, "not_english"),
        ("A pie contest is won by a ghost.", LONG, None),
        ("You wake up late.", LONG, None),
        ("You wake up late.", None, None),
    ],
)
def test_each_drop_has_its_reason(prompt, story, reason):
    assert clean_row({"prompt": prompt, "think": None, "story": story}, Bounds())[1] == reason


PLAN = "A ferryman rows the same silent passenger until he learns who she is."


@pytest.mark.parametrize(
    "outline, kept, reason",
    [
        (PLAN, PLAN, None),
        (f"<think>Let me see.\nA ferry?</think>\n{PLAN}", PLAN, None),
        (f"<think>\n{PLAN}\n</think>", f"<think>\n{PLAN}\n</think>", None),
        ("I can't sleep, so I row the ferry.", "I can't sleep, so I row the ferry.", None),
        (" ".join(LONG.split()[:20]), " ".join(LONG.split()[:20]), None),
        ("I'm sorry, but I can't help with that request.", None, "refusal"),
        (LONG, None, "outline_copies_story"),
        ("Plan. " * 501, None, "outline_too_long"),
    ],
)
def test_outlines_of_a_file_are_held_to_what_a_teachers_are(outline, kept, reason):
    row, why = clean_row({"prompt": "A ferryman rows at night.", "think": outline, "story": LONG}, Bounds())
    assert why == reason and (row and row["think"]) == kept


def write_jsonl(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [
    {"Prompt": f'Prompt {i}, quoted "so"\nand broken', "OUTLINE": f"plan {i}", "text": f"story {i} é\u2028"}
    for i in range(3)
]
WANTED = [{"prompt": r["Prompt"], "think": r["OUTLINE"], "story": r["text"]} for r in ROWS]


def test_every_format_reads_to_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", *ROWS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    with open(tmp_path / "d.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "Prompt", "other", "OUTLINE"], restval="-")
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert list(read_rows(path)) == WANTED, path.name
    assert list(read_rows(tmp_path)) == WANTED * 5


def test_the_pair_of_the_original_release(tmp_path):
    (tmp_path / "valid.wp_source").write_text("[ WP ] one\n[ WP ] two\n")
    (tmp_path / "valid.wp_target").write_text("first . <newline> line\nsecond\n")
    for name in ("valid", "valid.wp_source", "valid.wp_target", ""):
        rows = list(read_rows(tmp_path / name))
        assert [row["story"] for row in rows] == ["first . <newline> line", "second"], name
    (tmp_path / "valid.wp_target").write_text("first\n")
    with pytest.raises(InputError, match=r"valid\.wp_target"):
        list(read_rows(tmp_path))


def test_columns_can_be_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"q": "the prompt", "a": "the story"})
    assert list(read_rows(path, Columns(prompt="q", story="a"))) == [
        {"prompt": "the prompt", "think": None, "story": "the story"}
    ]
    with pytest.raises(InputError, match="q, a"):
        list(read_rows(path))
    with pytest.raises(InputError, match="'x'.*q, a"):
        list(read_rows(path, Columns(prompt="q", story="x")))


def test_values_of_a_wrong_type_are_counted_not_fatal(tmp_path):
    odd = [{"prompt": "ok", "story": value} for value in (None, 3, ["x"], {"a": 1}, True, 1.5)]
    path = write_jsonl(tmp_path / "a.jsonl", *odd, {"prompt": "a\ud800\x00b", "story": "fine"})
    dropped = Counter()
    rows = list(read_rows(path, dropped=dropped))
    assert len(rows) == 1 and dropped["wrong_type"] == len(odd)
    # A row without an outline is a row, however its format says so.
    path = write_jsonl(
        tmp_path / "b.jsonl", *({"prompt": "ok", "story": "fine", "plan": plan} for plan in (None, ["x"], "a b"))
    )
    assert [row["think"] for row in read_rows(path, dropped=dropped)] == [None, None, "a b"]
    clean, reason = clean_row({**rows[0], "prompt": rows[0]["prompt"] + " and c d", "story": LONG + "\ud800\x00"}, Bounds())
    assert reason is None and split_of(clean["prompt"]) and clean["prompt"] == "ab and c d"


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", b"", "a.jsonl: holds no rows"),
        ("a.csv", b"prompt,story\n", "a.csv: holds no rows"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n\n["x"]\n', "line 3: not a JSON object"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}\n', "line 2: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.csv", b"prompt,story\nx,\xff\n", "line 2: not UTF-8"),
        ("a.jsonl", b'{"title": "x", "body": "y"}\n', "line 1: no prompt column.*title, body"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 99, mtime=0)[:-9], "cannot be read"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
        ("a.docx", b"x", "unknown format"),
        ("a.wp_source", b"x\n", r"a\.wp_target.*missing"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else None,  # no test is named after 100,000 brackets
)
def test_files_that_cannot_be_read_say_where(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=where) as error:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_empty_folder(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            list(read_rows(path))


def test_keys_see_through_case_and_punctuation():
    assert text_key('"Stop!" he  said.') == text_key("stop, he said") != text_key("stop, she said")


def test_near_prompts_never_stand_on_both_sides():
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(3000)]
    prompts = [" ".join(rng.sample(vocabulary, rng.randint(3, 25))) for _ in range(600)]
    for prompt in prompts[:300]:
        words = prompt.split()
        kept = rng.sample(words, max(1, int(len(words) * rng.uniform(0.3, 1.0))))
        prompts.append(" ".join(kept + rng.sample(vocabulary, rng.randint(0, 4))))
    splits = [rng.choice(["train", "validation", "test"]) for _ in prompts]
    dropped = crossing_prompts(prompts, splits)

    def close(a: str, b: str) -> bool:
        one, two = set(a.split()), set(b.split())
        return len(one & two) >= 0.5 * len(one | two)

    rest = [i for i in range(len(prompts)) if i not in dropped]
    assert len(dropped) > 50
    assert not [(i, j) for i in rest for j in rest if i < j and splits[i] != splits[j] and close(prompts[i], prompts[j])]
    assert not [i for i in dropped if splits[i] == "test"]
    assert all(any(splits[j] != splits[i] and close(prompts[i], prompts[j]) for j in range(len(prompts))) for i in dropped)


def test_retellings_of_one_idea_are_found():
    prompts = [
        'You sold your soul to the Devil years ago. Today he returns it saying, "I need a favor."',
        'You sold your soul to the Devil some years ago, today he gives it back and says, "I need a favor".',
        "The lighthouse keeper's cat has begun to answer the telephone.",
    ]
    assert crossing_prompts(prompts, ["train", "test", "train"]) == {0}
    assert crossing_prompts(prompts, ["train", "train", "train"]) == set()


def test_a_reposted_story_is_found_and_others_are_not():
    rng = random.Random(1)
    stories = [" ".join(f"w{rng.randrange(500)}" for _ in range(300)) for _ in range(200)]
    reposted = stories[0].upper().replace("W1 ", "") + " The End"
    sketches = np.stack([story_sketch(words_of(s)) for s in [*stories, reposted, "too short"]])
    splits = ["train", *["test", "validation"] * 99, "train", "validation", "test"]
    assert crossing_stories(sketches, splits) == {0}
    # Of a short story most bins stay empty, which is nothing in common.
    short = [" ".join(f"w{rng.randrange(500)}" for _ in range(8)) for _ in range(60)]
    sketches = np.stack([story_sketch(words_of(s)) for s in [*short, short[0]]])
    assert crossing_stories(sketches, ["train"] + ["test", "validation"] * 30) == {0}


def test_the_store_counts_every_row(tmp_path):
    clocks = (f"The clock in hall number {i} has begun to tick backwards." for i in range(99))
    held_out = next(prompt for prompt in clocks if split_of(prompt) == "test")
    near = next(t for i in range(99) if split_of(t := held_out + "!" * i + " Today.") == "train")
    raw = [
        {"prompt": held_out, "think": None, "story": LONG},
        {"prompt": held_out.upper(), "think": None, "story": LONG.replace(",", "").lower()},
        {"prompt": near, "think": None, "story": LONG.replace("river", "sea").replace("he", "she")},
        {"prompt": "Rain on.", "think": None, "story": None},
        {
            "prompt": "A dog learns to read the newspaper aloud.",
            "think": "A plan.",
            "story": " ".join(f"bark{i} in the wind" for i in range(40)),
        },
    ]
    store = RowStore(tmp_path / "rows.parquet", Bounds())
    store.add(raw, "source")
    store.settle()
    counts = store.tallies["source"].as_dict()
    kept = [row for _, row in store.rows()]
    assert counts["read"] == len(raw) and sum(counts["kept"].values()) == len(kept) == 2
    assert counts["dropped"]["near_duplicate"] == {"train": 1} and counts["dropped"]["duplicate"]
    assert list(store.texts()) == [kept[0]["story"], kept[1]["story"], "A plan."]
    rows = store.write(tmp_path)
    assert sum(rows["sft"].values()) == 1 and sum(rows["prompts"].values()) == 2
    assert load_prompts(tmp_path, "test") == [held_out]
    sft = [row for split in ("train", "validation", "test") for row in load_sft(tmp_path, split)]
    assert [row["think"] for row in sft] == ["A plan."] and sft[0].keys() == {"prompt", "think", "story"}


def test_loaders_say_what_to_run(tmp_path):
    for call in (lambda p: load_manifest(p), lambda p: load_sft(p, "train"), lambda p: load_prompts(p, "train")):
        with pytest.raises(InputError, match=r"run `python data_prep.py --out"):
            call(tmp_path)
    for manifest in ("{}", '{"preset": "huge", "hashes": {}}', '{"preset": "demo"}', "[1]"):
        (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(InputError, match="again"):
            load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    pq.write_table(pa.table({"split": ["train"], "prompt": ["x"]}), tmp_path / "sft.parquet")
    (tmp_path / "prompts.parquet").write_bytes(b"torn")
    for call in (lambda p: load_manifest(p), lambda p: load_sft(p, "train"), lambda p: load_prompts(p, "train")):
        with pytest.raises(InputError, match="again"):
            call(tmp_path)


@given(st.integers(0, 300), st.integers(1, 300))
def test_rows_spread_over_a_file_at_equal_distances(total, n):
    rows = range(total)
    picked = spread(rows, n)
    assert len(picked) == min(n, total) and picked == sorted(set(picked))
    assert spread(rows, total) == list(rows)
    if picked:
        gaps = {after - before for before, after in zip(picked, picked[1:] + [total + picked[0]])}
        assert picked[0] == 0 and max(gaps) - min(gaps) <= 1, "gaps differ by a row at most"
