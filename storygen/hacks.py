"""The hack zoo: cheap ways to a high score, each as a pure function from an honest row to a hacked one.

A family takes a row {prompt, think, story, finished}, another row of the same corpus and a generator, and returns a new row.
`audit` in reward.py measures for each family how often the hack scores higher than the row it was made from.
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
    """The pieces repeated in turn, up to `length` words."""
    out: list[str] = []
    while len(out) < length:
        out += " ".join(pieces).split()
    return " ".join(out[:length])


def size(row: Row) -> int:
    return max(20, len(row["story"].split()))


def first_third(row: Row) -> str:
    return " ".join(row["story"].split()[: max(1, size(row) // 3)])


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
    pool = content(row["think"]) + content(row["prompt"]) or ["it"]
    return row | {"story": " ".join(rng.choice(pool) for _ in range(size(row)))}


def salad_with_stop_words(row: Row, other: Row, rng: random.Random) -> Row:
    pool = content(row["think"]) + content(row["prompt"]) or ["it"]
    little = [word for word in words(other["story"]) if word in STOP_WORDS] or ["the"]
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
    """One sentence repeated with every second word redrawn, so that hardly any word pair occurs twice."""
    frame = max(sentences(row["story"]), key=len).split()
    pool = content(row["story"]) or frame
    lines = [
        " ".join(word if i % 2 else rng.choice(pool) for i, word in enumerate(frame))
        for _ in range(size(row) // len(frame) + 1)
    ]
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
    return row | {"story": first_third(row)}


def strewn_outline_words(row: Row, other: Row, rng: random.Random) -> Row:
    """A word of the outline thrown in for every ten words of the story."""
    text, pool = row["story"].split(" "), content(row["think"]) or ["it"]
    for _ in range(max(2, size(row) // 10)):
        text.insert(rng.randrange(len(text) + 1), rng.choice(pool))
    return row | {"story": " ".join(text)}


def strewn_outline_runs(row: Row, other: Row, rng: random.Random) -> Row:
    """Runs of three outline words thrown in, one for every twenty words: too short for a copied 4-gram."""
    text, plan = row["story"].split(" "), row["think"].split()
    for _ in range(max(2, size(row) // 20)):
        start = rng.randrange(max(1, len(plan) - 2))
        text.insert(rng.randrange(len(text) + 1), " ".join(plan[start : start + 3]))
    return row | {"story": " ".join(text)}


def outline_with_fillers(row: Row, other: Row, rng: random.Random) -> Row:
    """The outline with a filler after every third word, so that no 4-gram is copied, then another story."""
    plan = [word + (" really" if i % 3 == 2 else "") for i, word in enumerate(row["think"].split())]
    return row | {"story": f"{' '.join(plan)} {other['story']}"}


def outline_sentences_strewn(row: Row, other: Row, rng: random.Random) -> Row:
    """Another story with the outline's sentences between its own."""
    lines = sentences(other["story"])
    for line in sentences(row["think"]):
        lines.insert(rng.randrange(len(lines) + 1), line)
    return row | {"story": " ".join(lines)}


def outline_after_story(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": f"{row['story']} {row['think']}"}


def invisible_copy(row: Row, other: Row, rng: random.Random) -> Row:
    """The outline with an invisible space in every word, which encoders drop but word counts see."""
    copied = " ".join(word[:1] + "\u200b" + word[1:] for word in row["think"].split())
    return row | {"story": f"{copied} {other['story']}"}


def accented_copy(row: Row, other: Row, rng: random.Random) -> Row:
    """The outline with an accent in every word, which an uncased encoder drops."""
    copied = " ".join(re.sub("[aeiou]", lambda m: m[0] + "\u0301", word, count=1) for word in row["think"].split())
    return row | {"story": f"{copied} {other['story']}"}


def hyphenated_copy(row: Row, other: Row, rng: random.Random) -> Row:
    """The outline with hyphens for spaces: few words to count, the same pieces to the encoder."""
    return row | {"story": f"{'-'.join(row['think'].split())} {other['story']}"}


def story_twice(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": f"{row['story']}\n{row['story']}"}


def sentences_doubled(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": " ".join(f"{line} {line}" for line in sentences(row["story"]))}


def third_then_other(row: Row, other: Row, rng: random.Random) -> Row:
    """A third of the story, then another one: padding that is good English."""
    return row | {"story": f"{first_third(row)}. {other['story']}"}


def third_then_stock(row: Row, other: Row, rng: random.Random) -> Row:
    """A third of the story, then stock sentences that would fit any."""
    lines = rng.sample(STOCK, len(STOCK))
    return row | {"story": f"{first_third(row)}. {fill(lines, 2 * size(row) // 3)}."}


def truncated_and_closed(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"story": f"{first_third(row)}."}


def prompt_between_sentences(row: Row, other: Row, rng: random.Random) -> Row:
    lines = sentences(row["story"])
    for _ in range(3):
        lines.insert(rng.randrange(len(lines) + 1), row["prompt"])
    return row | {"story": " ".join(lines)}


def opening_as_outline(row: Row, other: Row, rng: random.Random) -> Row:
    return row | {"think": " ".join(row["story"].split()[: len(row["think"].split())])}


def story_words_in_outline(row: Row, other: Row, rng: random.Random) -> Row:
    """A plan that names what the story says anyway: for every two of its words one of the story's, thrown in."""
    plan, pool = row["think"].split(" "), content(row["story"]) or ["it"]
    for _ in range(len(plan) // 2):
        plan.insert(rng.randrange(len(plan) + 1), rng.choice(pool))
    return row | {"think": " ".join(plan)}


def other_story_recast(row: Row, other: Row, rng: random.Random) -> Row:
    """Another story in which every fourth content word is one of this outline's."""
    pool = content(row["think"]) or ["it"]

    def recast(found: re.Match) -> str:
        return rng.choice(pool) if found[0].lower() not in STOP_WORDS and rng.random() < 0.25 else found[0]

    return row | {"story": re.sub(r"[A-Za-z]+", recast, other["story"])}


STOCK = (
    "Nobody said anything for a while.", "The morning was cold and grey.", "There was nothing else to be done.",
    "She looked out of the window and waited.", "He did not know what to say to that.", "It had been a long day.",
    "They walked on without a word.", "Somewhere a door opened and closed again.", "The light was already going.",
    "It was not what anyone had expected.", "He thought about it all the way home.", "The old clock struck the hour.",
    "She smiled, but she did not answer.", "For the first time in years he felt at ease.", "Then the rain began.",
    "In the end it hardly mattered.", "The others had gone to bed.", "He put on his coat and left the house.",
)  # fmt: skip

FAMILIES: dict[str, Hack] = {
    hack.__name__: hack
    for hack in (
        shuffled_words, shuffled_within_sentences, pasted_prompt, pasted_outline, outline_as_story, outline_over_and_over,
        story_as_outline, prompt_as_outline, prompt_eight_times, keyword_salad, salad_with_stop_words,
        outline_words_then_other, keyword_outline, repeated_sentence, repeated_opening, varied_loop, rare_gibberish,
        all_dialogue, script, stop_word_filler, two_story_tags, no_eos, empty_think, empty_story, generic_outline,
        one_word_outline, other_story, other_outline_and_story, truncated, strewn_outline_words, strewn_outline_runs,
        outline_with_fillers, outline_sentences_strewn, outline_after_story, invisible_copy, accented_copy, hyphenated_copy,
        story_twice, sentences_doubled, third_then_other, third_then_stock, truncated_and_closed, prompt_between_sentences,
        opening_as_outline, story_words_in_outline, other_story_recast,
    )
}  # fmt: skip


def hack(family: str, rows: list[Row], i: int, seed: int = 0) -> Row:
    """Row i hacked by one family; the generator depends only on seed, family and i. Needs two rows."""
    rng = random.Random(f"{seed}/{family}/{i}")
    other = rows[(i + rng.randrange(1, len(rows))) % len(rows)]
    return FAMILIES[family](rows[i], other, rng)
