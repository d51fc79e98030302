"""A data folder as the reward reads it, made once per test run from the embedded corpus."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from storygen import calibration
from storygen.bertscore import load_encoder
from storygen.corpus import split_of
from storygen.idf import build_idf

CORPUS = Path(__file__).parents[1] / "corpus/stories.jsonl"
PAIRED = 60
PROBED = 240


@cache
def corpus_rows() -> list[dict]:
    rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    return [
        {"split": split_of(row["prompt"]), "prompt": row["prompt"], "think": row["outline"], "story": row["story"]}
        for row in rows
    ]


def held_out(n: int) -> list[dict]:
    held = [row for row in corpus_rows() if row["split"] != "train"][:n]
    return [{"prompt": row["prompt"], "think": row["think"], "story": row["story"], "finished": True} for row in held]


@cache
def data_folder() -> Path:
    """Correlation curves from PAIRED rows and a probe from PROBED, for speed; the rest from the whole training split."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    train = [row for row in corpus_rows() if row["split"] == "train"]
    encoder = load_encoder()
    idf = build_idf(encoder.tokenizer, (row[key] for row in train for key in ("think", "story")))
    idf.save(folder / "idf.npz")
    stories = [row["story"] for row in train[PAIRED + PROBED :]]
    with patch.object(calibration, "MAX_ROWS", PAIRED):
        calibration.calibrate(train[: PAIRED + PROBED], encoder, idf, 0, stories).save(folder / "calibration.json")
    named = {"name": encoder.name, "layer": encoder.layer, "sha256": encoder.sha256}
    (folder / "manifest.json").write_text(json.dumps({"preset": "demo", "encoder": named}))
    pq.write_table(pa.Table.from_pylist(corpus_rows()), folder / "sft.parquet")
    return folder
