"""A model folder served by `transformers serve`, which knows nothing of this project, and queried by the openai client."""

import socket
import subprocess
import sys

import openai
import pytest
import torch
from transformers import pipeline

from storygen.checkpoint import save_model
from storygen.logprobs import response_logps
from storygen.outlines import Teacher, ask
from storygen.pattern import Pattern
from tests.conftest import ROOT, tiny_gpt2

STORY = "The tide had gone out further than anyone remembered.\nMara walked to the bell."
ROW = ("A bell under the sea.", "Mara finds the bell at low tide, rings it once,\nand the sea comes back.", STORY)
TOLD = {"prompt": "A fox keeps shop.", "story": "Nobody came in the morning. At noon a hen asked for string."}
PLAN = "A fox opens a shop and waits a whole day for somebody, until one hen comes and wants some string for her son's kite."


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Teacher:
    template = (ROOT / "prompts" / "outline_teacher.txt").read_text("utf-8")
    return Teacher("", "", template, tmp_path_factory.mktemp("teacher") / "cache.jsonl", concurrency=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory, teacher):
    """(url, model) of a server whose model has memorised two rows: one as trained, one whose prompt is the teacher's."""
    folder = tmp_path_factory.mktemp("served") / "model"
    model, tokenizer = tiny_gpt2(context=1024)
    pattern = Pattern(tokenizer)
    rows = [pattern.row(*ROW), pattern.row(teacher.question(TOLD), PLAN, "It flew.")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = -response_logps(model, [ids for ids, _ in rows], [start for _, start in rows], pattern.pad_id).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    save_model(model, tokenizer, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True) as process:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if "Uvicorn running" in line:
                break
        else:
            pytest.fail("the server ended: " + "".join(seen))
        yield f"http://127.0.0.1:{port}/v1", str(folder)
        process.terminate()


def test_a_chat_answer_is_outline_and_story_with_a_blank_line_between(server):
    url, name = server
    with openai.OpenAI(base_url=url, api_key="none") as client:
        messages = [{"role": "user", "content": ROW[0]}]
        reply = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=300)
    outline, border, story = reply.choices[0].message.content.partition("\n\n")
    assert border and reply.choices[0].finish_reason == "stop"
    assert (outline.replace("\n  ", "\n"), story.replace("\n  ", "\n").strip()) == ROW[1:]


def test_a_served_model_may_be_the_teacher(server, teacher):
    url, name = server
    teacher = Teacher(url, name, teacher.template, teacher.cache, concurrency=1, retries=0)
    outlines, counts = ask([TOLD], teacher)
    assert outlines[0].startswith(PLAN) and not any(counts.values())


def test_the_pipeline_of_transformers_needs_nothing_of_this_project(server):
    write = pipeline("text-generation", model=server[1], device="cpu")
    (answer,) = write([{"role": "user", "content": ROW[0]}], max_new_tokens=300, do_sample=False)
    outline, border, story = answer["generated_text"][-1]["content"].partition("\n\n")
    assert border and (outline.replace("\n  ", "\n"), story.replace("\n  ", "\n").strip()) == ROW[1:]
