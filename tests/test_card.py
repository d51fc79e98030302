"""A model's card, and its upload by the standard client to a local hub."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from storygen.card import push, write_card
from storygen.checkpoint import save_model
from storygen.cli import InputError
from tests.conftest import ROOT, tiny_gpt2

MANIFEST = {
    "preset": "demo",
    "sources": {
        "outlines": {"from": "hub", "name": "user/plans", "revision": "0" * 40},
        "source": {"from": "/data/tales.jsonl"},
    },
    "counts": {"outlines": {"read": 9, "kept": {"train": 7, "test": 1}}, "source": {"read": 5, "kept": {"train": 4}}},
}
CONFIG = {"model": "openai-community/gpt2", "lr": 1e-4, "out": "/home/somebody/out", "data": "/home/somebody/data"}


@pytest.fixture
def folder(tmp_path):
    save_model(*tiny_gpt2(context=32), tmp_path / "tales")
    write_card(tmp_path / "tales", "A writer", CONFIG, MANIFEST, [("reward", "0.123")], "user/tales")
    return tmp_path / "tales"


def test_a_card_says_what_the_hub_and_its_readers_ask(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.datasets == ["user/plans"] and card.data.license is None
    for text in ("# user/tales", "| reward | 0.123 |", "| outlines | user/plans | 9 | 8 |", "| source | tales.jsonl | 5 | 4 |",
                 "`openai-community/gpt2`", '"lr": 0.0001'):  # fmt: skip
        assert text in card.text, text
    assert "somebody" not in card.text


def test_a_model_of_the_embedded_data_is_free_for_all_if_its_base_is(tmp_path):
    """The next stage learns it from the card of the one before."""
    manifest = MANIFEST | {"sources": {"outlines": {"from": "corpus"}, "source": {"from": "corpus", "same_as": "outlines"}}}
    for base, licence in ((str(ROOT / "base_model"), "cc0-1.0"), ("openai-community/gpt2", None)):
        stages = tmp_path / str(licence) / "one", tmp_path / str(licence) / "two"
        for start, folder in zip((base, str(stages[0])), stages):
            folder.mkdir(parents=True)
            write_card(folder, "A writer", CONFIG | {"model": start}, manifest, [], None)
            assert ModelCard.load(folder / "README.md").data.license == licence


class Hub(BaseHTTPRequestHandler):
    """What a client needs from a hub to create a repository and commit to it; no file here is large enough for LFS."""

    commits: ClassVar[list[dict[str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            answer = {"url": f"http://{self.headers['Host']}/user/tales", "name": "user/tales"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        else:
            lines = [json.loads(line)["value"] for line in body.splitlines() if line]
            self.commits.append({v["path"]: base64.b64decode(v["content"]) for v in lines if "content" in v})
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/user/tales/commit/1",
                "commitOid": "1" * 40,
                "success": True,
            }
        self.answer(answer)

    def do_GET(self) -> None:
        self.answer({"id": "user/tales", "sha": "0" * 40, "siblings": []})

    def answer(self, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def test_the_model_and_nothing_else_of_the_folder_is_uploaded(folder, monkeypatch):
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "run.json").write_text("{}")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        assert push(folder, "user/tales").endswith("user/tales")
        server.shutdown()
    (commit,) = Hub.commits
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(commit)
    assert not {"metrics.jsonl", "run.json"} & set(commit)
    assert commit["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_hub_that_does_not_answer_is_one_line_and_the_model_stays(folder, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(InputError, match="--push-to-hub user/tales: .*the model lies in") as told:
        push(folder, "user/tales")
    assert "\n" not in str(told.value) and (folder / "model.safetensors").is_file()


def use_hub(monkeypatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
