"""The teacher client against a local server: answers, retries, refusals, resuming."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from storygen.cli import InputError
from storygen.outlines import Teacher, ask, problem

pytest.importorskip("openai", reason="the openai client is not installed (extra: teacher)")

PLAN = "A ferryman rows the same silent passenger each night until she takes the oars and he learns she is his own sister."
STORY = "The ferry left at nine and the river was black and he did not look at the woman who sat in the bow as always. " * 3


@dataclass(frozen=True)
class Body:
    """A reply with status 200 and these bytes, sent after `hang` seconds."""

    data: bytes = b""
    hang: float = 0.0


class Server(ThreadingHTTPServer):
    """Answers each chat request as `script` says: with a text, a `Body` or a failing status; the last entry repeats."""

    daemon_threads = True

    def __init__(self, script):
        self.script, self.requests, self.headers_seen = list(script), [], []
        self.headers, self.hanging, self.times = {"Retry-After-Ms": "10"}, threading.Event(), []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.times.append(time.monotonic())
        self.server.headers_seen.append(self.headers.get("Authorization"))
        script = self.server.script
        answer = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(answer, Body):
            self.server.hanging.wait(answer.hang)
            return self.reply(200, answer.data)
        status = answer if isinstance(answer, int) else 200
        message = {"role": "assistant", "content": answer}
        reply = {"error": {"message": "broken"}} if status != 200 else {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }  # fmt: skip
        return self.reply(status, json.dumps(reply).encode())

    def reply(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has given up
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*script):
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.hanging.set()
        server.shutdown()
        server.server_close()


def teacher(server, tmp_path, **changes):
    kind = {
        "url": server.url,
        "model": "m",
        "template": "P={prompt} S={story}",
        "cache": tmp_path / "c" / "cache.jsonl",
        "retries": 2,
    }
    return Teacher(**(kind | changes))


def rows(n):
    return [{"prompt": f"prompt {i}", "story": f"{STORY} {i}"} for i in range(n)]


def test_answers_come_back_in_order_and_are_never_asked_twice(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-this-test")
    server = serve(f"<think>Hm. A plan?</think>\n\n{PLAN}")
    bar = []
    outlines, counts = ask(rows(5), teacher(server, tmp_path), lambda: bar.append(1))
    assert outlines == [PLAN] * 5 and counts["from_cache"] == 0 and len(bar) == 5
    assert list(counts) == ["from_cache"]  # reasons that never occurred are not reported
    assert {r["messages"][0]["content"] for r in server.requests} == {f"P=prompt {i} S={STORY} {i}" for i in range(5)}
    assert set(server.headers_seen) == {"Bearer sk-secret-of-this-test"}
    assert "secret" not in (tmp_path / "c" / "cache.jsonl").read_text()

    outlines, counts = ask(rows(7), teacher(server, tmp_path))
    assert outlines == [PLAN] * 7 and counts["from_cache"] == 5 and len(server.requests) == 7


def test_a_torn_cache_line_is_asked_again(serve, tmp_path):
    server = serve(PLAN)
    ask(rows(3), teacher(server, tmp_path))
    cache = tmp_path / "c" / "cache.jsonl"
    cache.write_bytes(cache.read_bytes()[:-20])
    outlines, counts = ask(rows(3), teacher(server, tmp_path))
    assert outlines == [PLAN] * 3 and counts["from_cache"] == 2
    assert ask(rows(3), teacher(server, tmp_path))[1]["from_cache"] == 3


def test_a_server_error_is_tried_again(serve, tmp_path):
    server = serve(500, 429, PLAN)
    assert ask(rows(1), teacher(server, tmp_path))[0] == [PLAN]
    assert len(server.requests) == 3


def test_one_row_that_keeps_failing_does_not_stop_the_others(serve, tmp_path):
    server = serve(500, PLAN)
    outlines, counts = ask(rows(4), teacher(server, tmp_path, retries=0, concurrency=1))
    assert outlines.count(None) == 1 and counts["request_failed"] == 1


def test_too_many_requests_are_sent_again_when_the_server_says(serve, tmp_path):
    server = serve(429, PLAN)
    server.headers = {"Retry-After": "1"}
    assert ask(rows(1), teacher(server, tmp_path))[0] == [PLAN]
    assert len(server.requests) == 2 and server.times[1] - server.times[0] >= 1


@pytest.mark.parametrize(
    "answer",
    [
        Body(b'{"id": "x", "choices": [{"index": 0, "mess'),
        Body(b"<html>Bad gateway</html>"),
        Body(b'{"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": []}'),
        Body(b'{"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": null}'),
        Body(b'{"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0}]}'),
        Body(b"[]"),
        Body(b"null"),
    ],
    ids=["cut off", "html", "no choice", "null choices", "no message", "a list", "null"],
)
def test_an_answer_that_is_none_costs_one_row_and_is_asked_again_next_time(serve, tmp_path, answer):
    server = serve(answer, PLAN)
    outlines, counts = ask(rows(4), teacher(server, tmp_path, concurrency=1))
    assert outlines.count(None) == 1 and outlines.count(PLAN) == 3 and counts["no_answer"] == 1
    assert ask(rows(4), teacher(server, tmp_path))[0] == [PLAN] * 4 and len(server.requests) == 5


def test_a_request_that_hangs_is_given_up_and_the_rest_goes_on(serve, tmp_path):
    server = serve(PLAN, Body(hang=60), PLAN)
    outlines, counts = ask(rows(4), teacher(server, tmp_path, concurrency=1, retries=0, timeout=0.5))
    assert outlines.count(PLAN) == 3 and counts["request_failed"] == 1


def test_an_endpoint_that_only_hangs_is_told_before_every_row_has_waited(serve, tmp_path):
    server = serve(Body(hang=60))
    with pytest.raises(InputError, match="does not answer .*timed out"):
        ask(rows(40), teacher(server, tmp_path, concurrency=2, retries=0, timeout=0.5))
    assert len(server.requests) <= 6


def test_an_endpoint_that_hangs_when_the_run_goes_on_is_told_too(serve, tmp_path):
    asking = teacher(serve(PLAN), tmp_path)
    ask(rows(1), asking)
    server = serve(Body(hang=60))
    with pytest.raises(InputError, match="1 answers are kept"):
        ask(rows(9), teacher(server, tmp_path, timeout=0.2, retries=0, concurrency=2))
    assert len(server.requests) < 8


@pytest.mark.parametrize(
    ("changes", "says"), [({"url": "http://localhost:8000v1"}, "--teacher-url"), ({"cache": Path("tests")}, "is a folder")]
)
def test_an_address_or_a_cache_that_is_none_is_told(serve, tmp_path, changes, says):
    with pytest.raises(InputError, match=says) as told:
        ask(rows(1), teacher(serve(PLAN), tmp_path, **changes))
    assert "\n" not in str(told.value)


def test_a_story_that_comes_back_is_no_outline(serve, tmp_path):
    outlines, counts = ask(rows(3), teacher(serve(STORY[:300], PLAN), tmp_path, concurrency=1))
    assert outlines.count(PLAN) == 2 and counts["outline_copies_story"] == 1


def test_killed_it_goes_on_without_a_second_request_for_a_finished_row(serve, tmp_path):
    server = serve(*[PLAN] * 6, Body(hang=60))
    code = f"""
from pathlib import Path
from storygen.outlines import Teacher, ask
rows = [{{"prompt": f"prompt {{i}}", "story": f"a story {{i}}"}} for i in range(12)]
ask(rows, Teacher({server.url!r}, "m", "P={{prompt}} S={{story}}", Path({str(tmp_path / "cache.jsonl")!r}), concurrency=1))
"""
    running = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    assert eventually(lambda: len(server.requests) == 7)
    running.kill()
    running.wait()
    server.script = [PLAN]
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, timeout=60)
    asked = [request["messages"][0]["content"] for request in server.requests]
    assert len(asked) == 13 and len(set(asked)) == 12  # only the one that hung was sent twice


def eventually(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        threading.Event().wait(0.01)
    return condition()


def test_refusals_are_counted(serve, tmp_path):
    server = serve("I'm sorry, but I can't help with that request because it is against my rules, as I have said.", PLAN)
    outlines, counts = ask(rows(3), teacher(server, tmp_path, concurrency=1))
    assert outlines.count(None) == 1 and counts["refusal"] == 1


def test_nothing_usable_is_an_error(serve, tmp_path):
    with pytest.raises(InputError, match="not one usable outline in 2 rows.*2 outline_too_short"):
        ask(rows(2), teacher(serve("<think>still thinking"), tmp_path))


def test_a_wrong_key_and_a_silent_endpoint_are_errors(serve, tmp_path):
    server = serve(401)
    with pytest.raises(InputError, match="401"):
        ask(rows(2), teacher(server, tmp_path))
    with pytest.raises(InputError, match="does not answer"):
        ask(rows(2), teacher(server, tmp_path, url="http://127.0.0.1:9/v1", retries=0))


def test_braces_in_the_texts_stay(tmp_path):
    asks = Teacher("http://x", "m", "{prompt}|{story}", tmp_path)
    assert asks.question({"prompt": "a {story}", "story": "b {prompt} {x}"}) == "a {story}|b {prompt} {x}"


@pytest.mark.parametrize(
    ("outline", "reason"),
    [
        (PLAN, None),
        ("I cannot write that.", "refusal"),
        ("I’m unable to write an outline for this story, since it holds something that I do not write about.", "refusal"),
        ("Too short by far.", "outline_too_short"),
        ("word " * 201, "outline_too_long"),
        (STORY[:150], "outline_copies_story"),
        ("I meet a man on a ferry, and though he will not speak I learn from his hands that he is my brother.", None),
    ],
)
def test_unusable_outlines_have_a_reason(outline, reason):
    assert problem(outline, STORY) == reason


@pytest.mark.parametrize("reason, text", [("length", PLAN), ("stop", ""), ("stop", None)])
def test_an_answer_that_was_paid_for_and_says_nothing_whole_is_not_asked_for_again(serve, tmp_path, reason, text):
    empty = {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
             "choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}]}  # fmt: skip
    server = serve(Body(json.dumps(empty).encode()), PLAN)
    for run in range(2):
        outlines, counts = ask(rows(3), teacher(server, tmp_path, concurrency=1))
        assert outlines == [None, PLAN, PLAN] and counts["no_answer"] == 1 and counts["from_cache"] == 3 * run
    assert len(server.requests) == 3
