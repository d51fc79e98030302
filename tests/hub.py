"""A local Hugging Face hub for data sets: enough of its API for the real clients to stream from it."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


class Hub(ThreadingHTTPServer):
    """repositories: {name: {path: bytes}}. Each is at commit `sha(name)`, to which any revision points."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories, self.paths = repositories, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def sha(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlparse(self.path)
        self.server.paths.append(unquote(url.path))
        for name, files in self.server.repositories.items():
            head, api = f"/datasets/{name}/resolve/", f"/api/datasets/{name}"
            path = unquote(url.path)
            if path.startswith(head):
                return self.file(name, files, path.removeprefix(head).partition("/")[2])
            if path == api or path.startswith(api + "/revision/"):
                return self.json(
                    {"id": name, "sha": sha(name), "private": False, "gated": False, "downloads": 0, "likes": 0, "tags": [],
                     "siblings": [{"rfilename": file} for file in files]}
                )  # fmt: skip
            if path.startswith(api + "/tree/"):
                folder = "".join(f"{part}/" for part in path.removeprefix(api + "/tree/").split("/")[1:])
                inside = {file.removeprefix(folder): data for file, data in files.items() if file.startswith(folder)}
                folders = {file.partition("/")[0] for file in inside if "/" in file}
                entries = [self.entry(folder + file, data) for file, data in inside.items() if "/" not in file]
                entries += [{"type": "directory", "path": folder + one, "oid": sha(one), "size": 0} for one in folders]
                return self.json(entries)
            if path.startswith(api + "/paths-info/"):
                size = int(self.headers.get("Content-Length", 0))
                wanted = parse_qs(self.rfile.read(size).decode()).get("paths", [])
                return self.json([self.entry(file, files[file]) for file in wanted if file in files])
        self.json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET

    def entry(self, path: str, data: bytes) -> dict:
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def file(self, name: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self.json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        data, headers = files[path], {"X-Repo-Commit": sha(name), "ETag": f'"{sha(path)}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if not asked:
            return self.reply(200, data, headers)
        first, last = asked.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1 if last else None]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self.reply(206, part, headers)

    def json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass
