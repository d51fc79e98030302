"""The hack zoo: cheap ways to a high score, each as a pure function from an honest row to a hacked one.

A family takes a row {prompt, think, story, finished}, another row of the same corpus and a generator, and returns a new row.
`audit` in reward.py asks of each family how often the hack scores at least as much as the row it was made from.
"""

import random
import re
from collections.abc import Callable

from storygen.textstats import STOP_WORDS, words

Row = dict[str, object]
Hack = Callable[[Row, Row, random.Random], Row]
RARE = """
    zephyr quixotic obelisk vermilion palimpsest sarcophagus chrysalis labyrinthine gossamer halcyon mercurial obsidian
    phosphorescent sepulchral tessellated umbrage verdigris wyvern xylophone zeppelin aqueduct basilisk cormorant dirigible
    effervescent filigree gargoyle hieroglyph iridescent juggernaut kaleidoscope limestone mandolin nebula oubliette
    pterodactyl quagmire rhododendron scimitar trebuchet
"""
FILLER = "and then it was as it was and so he did it and she did it too and that was all there was to it but then again"
GENERIC = (
    "The story starts with a person in a place. Something happens that changes everything, and the person has to deal "
    "with it. There is a problem, and it gets worse. In the end the person learns something and things are different."
)


def sentences(text: str) -> list[str]:
    return [piece for piece in re.split(r"(?<=[.!?])[\"”’']?\s+", text) if piece.strip()]


def content(text: str) -> list[str]:
    return [word for word in words(text) if word not in STOP_WORDS]


def fill(pieces: list[str], length: int) -> str:
    """The pieces in turn, over and over, up to `length` words."""
    out: list[str] = []
    while len(out) < length:
        out += " ".join(pieces).split()
    return " ".join(out[:length])


def size(row: Row) -> int:
    return max(20, len(row["story"].split()))


def shuffled_words(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": " ".join(rng.sample(row["story"].split(), len(row["story"].split())))}


def shuffled_within_sentences(row: Row, other: Row, rng: random.Random) -> Row:
    mixed = [" ".join(rng.sample(line.split(), len(line.split()))) for line in sentences(row["story"])]
    return row | {"story": " ".join(mixed)}


def pasted_prompt(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": f"{row['prompt']} {other['story']}"}


def pasted_outline(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": f"{row['think']} {other['story']}"}


def outline_as_story(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": row["think"]}


def outline_over_and_over(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": fill([row["think"]], size(row))}


def story_as_outline(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"think": row["story"]}


def prompt_as_outline(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"think": row["prompt"]}


def prompt_eight_times(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": " ".join([row["prompt"]] * 8)}


def keyword_salad(row: Row, other: Row, rng: random.Random) -> Row:
    pool = content(row["think"]) + content(row["prompt"])
    return row | {"story": " ".join(rng.choice(pool) for _ in range(size(row)))}


def salad_with_stop_words(row: Row, other: Row, rng: random.Random) -> Row:
    pool = content(row["think"]) + content(row["prompt"])
    little = [word for word in words(other["story"]) if word in STOP_WORDS]
    return row | {"story": " ".join(rng.choice(pool if rng.random() < 0.42 else little) for _ in range(size(row)))}


def outline_words_then_other(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": f"{', '.join(content(row['think']))}. {other['story']}"}


def keyword_outline(row: Row, other: Row, rng: random.Random) -> Row:
    listed = list(dict.fromkeys(content(row["prompt"]) + content(row["think"])))
    return row | {"think": ", ".join(listed)}


def repeated_sentence(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": fill([max(sentences(row["story"]), key=len)], size(row))}


def repeated_opening(row: Row, other: Row, rng: random.Random) -> Row:
    opening = " ".join(row["story"].split()[: max(10, size(row) // 3)])
    return row | {"story": fill([opening], size(row))}


def varied_loop(row: Row, other: Row, rng: random.Random) -> Row:
    """One sentence over and over, every second word drawn anew, so that hardly any word pair comes twice."""
    frame = max(sentences(row["story"]), key=len).split()
    pool = content(row["story"]) or frame
    lines = [" ".join(word if i % 2 else rng.choice(pool) for i, word in enumerate(frame)) for _ in range(size(row))]
    return row | {"story": fill(lines, size(row))}


def rare_gibberish(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": " ".join(rng.choice(RARE.split()) for _ in range(size(row)))}


def all_dialogue(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {
        "story": "\n".join(f'"{line}"' for line in re.sub(r'["“”]', "", row["story"]).splitlines() if line.strip())
    }


def script(row: Row, other: Row, rng: random.Random) -> Row:
    lines = sentences(re.sub(r'["“”]', "", row["story"]).replace("\n", " "))
    return row | {"story": "\n".join(f"{('Anna', 'Ben')[i % 2]}: {line}" for i, line in enumerate(lines))}


def stop_word_filler(row: Row, other: Row, rng: random.Random) -> Row:
    half = row["story"].split()[: size(row) // 2]
    return row | {"story": " ".join(half) + " " + fill([FILLER], size(row) // 2)}


def two_story_tags(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": f"{row['story']}\n<story>\n{other['story']}"}


def no_eos(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"finished": False}


def empty_think(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"think": " "}


def empty_story(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": "\n"}


def generic_outline(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"think": GENERIC}


def one_word_outline(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"think": rng.choice(content(row["prompt"]) or ["story"])}


def other_story(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": other["story"]}


def other_outline_and_story(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"think": other["think"], "story": other["story"]}


def truncated(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": " ".join(row["story"].split()[: max(1, size(row) // 3)])}


FAMILIES: dict[str, Hack] = {
    hack.__name__: hack
    for hack in (
        shuffled_words, shuffled_within_sentences, pasted_prompt, pasted_outline, outline_as_story, outline_over_and_over,
        story_as_outline, prompt_as_outline, prompt_eight_times, keyword_salad, salad_with_stop_words,
        outline_words_then_other, keyword_outline, repeated_sentence, repeated_opening, varied_loop, rare_gibberish,
        all_dialogue, script, stop_word_filler, two_story_tags, no_eos, empty_think, empty_story, generic_outline,
        one_word_outline, other_story, other_outline_and_story, truncated,
    )
}  # fmt: skip


def hack(family: str, rows: list[Row], i: int, seed: int = 0) -> Row:
    """Row i hacked by one family; the generator depends on seed, family and i only. Needs two rows."""
    rng = random.Random(f"{seed}/{family}/{i}")
    other = rows[(i + rng.randrange(1, len(rows))) % len(rows)]
    return FAMILIES[family](rows[i], other, rng)
