"""What can be said about a text by counting its words: the measures that calibration and reward share.

A word is a run of letters and digits, with apostrophes inside it, in lower case and without accents. What an uncased encoder
does not see (accents, invisible characters) or reads through (hyphens) must not hide a word here either. A share is a number
in [0, 1].
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
TOKEN = re.compile(WORD.pattern + r"|[.!?…]+|[,;:–—]")
# Combining accents, and characters without width: soft hyphen, zero-width spaces and joiners, direction marks.
UNSEEN = re.compile("[\u0300-\u036f\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
# Speech: double quotes to their partner or the line's end (a paragraph is a line here); single ones only where closed
# after punctuation, because an apostrophe is the same character.
SPEECH = re.compile(r'“[^”\n]*|«[^»\n]*|"[^"\n]*"?|(?<!\w)[\'‘](?=\w)[^\n]{0,1000}?[.,!?…—-][\'’](?!\w)')
SCRIPT = re.compile(r"^[ \t]*[A-Z][\w.'’-]*(?: [A-Z][\w.'’-]*){0,2}(?: \([^)\n]*\))?:[ \t]+\S.*$", re.MULTILINE)

PRIOR = 5.0

DENSE_WINDOW = 25

FUNCTION_WORDS = """
    a about above across after again against all almost along already also although always am among an and another any
    anyone anything are around as at away back be became because become been before behind being below beneath beside
    between beyond both but by came can can't cannot come could couldn't did didn't do does doesn't doing don't done
    down during each either else enough even ever every everyone everything few first for from get go going gone got had
    hadn't has hasn't have haven't having he he'd he'll he's her here hers herself him himself his how however i i'd
    i'll i'm i've if in inside into is isn't it it'd it'll it's its itself just last least less let let's like made make
    many may maybe me might mine more most much must mustn't my myself near nearly neither never next no nobody none nor
    not nothing now of off often on once one only onto or other others our ours ourselves out outside over own perhaps
    put quite rather same shall she she'd she'll she's should shouldn't since so some someone something sometimes
    somewhere soon still such than that that's the their theirs them themselves then there there's these they they'd
    they'll they're they've this those though three through till to together too toward towards two under until up upon
    us very was wasn't we we'd we'll we're we've well went were weren't what what's whatever when where whether which
    while who who's whole whom whose why will with within without won't would wouldn't yet you you'd you'll you're
    you've your yours yourself
"""
STOP_WORDS = frozenset(FUNCTION_WORDS.split())


def seen(text: str) -> str:
    """A text in lower case, without accents and invisible characters, curly apostrophes straightened."""
    if not text.isascii():
        text = UNSEEN.sub("", unicodedata.normalize("NFD", text)).replace("’", "'")
    return text.lower()


def words(text: str) -> list[str]:
    """The words of a text as `seen`."""
    return WORD.findall(seen(text))


def ngrams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(text[i:] for i in range(n)), strict=False))


def repeated_share(text: Sequence[str], n: int) -> float:
    """1 - distinct / total over the word n-grams of a text; 0 where it has none."""
    grams = ngrams(text, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def copied_share(text: Sequence[str], sources: Iterable[Sequence[str]], n: int = 4) -> float:
    """Share of the word n-grams of a text that occur in any of the sources; 0 where it has none."""
    grams = ngrams(text, n)
    known = {gram for source in sources for gram in ngrams(source, n)}
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def dialogue_share(text: str) -> float:
    """Share of the words that stand inside quotation marks or in script lines (`Name: …`).

    Straight and curly quotes and guillemets; one left open counts to the end of its line. Single quotes count where the
    closing one follows punctuation ('Come in,' she said), so that apostrophes do not open speech.
    """
    total = len(words(text))
    spoken = sum(len(words(line)) for line in SCRIPT.findall(text))
    spoken += sum(len(words(quote)) for quote in SPEECH.findall(SCRIPT.sub("", text)))
    return spoken / total if total else 0.0


def mattr(text: Sequence[str], window: int = 50) -> float:
    """Moving-average type-token ratio (Covington & McFall 2010); the plain ratio below one window; 0 for an empty text."""
    if not text:
        return 0.0
    span = min(window, len(text))
    counts = Counter(text[:span])
    distinct = len(counts)
    for leaving, entering in zip(text, text[span:], strict=False):
        counts[leaving] -= 1
        if not counts[leaving]:
            del counts[leaving]
        counts[entering] += 1
        distinct += len(counts)
    return distinct / (span * (len(text) - span + 1))


def stop_share(text: Sequence[str]) -> float:
    """Share of the words that are function words."""
    return sum(word in STOP_WORDS for word in text) / len(text) if text else 0.0


def borrowed_share(text: Sequence[str], source: Sequence[str]) -> float:
    """Share of the words of a text that are content words of `source`."""
    content = set(source) - STOP_WORDS
    return sum(word in content for word in text) / len(text) if text else 0.0


def densest_share(text: Sequence[str], source: Sequence[str], window: int = DENSE_WINDOW) -> float:
    """Largest share, over all runs of `window` words, of content words of `source`: a list of them stands out in any text.

    A text shorter than the window counts as if padded with other words.
    """
    content = set(source) - STOP_WORDS
    hits = [word in content for word in text]
    inside = best = sum(hits[:window])
    for leaving, entering in zip(hits, hits[window:], strict=False):
        inside += entering - leaving
        best = max(best, inside)
    return best / window


def is_ended(text: str) -> bool:
    """Whether a text stops at the end of a sentence, closing quotes and brackets aside."""
    return text.rstrip().rstrip(" \"'”’»)*_").endswith((".", "!", "?", "…", "—", "–", "-"))


def skeleton(text: str) -> list[str]:
    """A text with only its grammar left: function words and punctuation as they are, every other word as its ending."""
    return ["."] + [shape(token) for token in TOKEN.findall(seen(text))]


@lru_cache(1 << 16)
def shape(token: str) -> str:
    if token in STOP_WORDS:
        return token
    if not token[0].isalnum():
        return "." if token[0] in ".!?…" else ","
    return next((f"-{end}" for end in ("'s", "ing", "ed", "ly", "s") if token.endswith(end)), "*")


@dataclass(frozen=True)
class WordOrder:
    """How human a text's word order is, from counts of adjacent pairs in skeletons of human text.

    pairs: {"a b": count} of adjacent skeleton tokens.
    """

    pairs: dict[str, int]

    @staticmethod
    def count(texts: Iterable[str]) -> "WordOrder":
        pairs: Counter[str] = Counter()
        for text in texts:
            line = skeleton(text)
            pairs.update(f"{a} {b}" for a, b in pairwise(line))
        return WordOrder(dict(sorted(pairs.items())))

    def __post_init__(self):
        first, second = Counter(), Counter()
        for pair, count in self.pairs.items():
            a, b = pair.split(" ")
            first[a] += count
            second[b] += count
        object.__setattr__(self, "_first", first)
        object.__setattr__(self, "_second", second)
        object.__setattr__(self, "_total", sum(second.values()))

    def score(self, text: str) -> float:
        """Mean over adjacent pairs of ln p(b|a) / p(b), in nats: about 0 or less for words in a random order.

        p(b|a) is smoothed towards p(b) with PRIOR pseudo-occurrences of a. A text without a pair scores 0.
        """
        line = skeleton(text)
        gains = [self._gain(a, b) for a, b in pairwise(line)]
        return sum(gains) / len(gains) if gains else 0.0

    def _gain(self, a: str, b: str) -> float:
        alone = (self._second[b] + 1) / (self._total + 1)
        after = (self.pairs.get(f"{a} {b}", 0) + PRIOR * alone) / (self._first[a] + PRIOR)
        return math.log(after / alone)
