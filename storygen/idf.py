"""Inverse document frequencies over an encoder's tokens: streaming, whole texts, bounded memory."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from storygen.bertscore import backend, fingerprint
from storygen.cli import InputError

BATCH = 512


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
        """The weights, none above the given percentile (0 to 100) of the idf over all (document, token) incidences.

        Over incidences and not over the vocabulary: in a small corpus most of the vocabulary was never seen and a
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
        """Read a table; InputError where the file is missing, torn, or was counted with another tokenizer."""
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
    """Count document frequencies over `texts`, read once, one batch in memory, no text cut at the encoder's window.

    tokenizer: a fast Hugging Face tokenizer. progress_total: number of texts, to show a progress bar.
    """
    from tqdm import tqdm

    tokens = backend(tokenizer)
    df = np.zeros(max(tokens.get_vocab().values()) + 1, dtype=np.int64)
    documents = 0
    with tqdm(total=progress_total, desc="idf", unit=" texts", disable=progress_total is None) as bar:
        for batch in batches(texts):
            seen = [
                np.unique(np.array(coded.ids, dtype=np.int64))
                for coded in tokens.encode_batch_fast(batch, add_special_tokens=False)
            ]
            df += np.bincount(np.concatenate(seen), minlength=len(df))
            documents += len(batch)
            bar.update(len(batch))
    weights = np.log((documents + 1) / (df + 1)).astype(np.float32)
    weights[tokenizer.all_special_ids] = 0.0
    return Idf(weights, df, documents, fingerprint(tokenizer))


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    stream = iter(texts)
    while batch := list(islice(stream, BATCH)):
        yield batch
