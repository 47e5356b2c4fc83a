"""A hub on loopback: as much of huggingface.co's HTTP interface as huggingface_hub needs to list and download models.

A test changes the hub's state between requests, and reads what was asked of it.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

DEMO = Path(__file__).parents[2] / "image" / "demo" / "model"
COMMIT = "a" * 40
CHUNK_BYTES = 1 << 16


@dataclass
class FakeModel:
    """A model's files at one commit. `access`: the token that opens its files, None if they are public. `xet`: hashes
    of files that are in Xet storage as well.
    """

    files: dict[str, bytes]
    commit: str = COMMIT
    access: str | None = None
    branches: tuple[str, ...] = ("main",)
    xet: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeHub:
    """`cuts`: how many bytes the next answers with a file send before the connection ends. `resets`: it ends with RST.
    `gate`: a file's content is sent only while it is set. `status`: every answer has it, unless it is 0.
    `xet_storages`: URLs of Xet storage, one for each token; the last one goes on. `bytes_sent`: the lengths of answers
    with a file's content, by file."""

    models: dict[str, FakeModel] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    resets: bool = False
    status: int = 0
    requests: list[str] = field(default_factory=list)  # "GET path bytes=…"
    gate: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)  # half of a large file has been sent
    url: str = ""
    xet_storages: list[str] = field(default_factory=list)
    bytes_sent: Counter[str] = field(default_factory=Counter)

    def downloads(self, file: str) -> list[str]:
        """Returns the requests for a file's content."""
        return [request for request in self.requests if request.startswith("GET") and f"/{file}" in request]


@contextmanager
def running_hub(**models: FakeModel) -> Iterator[FakeHub]:
    """Serves models; "org__name" stands for org/name."""
    hub = FakeHub({name.replace("__", "/"): model for name, model in models.items()})
    hub.gate.set()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = _Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Does nothing: a client that was killed is no error here."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        span = self.headers.get("Range", "")
        self.hub.requests.append(f"{self.command} {self.path} {span}".strip())
        if self.headers.get("Authorization") == "Bearer hf_expired":
            self._fail(401, "", "Invalid credentials in Authorization header")
        elif self.hub.status:
            self._fail(self.hub.status, "", "out of order")
        elif url.path == "/api/models":
            self._list(parse_qs(url.query))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", url.path):
            self._describe(match[1], match[2] or "revision", match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            self._send_file(match[1], match[2], match[3])
        elif url.path == "/xet-token":
            storages = self.hub.xet_storages
            storage = storages.pop(0) if len(storages) > 1 else storages[0]
            self._json({"casUrl": storage, "accessToken": "xet", "exp": 4_000_000_000})
        else:
            self._fail(404, "", "no such path")

    def _list(self, query: dict[str, list[str]]) -> None:
        author, search = query.get("author", [""])[0], query.get("search", [""])[0]
        names = [name for name in self.hub.models if name.startswith(author) and search in name]
        self._json([{"id": name, "modelId": name, "tags": [], "downloads": 1} for name in names])

    def _find(self, repo: str, revision: str) -> FakeModel | None:
        """Returns the model at a revision. Otherwise sends the error, in the hub's own words, and returns None."""
        model = self.hub.models.get(repo)
        if model is None:
            self._fail(401, "", "Invalid username or password.")
        elif revision not in (*model.branches, model.commit):
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return model
        return None

    def _describe(self, repo: str, kind: str, revision: str) -> None:
        model = self._find(repo, revision)
        if model is None:
            return
        files = [(name, content, _lfs(name, content)) for name, content in model.files.items()]
        if kind == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                | ({"lfs": {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 130}} if lfs else {})
                for name, content, lfs in files
            ]
            self._json(entries)
            return
        siblings = [
            {"rfilename": name, "size": len(content), "blobId": _oid(content)} | ({"lfs": lfs} if lfs else {})
            for name, content, lfs in files
        ]
        self._json({"id": repo, "modelId": repo, "sha": model.commit, "siblings": siblings, "tags": []})

    def _send_file(self, repo: str, revision: str, name: str) -> None:
        model = self._find(repo, revision)
        if model is None:
            return
        if model.access and self.headers.get("Authorization") != f"Bearer {model.access}":
            status = 403 if "Authorization" in self.headers else 401
            self._fail(status, "GatedRepo", f"Access to model {repo} is restricted.")
            return
        if name not in model.files:
            self._fail(404, "EntryNotFound", "Entry not found")
            return
        content = model.files[name]
        lfs = _lfs(name, content)
        first = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]) if "Range" in self.headers else 0
        body = content[first:]
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{lfs["sha256"] if lfs else _oid(content)}"')
        self.send_header("X-Repo-Commit", model.commit)
        self.send_header("Content-Length", str(len(body)))
        if name in model.xet:
            self.send_header("X-Xet-Hash", model.xet[name])
            self.send_header("X-Xet-Refresh-Route", f"{self.hub.url}/xet-token")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.hub.bytes_sent[name] += len(body)
            self._send_body(body)

    def _send_body(self, body: bytes) -> None:
        cut = self.hub.cuts.pop(0) if len(body) > CHUNK_BYTES and self.hub.cuts else len(body)
        for start in range(0, cut, CHUNK_BYTES):
            if start > len(body) // 2:
                self.hub.started.set()
                self.hub.gate.wait()
            self.wfile.write(body[start : min(cut, start + CHUNK_BYTES)])
        if cut < len(body):
            self.close_connection = True
            if self.hub.resets:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _fail(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode() if self.command != "HEAD" else b""
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _lfs(name: str, content: bytes) -> dict[str, Any]:
    """Returns what the hub says of a file that it keeps in LFS; empty for a small text file, which is in git."""
    is_large = name.endswith((".safetensors", ".bin"))
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130} if is_large else {}


def _oid(content: bytes) -> str:
    """Returns git's id of a file, which is the ETag of a file that is not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def demo_model() -> FakeModel:
    """Returns the demo model, with files of other formats that the server does not need."""
    files = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    unneeded = ("pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors", "README.md")
    return FakeModel(files | dict.fromkeys(unneeded, b"not needed"))
