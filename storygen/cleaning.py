"""Half-tokenised Reddit text to plain English, and the reasons for dropping a row.

WritingPrompts (Fan et al. 2018) went through a Penn Treebank style tokeniser and, in its hub copies, halfway back. Cleaning
only touches white space, quotes and markup: no letter of the story itself is ever lost. What is removed is what the author
said *about* the story at its start or end (edit notes, thanks, plugs, links). Every function is idempotent and leaves text
that is already plain as it is.
"""

import html
import re
from bisect import bisect_left
from dataclasses import dataclass

from storygen.outlines import DECLINED, LEADING_REASONING, problem

# A pass can uncover work for another (an entity inside an entity, a note above a note). Real rows settle after one.
PASSES = 12

# A raw text with more characters than this per allowed word is too long whatever it holds: megabytes are not cleaned first.
MOST_CHARACTERS = 50

TAG = r"(?:WP|EU|CW|TT|IP|MP|RF|SP|PI|OT|FF|CC|CS|PM|PP|TH|NSF[WL]|NANO|META|MOD|MODPOST|SATCHAT)"
BRACKETED = rf"[\[({{]\s*{TAG}(?:\s*[/,|&+]\s*{TAG})*\s*[\])}}]"
# Possessive (`*+`): backtracking could only match the same text in other ways, and those double with every tag.
FRONT_TAGS = re.compile(rf"^(?:\s*+(?:{BRACKETED}|{TAG}\s*:)\s*+[:–—-]*+\s*+)++", re.IGNORECASE)
BACK_TAGS = re.compile(rf"(?:\s*+{BRACKETED})++\s*$", re.IGNORECASE)
META_TAGS = re.compile(r"[\[({]\s*(?:OT|CC|MOD|MODPOST|META|NANO|SATCHAT)\s*[\])}]", re.IGNORECASE)
META_PROMPT = re.compile(
    r"/?r/writing ?prompts|writingprompts|\bsub-?reddit\b|\b(?:call for |new )moderators\b|\bsatchat\b|\boff[- ]topic\b"
    r"|\bsunday free write\b|\bfeedback friday\b|\bprep week \d"
    r"|(?-i:\b[A-Z]{3,9} CONTEST\b)|\bcontest (?:entry|results|winners)\b"
    r"|\bwriting workshop\b|\breddit gold\b",
    re.IGNORECASE,
)
DELETED = re.compile(r"^\W*(?:deleted|removed)(?: by (?:user|moderator|reddit))?\W*$", re.IGNORECASE)
MODERATOR = (
    "off-topic discussion",
    "offtopic discussion",
    "reply here for non-story comments",
    "this action was performed automatically",
    "submission has been removed",
    "submission has been automatically removed",
    "post has been removed",
    "comment has been removed",
    "message the moderators",
    "contact the moderators",
)

# The words that make up 35 to 55% of English prose; those that other languages share are left out.
ENGLISH = frozenset(
    re.findall(
        r"\w+",
        """the of and to in is was it that he she his her you they with for had not as at be this have from but we my by were
        are there their what when who would been if or out up one
        so them into then could its your all do did just like how""",
    )
)

LINE_BREAK = re.compile(r"< ?(?:newline|br|/?p) ?/? ?>", re.IGNORECASE)
MARKUP_TAG = re.compile(r"< ?/? ?(?:i|b|u|em|strong|span|div|sup|sub|hr|blockquote)(?: ?/)? ?>", re.IGNORECASE)
ENTITY = re.compile(r"& ?(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]\w{1,30}) ?;")
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u2060\ufeff\ufffe\uffff\ud800-\udfff]")

URL = r"(?:https?: ?//|www\.)[^\s()\[\]]+(?:\? [\w%-]+=[^\s()\[\]]*(?: # [\w-]+)?)?"
MARKDOWN_LINK = re.compile(rf"\[ ?([^\[\]\n]*?) ?\] ?\( ?(?:{URL}|/r/[^\s()]*|# ?\w+)[^()\n]{{0,80}}\)")
BARE_URL = re.compile(rf"\(? ?{URL} ?\)?")
BREAK = re.compile(r"^[\s\\]*[-_=~#•*][\s\-_=~#•*\\]*$")
LINE_MARKUP = re.compile(r"^(?:#+ *|(?:> *)+|\^ *)(?=\S)", re.MULTILINE)
EMPHASIS = re.compile(r"(?<![\w*])\*+(?!\*)|(?<=\w)\*{1,2}(?![\w*])|\\(?=[*_#>~^\\])|~~|(?<!\^)\^+(?=[\w(])")
UNDERSCORES = re.compile(r"(?<![\w])_{1,2}(?=[^\W_])|(?<=[^\W_])_{1,2}(?!\w)")

CURLY_CONTRACTION = re.compile(r"(?<=\w) ?[’'] (s|t|re|ve|ll|d|m|am|all|clock)\b(?!['’])", re.IGNORECASE)
CURLY_ELISION = re.compile(r"’ ?(?=(?:em|cause|til|till|tis|twas|bout|round|n)\b)", re.IGNORECASE)
CONTRACTION = re.compile(r" (?<=[\w)\]\"] )(n't|'(?:s|re|ve|ll|d|m))(?![\w'])", re.IGNORECASE)
SPLIT_PAIRS = ("gon na", "wan na", "got ta", "gim me", "lem me", "can not", "'t is", "'t was", "'t were", "d' ye")
SPLIT_WORD = re.compile(
    r"\b(gon|wan) (na)\b|\b(got) (ta)\b|\b(gim|lem) (me)\b|\b(can) (not)\b(?! only)|(?<!\w)('t) (is|was|were)\b|\b(d') (ye)\b",
    re.IGNORECASE,
)
SPACED_STOP = re.compile(r"(?<=\S) +(?=[,;:!?.]+(?:[\s\"'’”)\]*]|$))", re.MULTILINE)
SPACED_DOTS = re.compile(r"\.(?: \.)+")
OPEN_BRACKET = re.compile(r"([(\[{]) +")
CLOSE_BRACKET = re.compile(r" +(?=[)\]}])")
UNIT = re.compile(r"([$£€#]) (?=\d)|(?<=\d) (%)")
PTB_QUOTE = re.compile(r"( *)(``|''+)( *)")
# Patterns that begin with a literal character are found several times faster than those that begin with a lookbehind.
SPACED_QUOTES = re.compile(r"\"(?<![^ \n]\") ([^\"\n]*[^\"\n ]) \"(?=[\s,.!?;:]|$)", re.MULTILINE)
SPACED_SINGLE = re.compile(r"(?<=\S) ' ")
GLUED_SINGLE = re.compile(
    r"(?:[,:;]|(?<=[a-z])[.!?](?='[A-Z][a-z])|(?<=[a-z])[a-z](?='[A-Z][a-z]*[ -][^\"\n]*[.!?,]'(?!\w)))(?='[A-Za-z])"
)

OPENING_SINGLE = re.compile(r"(?<!\w)'(?=\w)")
CLOSING_SINGLE = re.compile(r"(?<=[^\s'])'(?!\w)")
# GLUED_SINGLE matches only where this does too, and this takes a fiftieth of the time: it begins with a literal character.
GLUED_SINGLE_HINT = re.compile(r"'(?:(?<=[,:;.!?]')[A-Za-z]|(?<=[a-z]')[A-Z])")

EDIT_MARK = r"(?:ninja |minor |small |quick )?edit(?:ed|s)?\b"
# A paragraph about the story rather than of it, whatever else it holds.
NOTE = re.compile(
    rf"^\W*{EDIT_MARK}(?: ?(?:\d+|[&,]|and|\*+|[A-Z][a-z]+ \d+))* ?[*]*[:.!–—-]|^\W*{EDIT_MARK} (?:were|for|made|to add)\b"
    r"|^\W*made .{0,30}\bedits\b|^\W*(?:afterword|author'?s note|a/n|tl ?;? ?dr)\b"
    r"|(?:^|[\s(])/?[ru]/\w{3}|https?:|\bsub-?reddit\b"
    r"|\bwriting ?prompts?\b.{0,60}\b(?:first|usage|new|post)|\b(?:first|new|getting).{0,60}\bwriting ?prompts\b"
    r"|\bmy (?:website|webpage|blog|wattpad|patreon|inkitt)\b",
    re.IGNORECASE,
)
# The same in words a character might also use: applied only to short paragraphs without speech.
MILD_NOTE = re.compile(
    r"\bthank(?:s| you)\b.{0,25}\bfor (?:reading|the (?:gold|prompt|support))\b"
    r"|\bhope (?:that )?(?:you|y'all|everyone) (?:all )?"
    r"(?:lik|enjoy)\w* (?:it(?=[.!]|\W*$)|this|that|the story|what i|reading)"
    r"|\b(?:feedback|critiques?|critici[sz]m|cc)\b.{0,40}\b(?:welcome|(?:very |highly )?appreciated)\b"
    r"|\b(?:appreciate|welcome|love|like|give|free to|please)\b.{0,30}\b(?:feedback|critique|constructive critici[sz]m)\b"
    r"|\bfirst(?: ever)? (?:time (?:posting|writing|submitting|doing)|post\b|submission|story in english|attempt at)"
    r"|\b(?:sorry|pardon|excuse|apolog\w+)\b.{0,60}\b(?:formatting|typos?|grammar|spelling|mobile|phone|wrote)\b"
    r"|\b(?:formatting|mobile|typos?|grammar)\b.{0,40}\b(?:sorry|sucks?|apolog\w+)\b"
    r"|\b(?:great|this|the) prompt\b|\bwork in progress\b|\b(?:uploaded|posted|added) (?:a )?(?:part|third part)\b",
    re.IGNORECASE,
)
CONTINUED = re.compile(
    r"^\W*(?:to be )?cont(?:inued|inues|\.|d)?(?: (?:in|below|as)\b.{0,30})?\W*$"
    r"|^\W*part (?:\d+|two|three|ii+)\b.{0,20}\b(?:below|here|repl\w+|comments?|soon)\W*$"
    r"|^\W*(?:more to come|will (?:post|write|add) more)\b.{0,30}$",
    re.IGNORECASE,
)
ASIDE = re.compile(
    r"^[(\[{].*\b(?:writing|wrote|write|story|prompt|formatting|mobile|critici[sz]m|revise)\b.*[)\]}]$", re.IGNORECASE
)
INLINE_EDIT = re.compile(r"(?<=[.!?\"'*]) *\(?(?:EDIT|Edit|edit) ?\d* ?:[^\"\n]*$")

STRAIGHT = {"“": '"', "”": '"', "„": '"', "‟": '"', "‘": "'", "’": "'", "‛": "'", "…": "...", "\x85": "..."}


@dataclass(frozen=True)
class Bounds:
    """How long a row's texts may be, in words."""

    min_story: int = 50
    """Shortest story kept."""
    max_story: int = 2000
    """Longest story kept."""
    min_prompt: int = 3
    """Shortest prompt kept: one- and two-word titles come from picture prompts and say nothing without the picture."""
    max_prompt: int = 150
    """Longest prompt kept."""
    min_outline: int = 1
    """Shortest outline kept. A teacher's are held to bounds of their own, see storygen/outlines.py."""
    max_outline: int = 500
    """Longest outline kept."""


def clean_prompt(text: str) -> str:
    """A prompt as one line of plain English, without its `[ WP ]`-type tags."""
    for _ in range(PASSES):
        before = text
        text = BACK_TAGS.sub("", FRONT_TAGS.sub("", _plain(_characters(text)).replace("\n", " ")))
        text = BARE_URL.sub(" ", MARKDOWN_LINK.sub(r"\1", text)) if "/" in text else text
        text = _spaced(text)
        if text == before:
            break
    return text


def clean_story(text: str) -> str:
    """A story (or outline) as plain English: paragraphs on lines of their own, `***` for a scene break, no notes."""
    for _ in range(PASSES):
        before = text
        paragraphs = [BREAK.sub("***", line) for line in _characters(text).split("\n")]
        paragraphs[-1] = INLINE_EDIT.sub("", paragraphs[-1])
        # One paragraph always stays: a one-paragraph story may thank somebody too.
        while len(paragraphs) > 1 and _is_note(paragraphs[-1]):
            paragraphs.pop()
        while len(paragraphs) > 1 and _is_note(paragraphs[0]):
            paragraphs.pop(0)
        text = "\n".join(line for line, last in zip(paragraphs, ["***", *paragraphs]) if (line, last) != ("***", "***"))
        if "](" in text or "] (" in text or "http" in text or "www." in text:
            text = BARE_URL.sub(" ", MARKDOWN_LINK.sub(r"\1", text))
        text = _spaced(_plain(text))
        if text == before:
            break
    return text


def clean_row(row: dict, bounds: Bounds) -> tuple[dict | None, str | None]:
    """(row with cleaned texts, None), or (None, the reason it is dropped). `think` and `story` may be None."""
    prompt, think, story = row["prompt"], row["think"], row["story"]
    for text, empty in ((prompt, "empty_prompt"), (story, "empty_story")):
        if text is not None and not text.strip():
            return None, empty
        if text is not None and len(text) < 200 and DELETED.match(text):
            return None, "deleted"
    for text, most in ((prompt, bounds.max_prompt), (think, bounds.max_outline), (story, bounds.max_story)):
        if text is not None and len(text) > MOST_CHARACTERS * most:
            return None, "too_long"
    if META_TAGS.search(prompt[:40]) or META_PROMPT.search(prompt):
        return None, "off_topic"
    if story is not None:
        head = story[:1500].lower()
        if any(phrase in head for phrase in MODERATOR):
            return None, "moderator"
    prompt = clean_prompt(prompt)
    think = clean_story(LEADING_REASONING.sub(r"\1", think)) or None if think is not None else None
    if not prompt:
        return None, "empty_prompt"
    words = len(prompt.split())
    if not bounds.min_prompt <= words <= bounds.max_prompt:
        return None, "too_short" if words < bounds.min_prompt else "too_long"
    if think is not None:
        # Sentences of the story are a plan too, if a poor one; most of the story is none.
        rival = story if story and 2 * len(think.split()) > len(story.split()) else ""
        reason = problem(think, rival, bounds.min_outline, bounds.max_outline, DECLINED)
        if reason:
            return None, reason
    if story is not None:
        story = clean_story(story)
        if not story:
            return None, "empty_story"
        words = len(story.split())
        if not bounds.min_story <= words <= bounds.max_story:
            return None, "too_short" if words < bounds.min_story else "too_long"
    if not is_english(prompt if story is None else story) or _foreign_letters(prompt) > 0.2:
        return None, "not_english"
    return {"prompt": prompt, "think": think, "story": story}, None


def is_english(text: str) -> bool:
    """Whether `text` holds enough common English words; texts under 30 words are judged by their script alone."""
    if _foreign_letters(text) > 0.2:
        return False
    words = text.lower().split(maxsplit=400)[:400]
    return len(words) < 30 or sum(word in ENGLISH for word in words) >= 0.12 * len(words)


def _foreign_letters(text: str) -> float:
    if text.isascii():
        return 0.0
    letters = [c for c in text[:4000] if c.isalpha()]
    return sum(c > "\u024f" for c in letters) / len(letters) if letters else 0.0


def _characters(text: str) -> str:
    """Entities, line breaks, control characters and white space: one space between words, one newline between paragraphs."""
    while "&" in text:
        # An entity can hide another ("&amp;mdash;"); each step makes the text shorter.
        shorter = html.unescape(ENTITY.sub(lambda m: html.unescape(f"&{m[1]};") if f"{m[1]};" in _NAMED else m[0], text))
        if shorter == text:
            break
        text = shorter
    text = UNPRINTABLE.sub("", text.replace("\r", "\n"))
    if "<" in text:
        text = MARKUP_TAG.sub("", LINE_BREAK.sub("\n", text))
    return _spaced(text)


def _spaced(text: str) -> str:
    """One space between words, one newline between paragraphs."""
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))


class _Named:
    """Entity names that exist: `& nbsp ;` is one, `R & D;` is not."""

    def __contains__(self, name: str) -> bool:
        return name.startswith("#") or name in html.entities.html5


_NAMED = _Named()


def _plain(text: str) -> str:
    """Treebank tokens, markdown and typographic quotes to plain English."""
    if "’" in text or " ' " in text:
        text = CURLY_CONTRACTION.sub(r"'\1", text)
        text = CURLY_ELISION.sub("'", text)
    if not text.isascii():
        for left, right in (("“", "”"), ("‘", "’")):
            text = text.replace(left + " ", left).replace(" " + right, right)
        for curly, straight in STRAIGHT.items():
            text = text.replace(curly, straight)
    if any(mark in text for mark in "*_\\~^#>"):
        text = "\n".join(line if line == "***" else _unmarked(line) for line in text.split("\n"))
    if " n't" in text or " N'T" in text or " '" in text:
        text = CONTRACTION.sub(r"\1", text)
    lower = text.lower()
    if any(pair in lower for pair in SPLIT_PAIRS):
        text = "\n".join(_joined_pairs(line) for line in text.split("\n"))
    if any(f" {stop}" in text for stop in ",;:!?."):
        text = SPACED_STOP.sub("", SPACED_DOTS.sub(lambda m: m[0].replace(" ", ""), text))
    if any(bracket in text for bracket in ("( ", "[ ", "{ ", " )", " ]", " }")):
        text = CLOSE_BRACKET.sub("", OPEN_BRACKET.sub(r"\1", text))
    if "%" in text or "$" in text or "#" in text or not text.isascii():
        text = UNIT.sub(r"\1\2", text)
    if "``" in text or "''" in text:
        text = "\n".join(_straight_quotes(line) if "``" in line or "''" in line else line for line in text.split("\n"))
    text = SPACED_QUOTES.sub(r'"\1"', text)
    if (" ' " in text and SPACED_SINGLE.search(text)) or (GLUED_SINGLE_HINT.search(text) and GLUED_SINGLE.search(text)):
        text = "\n".join(_single_quotes(line) for line in text.split("\n"))
    return text


def _joined_pairs(line: str) -> str:
    """`gon na` to `gonna`. The pattern is slow, the check in front of it is not."""
    lower = line.lower()
    if any(pair in lower for pair in SPLIT_PAIRS):
        return SPLIT_WORD.sub(lambda m: "".join(filter(None, m.groups())), line)
    return line


def _unmarked(line: str) -> str:
    """A paragraph without markdown: headings, quote marks, emphasis, superscripts, escapes."""
    line = LINE_MARKUP.sub("", line)
    if any(mark in line for mark in "*\\~^"):
        line = EMPHASIS.sub("", line)
    if "_" in line:
        line = UNDERSCORES.sub("", line)
    return re.sub(r" \*+(?= |$)", "", line).strip()


def _straight_quotes(line: str) -> str:
    """Treebank quotes to `"`. The closing pair often stands in for the opening one, so sides are told by alternation."""
    is_open = False

    def quote(match: re.Match) -> str:
        nonlocal is_open
        before, mark, after = match.groups()
        left, right = line[: match.start()], line[match.end() :]
        extra = "'" * (len(mark) % 2) if mark[0] == "'" else ""
        if mark == "``":
            # Also typed as the closing pair: "I can go. `` He left". It closes if nothing else closes what is open.
            following = PTB_QUOTE.search(right)
            closes = (
                is_open
                and after
                and left[-1:] in ",.!?—-"
                and (right[:1].islower() or not following or following[2] == "``")
            )
            opening = bool(right) and not closes
        elif not is_open and left[-1:].isdigit() and not before:
            return f'{extra}"{after}'  # inches
        else:
            opening = bool(right) and (not is_open or (bool(before) and not after))
        is_open = opening
        if opening:
            return f'{before or (" " if left and left[-1] not in "([{-—" else "")}"{extra}'
        return f'{extra}"{after or (" " if right[:1].isalnum() else "")}'

    return PTB_QUOTE.sub(quote, line)


def _single_quotes(line: str) -> str:
    """`'x '` to `'x'`, and restores the space that detokenising took before an opening single quote."""
    line = GLUED_SINGLE.sub(r"\g<0> ", line)
    # An apostrophe after a letter is never an opening one.
    opening = [match.start() for match in OPENING_SINGLE.finditer(line)]
    closing = [match.start() for match in CLOSING_SINGLE.finditer(line)]

    def spaced(match: re.Match) -> str:
        here = match.start()
        opened = bisect_left(opening, here) > bisect_left(closing, here)
        return "' " if opened or line[here - 1] == "s" else " '"

    return SPACED_SINGLE.sub(spaced, line)


def _is_note(paragraph: str) -> bool:
    """Whether a first or last paragraph is about the story: an edit mark, thanks, a plug, a link, a scene break, nothing."""
    if not paragraph or paragraph == "***":
        return True
    if "/" in paragraph:
        link = MARKDOWN_LINK.search(paragraph)
        if link and len(MARKDOWN_LINK.sub("", paragraph).split()) <= 3 and not re.search("[\"“”]|``|''", link[1]):
            return True
        paragraph = MARKDOWN_LINK.sub(r"\1", paragraph)
    words = len(paragraph.split())
    paragraph = paragraph.replace("^", "")
    if words > 120:
        return False
    if NOTE.search(paragraph) or CONTINUED.match(paragraph):
        return True
    if words > 60 or re.search("[\"“”]|``|''", paragraph):
        return False
    return bool(MILD_NOTE.search(paragraph) or ASIDE.match(paragraph))
