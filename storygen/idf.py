"""Inverse document frequencies over an encoder's tokens: streaming, whole texts, bounded memory."""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from storygen.bertscore import backend, fingerprint
from storygen.cli import InputError
from storygen.workers import Item, Result, batches

BATCH = 4096  # texts
GROUP = 512  # pieces encoded as one text
ROWS = 128  # texts whose tokens are marked in one table: it stays in the CPU's cache, and counts fit a byte
MOST_PIECES = 500_000  # pieces whose ids are remembered: 0.2 GB


@dataclass(frozen=True)
class Idf:
    """A table of token weights.

    weights: (vocab,) fp32, ln((N + 1) / (df + 1)), ln(N + 1) for tokens never seen, 0 for special tokens.
    df: (vocab,) int64, documents that hold the token. documents: N. fingerprint: of the tokenizer it was counted with.
    """

    weights: np.ndarray
    df: np.ndarray
    documents: int
    fingerprint: str

    def capped(self, percentile: float) -> np.ndarray:
        """The weights, capped at the given percentile (0 to 100) of the idf over all (document, token) incidences.

        Over incidences rather than the vocabulary: in a small corpus most of the vocabulary was never seen, and a
        percentile of the table would be its own maximum.
        """
        order = np.argsort(self.weights)
        reached = np.cumsum(np.where(self.weights[order] > 0, self.df[order], 0))
        if reached[-1] == 0:
            return self.weights
        ceiling = self.weights[order][np.searchsorted(reached, reached[-1] * percentile / 100)]
        return np.minimum(self.weights, ceiling)

    def save(self, path: Path | str) -> None:
        """Write an npz without pickled objects."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file, weights=self.weights, df=self.df, documents=self.documents, fingerprint=np.array(self.fingerprint)
            )

    @staticmethod
    def load(path: Path | str, tokenizer) -> "Idf":
        """Read a table; InputError if the file is missing, damaged, or was counted with another tokenizer."""
        try:
            with np.load(path, allow_pickle=False) as file:
                idf = Idf(file["weights"], file["df"], int(file["documents"]), str(file["fingerprint"]))
        except FileNotFoundError:
            raise InputError(f"{path} is missing: run data_prep.py first") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            raise InputError(f"{path} is not an idf table or is damaged: run data_prep.py again") from None
        if idf.fingerprint != fingerprint(tokenizer):
            raise InputError(f"{path} was counted with another tokenizer than the encoder's: run data_prep.py again")
        return idf


def build_idf(tokenizer, texts: Iterable[str], progress_total: int | None = None) -> Idf:
    """Count document frequencies over `texts`, read once, two batches in memory, no text cut at the encoder's window.

    tokenizer: a fast Hugging Face tokenizer. progress_total: number of texts, to show a progress bar.
    """
    from tqdm import tqdm

    tokens = backend(tokenizer)
    vocabulary = max(tokens.get_vocab().values()) + 1
    mark = mark_of(tokens)
    groups = batches(texts, BATCH)
    if mark:
        pieces = Pieces(tokens, vocabulary, mark)
        counts = ((len(group), pieces.count(group, cut)) for group, cut in one_ahead(cut_at_blanks, groups))
    else:
        counts = ((len(group), count_whole(tokens, vocabulary, group)) for group in groups)
    df = np.zeros(vocabulary, dtype=np.int64)
    documents = 0
    with tqdm(total=progress_total, desc="idf", unit=" texts", disable=progress_total is None) as bar:
        for count, held in counts:
            df += held
            documents += count
            bar.update(count)
    weights = np.log((documents + 1) / (df + 1)).astype(np.float32)
    weights[tokenizer.all_special_ids] = 0.0
    return Idf(weights, df, documents, fingerprint(tokenizer))


def one_ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield every item with `work(item)`, while a thread works on the next one."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            following = item, thread.submit(work, item)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()


def cut_at_blanks(texts: list[str]) -> tuple[pa.DictionaryArray, np.ndarray]:
    """The pieces of all texts, one after the other, and the (texts + 1,) offsets where each text's begin and end.

    Arrow needs half the time of `split` and a `dict`, and not the GIL. Not cut at all white space: some of what Python
    takes for white space are control characters to BERT, which joins around them.
    """
    cut = pc.split_pattern(pc.replace_substring(pa.array(texts, pa.large_string()), "\n", " "), " ")
    return cut.values.dictionary_encode(), cut.offsets.to_numpy()


def count_whole(tokens: Tokenizer, vocabulary: int, texts: list[str]) -> np.ndarray:
    """(vocab,): how many of `texts` hold each token."""
    coded = tokens.encode_batch_fast(texts, add_special_tokens=False)
    return np.bincount(np.concatenate([np.unique(np.array(one.ids, dtype=np.int64)) for one in coded]), minlength=vocabulary)


def mark_of(tokens: Tokenizer) -> str | None:
    """A special token that may stand between pieces, if a text's ids are those of its blank-separated pieces, one after
    the other: with BERT's own tokenizers. None with all others."""
    parts = json.loads(tokens.to_str())
    normalizer, pre_tokenizer = parts["normalizer"] or {}, parts["pre_tokenizer"] or {}
    if normalizer.get("type") != "BertNormalizer" or pre_tokenizer.get("type") != "BertPreTokenizer":
        return None
    return next((one["content"] for one in parts["added_tokens"] if one["special"] and not one["normalized"]), None)


class Pieces(dict[str, int]):
    """Counts tokens like `count_whole`, but encodes each distinct blank-separated piece once: prose has few of them.

    Maps a piece to its number; the ids of piece n are `ids[starts[n] : starts[n + 1]]`.
    """

    def __init__(self, tokens: Tokenizer, vocabulary: int, mark: str):
        self.tokens, self.vocabulary, self.mark = tokens, vocabulary, mark
        self.forget()

    def forget(self) -> None:
        self.clear()
        self.fresh: list[str] = []
        self.ids, self.starts = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)

    def __missing__(self, piece: str) -> int:
        self[piece] = number = len(self)
        self.fresh.append(piece)
        return number

    def count(self, texts: list[str], cut: tuple[pa.DictionaryArray, np.ndarray]) -> np.ndarray:
        """As `count_whole`; cut: `cut_at_blanks` of the texts."""
        marked = [text for text in texts if self.mark in text]
        if marked:
            rest = [text for text in texts if self.mark not in text]
            held = count_whole(self.tokens, self.vocabulary, marked)
            return held + self.count(rest, cut_at_blanks(rest)) if rest else held
        if len(self) > MOST_PIECES:
            self.forget()
        pieces, ends = cut
        numbers = np.fromiter(map(self.__getitem__, pieces.dictionary.to_pylist()), dtype=np.int64)[
            pieces.indices.to_numpy()
        ]
        self.encode_fresh()
        first, sizes, held = self.starts[:-1], np.diff(self.starts), np.zeros(self.vocabulary, dtype=np.int64)
        for start in range(0, len(texts), ROWS):
            bounds = ends[start : start + ROWS + 1]
            own = numbers[bounds[0] : bounds[-1]]
            size = sizes[own]
            text_of = np.repeat(np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)), size)
            # Where its ids are: those of a piece are contiguous.
            place = np.arange(len(text_of)) + np.repeat(first[own] - np.cumsum(size) + size, size)
            seen = np.zeros((len(bounds) - 1, self.vocabulary), dtype=np.uint8)
            seen[text_of, self.ids[place]] = 1
            held += seen.sum(axis=0, dtype=np.uint8)
        return held

    def encode_fresh(self) -> None:
        """Encode many pieces in one call, a mark after each: a separate call costs more than encoding a piece."""
        texts = ["".join(f"{piece} {self.mark} " for piece in group) for group in batches(self.fresh, GROUP)]
        coded = self.tokens.encode_batch_fast(texts, add_special_tokens=False)
        ids = np.array(list(chain.from_iterable(one.ids for one in coded)), dtype=np.int64)
        marks = np.flatnonzero(ids == self.tokens.token_to_id(self.mark))
        ends = marks - np.arange(len(marks))  # counted among the ids that are not marks
        self.starts = np.concatenate([self.starts, self.starts[-1] + ends])
        self.ids = np.concatenate([self.ids, np.delete(ids, marks)])
        self.fresh = []
