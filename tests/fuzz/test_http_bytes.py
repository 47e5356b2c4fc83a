"""A client that does not speak HTTP well: broken request lines, headers, lengths, chunks and pipelines.

Whatever answers come are HTTP and no server errors, and afterwards nothing is left of these connections.
`FUZZ_FACTOR=20` sends more.
"""

import os
import random
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests import random_model
from tests.api.servers import ServerProcess, running_server

pytestmark = pytest.mark.slow

CONNECTIONS = 300 * int(os.environ.get("FUZZ_FACTOR", "1"))
STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
BODY = b'{"prompt": "Hi", "max_tokens": 2}'
METHODS = (b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"BREW", b"get", b"", b"\x00", b"PRI")
TARGETS = (b"/v1/completions", b"/health", b"/", b"*", b"http://x/health", b"//", b"/%00", b"/\xff", b"/" + b"a" * 9000)
VERSIONS = (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9", b"", b"http/1.1")
HEADERS = (
    *(b"Host: x", b"Host: a\r\nHost: b", b"Host:", b": x", b"X", b"X Y: 1", b" folded: 1", b"X: \x00", b"X: \xff\xfe"),
    *(b"Connection: close", b"Connection: upgrade\r\nUpgrade: websocket", b"Expect: 100-continue", b"TE: trailers"),
    *(b"Content-Type: application/json", b"Content-Type: \x80", b"Content-Encoding: gzip", b"Accept: text/html"),
    *(b"X-Request-Id: " + b"a" * 300, b"Authorization: Bearer \xe9", b"Cookie: " + b"c" * 5000),
)
LENGTHS = (b"-1", b"+5", b"0x10", b"1e3", b"5, 5", b"99999999999999999999", b"4, 5", b"", b" ")
CHUNKS = (b"5\r\nhello\r\n0\r\n\r\n", b"-1\r\n", b"ffffffffffffffffff\r\n", b"5;x=y\r\nhello\r\n", b"zz\r\n", b"0\r\n")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of its own, since the test counts its connections. Asserts that its log has no traceback."""
    folder: Path = tmp_path_factory.mktemp("http")
    random_model.write(folder / "model")
    with running_server(folder / "model", folder / "output", DISABLE_ACCESS_LOG="1") as server:
        yield server


def request(rng: random.Random) -> bytes:
    """Returns a request that is broken in some ways, and often not complete."""
    line = b" ".join((rng.choice(METHODS), rng.choice(TARGETS), rng.choice(VERSIONS)))
    headers = [rng.choice(HEADERS) for _ in range(rng.randrange(5))]
    body = BODY
    framing = rng.randrange(4)
    if framing == 0:
        headers.append(b"Content-Length: " + rng.choice(LENGTHS))
    elif framing == 1:
        headers.append(b"Content-Length: %d" % (len(body) + rng.choice((-1, 0, 0, 7))))
    elif framing == 2:
        headers.append(b"Transfer-Encoding: " + rng.choice((b"chunked", b"chunked, chunked", b"gzip", b"xchunked")))
        body = rng.choice(CHUNKS)
    data = bytearray(b"\r\n".join((line, *headers, b"", body)))
    if rng.random() < 0.3:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(1, len(data) + 1)] if rng.random() < 0.3 else data)


def exchange(url: str, data: bytes) -> bytes:
    """Sends bytes, says that no more will come, and returns what the server answers until it closes."""
    host, port = url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=20) as connection, suppress(ConnectionError):
        connection.sendall(data)
        with suppress(OSError):  # the server may have closed the connection at once
            connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            received += piece
    return received


def test_broken_http(server: ServerProcess) -> None:
    rng = random.Random(29)
    with server.client() as client:
        before = open_files(client)
        for _ in range(CONNECTIONS):
            data = b"".join(request(rng) for _ in range(rng.choice((1, 1, 1, 3))))
            answer = exchange(server.url, data)
            statuses = [int(status) for status in STATUS_LINE.findall(answer)]
            assert not answer or STATUS_LINE.match(answer), (data, answer[:300])
            assert all(status < 500 for status in statuses), (data, answer[:300])
            assert b"Traceback" not in answer, (data, answer)
        assert client.post("/v1/completions", content=BODY).status_code == 200
        status = client.get("/worker_status").json()
        assert (status["running_query_len"], status["waiting_query_len"]) == (0, 0)
        assert status["available_kv_cache"] == status["total_kv_cache"]
        assert open_files(client) <= before + 2


def open_files(client: httpx.Client) -> float:
    """Returns how many files the API process has open."""
    text = client.get("/metrics").text
    found = re.search(r'^rtp_llm_process_open_fds\{.*program="api".*\} (\S+)$', text, re.MULTILINE)
    assert found, text
    return float(found[1])
