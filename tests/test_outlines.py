"""The teacher client against a server on this machine: answers, retries, refusals, resuming."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from storygen.cli import InputError
from storygen.outlines import Teacher, ask, problem

pytest.importorskip("openai", reason="the openai client is not installed (extra: teacher)")

PLAN = "A ferryman rows the same silent passenger each night until she takes the oars and he learns she is his own sister."
STORY = "The ferry left at nine and the river was black and he did not look at the woman who sat in the bow as always. " * 3


class Server(ThreadingHTTPServer):
    """Answers each chat request with what `script` says: a text, or a status to fail with; the last entry repeats."""

    daemon_threads = True

    def __init__(self, script):
        self.script, self.requests, self.headers_seen = list(script), [], []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers_seen.append(self.headers.get("Authorization"))
        script = self.server.script
        answer = script.pop(0) if len(script) > 1 else script[0]
        status = answer if isinstance(answer, int) else 200
        message = {"role": "assistant", "content": answer}
        reply = {"error": {"message": "broken"}} if status != 200 else {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }  # fmt: skip
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "10")
        self.end_headers()
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
