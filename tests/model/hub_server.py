"""A small server that answers what the hub's client asks of the Hugging Face Hub."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


class HubServer(ThreadingHTTPServer):
    """Serves `files` by model and name. `break_after` cuts each large answer after so many bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.break_after: int | None = None
        self.replace: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Writes nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        is_api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        model = "/".join(parts[:2])
        if model in self.server.gated:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if model not in self.server.files:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if not is_api:
            return self._file(self.server.files[model], "/".join(parts[4:]))
        entries = [_entry(name, content) for name, content in self.server.files[model].items()]
        if len(parts) > 2 and parts[2] == "tree":
            return self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]}
            | ({"lfs": {"sha256": e["lfs"]["oid"], "size": e["size"], "pointerSize": 1}} if "lfs" in e else {})
            for e in entries
        ]
        info = {"id": model, "modelId": model, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content, entry = files[name], _entry(name, files[name])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
        content = self.server.replace.get(name, content)
        status, asked = 200, self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
        return self._send(status, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.break_after is not None and len(content) > max(self.server.break_after, 100_000):
            self.wfile.write(content[: self.server.break_after])
            self.close_connection = True
            return
        self.wfile.write(content)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": oid}
    if name.endswith((".safetensors", ".bin")):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 1}
    return entry


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A server that runs inside the block."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
