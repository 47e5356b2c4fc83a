"""The order and the end of the answers on one connection, on raw sockets."""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from unittest.mock import MagicMock

import pytest

from rtp_llm.api import client_transport, http_protocol
from rtp_llm.api.client_transport import ClientTransport
from rtp_llm.contract.engine_output import EngineOutput
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput
from tests.api.test_http_limits import HEAD, connect, read_to_end

COMPLETION = json.dumps({"prompt": "a"}).encode()
STREAM = json.dumps({"prompt": "a", "stream": True}).encode()


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/completions", length: int | None = None) -> bytes:
    lines = [b"POST %b HTTP/1.1" % path, b"Host: localhost", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % (len(body) if length is None else length), b"", body])


def finish(submission: Any) -> list[ScriptedOutput]:
    return [ScriptedOutput([65], "length")]


# Offers of another protocol


UPGRADE = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")


@pytest.mark.parametrize("size", [1, 1000, 10**6], ids=["one byte", "pieces", "at once"])
def test_an_offer_to_upgrade_is_ignored(size: int, start_api: StartApi) -> None:
    """The offers stand in the second and third of four requests on a connection, whose bodies arrive in pieces."""
    chunked = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + b"\r\n".join(UPGRADE)
    requests = [
        post(b'{"prompt": "a"}', path=b"/tokenize"),
        post(b'{"prompt": "bb"}', *UPGRADE, path=b"/tokenize"),
        chunked + b"\r\n\r\n8\r\n" + b'{"prompt' + b"\r\n9\r\n" + b'": "ccc"}' + b"\r\n0\r\n\r\n",
        HEAD + b"Connection: close\r\n\r\n",
    ]
    data = b"".join(requests)
    with connect(start_api().url) as sock:
        for i in range(0, len(data), size):
            sock.sendall(data[i : i + size])
        answer = read_to_end(sock)
    assert answer.count(b"HTTP/1.1 200 ") == 4
    ids = [len(json.loads(part[: part.index(b"}") + 1])["token_ids"]) for part in answer.split(b"\r\n\r\n")[1:4]]
    assert ids == [1, 2, 3]


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_with_http2(start_api: StartApi) -> None:
    api = start_api(finish)
    command = ["curl", "--silent", "--http2", "--noproxy", "*", "--data", "@-", f"{api.url}/v1/completions"]
    out = subprocess.run(command, input=COMPLETION, capture_output=True, check=True, timeout=60).stdout
    assert json.loads(out)["choices"] == api.post("/v1/completions", json.loads(COMPLETION)).json()["choices"]


def test_connect_is_refused(start_api: StartApi) -> None:
    with connect(start_api().url) as sock:
        sock.sendall(b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n")
        assert read_to_end(sock).startswith(b"HTTP/1.1 405 ")


# Early answers arrive although the client is still sending


@pytest.mark.parametrize("header", [b"Connection: close", b"X: 1"])
def test_the_answer_to_a_large_body_arrives(header: bytes, start_api: StartApi, monkeypatch: Any) -> None:
    """A socket that is closed with unread input would reset the connection, and the client lose the answer."""
    monkeypatch.setattr(http_protocol, "PROGRESS_SECONDS", 1.0)
    with connect(start_api(max_body_mb=1).url) as sock:
        sock.sendall(post(b" " * (16 << 20), header))
        answer = read_to_end(sock)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"MAX_BODY_MB" in answer


def test_a_client_that_never_stops_sending_is_cut(start_api: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_transport, "PROGRESS_SECONDS", 0.5)
    api = start_api()
    with connect(api.url) as sock:
        sock.sendall(HEAD + b"X: ")
        with pytest.raises(OSError, match=r"Broken pipe|reset"):  # noqa: PT012
            while True:
                sock.sendall(b"x" * 10_000)
    api.wait_until(lambda: api.num_connections == 0)


# A refused request behind others


BROKEN = {
    "garbage": (b"garbage\r\n\r\n", 400),
    "large headers": (HEAD + b"X: " + b"a" * (65 << 10) + b"\r\n\r\n", 431),
    "broken body": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n", 400),
}


@pytest.mark.parametrize("body", [STREAM, COMPLETION], ids=["begun", "not begun"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_refusal_waits_for_earlier_answers(name: str, body: bytes, start_api: StartApi) -> None:
    """The refused request follows one that waits in the same pipeline, behind one that is being answered."""
    api = start_api()
    broken, status = BROKEN[name]
    with connect(api.url) as sock:
        sock.sendall(post(body))
        submission = api.engine.next_submission()
        begun = sock.recv(4096) if body == STREAM else b""
        sock.sendall(HEAD + b"\r\n" + broken)
        api.get("/liveness")  # the server has read what was sent before
        api.engine.send_outputs(submission, ScriptedOutput(api.model.tokens("whole"), "length"))
        answer = begun + read_to_end(sock)
    assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 200, status]
    first = answer.split(b"HTTP/1.1 ")[1]
    assert b"whole" in first
    assert first.endswith(b"0\r\n\r\n") or body == COMPLETION


def test_the_disconnect_of_a_pipelining_client_aborts_its_first_request(start_api: StartApi) -> None:
    api = start_api()
    with connect(api.url) as sock:
        sock.sendall(post(STREAM))
        submission = api.engine.next_submission()
        sock.recv(4096)
        sock.sendall(HEAD + b"\r\n")
        api.get("/liveness")

    def writing_fails() -> bool:  # behind a waiting request the server reads no more, so only this shows the disconnect
        api.engine.send_frame(EngineOutput(submission.id, tokens=[65]))
        return api.engine.num_pending_aborts > 0

    api.wait_until(writing_fails)
    assert api.engine.next_abort() == submission.id


# Clients that do not read


def test_a_client_that_never_reads_is_cut(start_api: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_transport, "PROGRESS_SECONDS", 0.3)
    api = start_api()
    with connect(api.url) as sock:
        sock.sendall(post(json.dumps({"prompt": "Hi", "yield_generator": True}).encode(), path=b"/"))
        submission = api.engine.next_submission()
        for _ in range(400):  # each event repeats the text so far: some 40 MB
            api.engine.send_frame(EngineOutput(submission.id, tokens=api.model.tokens("x" * 500)))
        assert api.engine.next_abort().startswith(submission.id)
        api.wait_until(lambda: api.num_connections == 0)


def test_a_whole_answer_that_nobody_reads_is_dropped(start_api: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is complete for the application, and the connection is to be closed after it."""
    monkeypatch.setattr(client_transport, "PROGRESS_SECONDS", 0.3)
    api = start_api(finish)
    body = json.dumps({"prompt": "a" * 190_000, "return_offsets_mapping": True}).encode()
    with connect(api.url) as sock:
        sock.sendall(post(body, b"Connection: close", path=b"/tokenizer/encode"))
        api.wait_until(lambda: api.num_connections == 1)
        api.wait_until(lambda: api.num_connections == 0)


@pytest.fixture
def full_sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection whose second end has sent as much as the kernel takes, of which the first end has read nothing."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as sock,
    ):
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sock.send(bytes(1 << 20))
        yield client, sock


def test_what_a_slow_client_has_read_counts_as_progress(full_sockets: tuple[socket.socket, socket.socket]) -> None:
    """The kernel takes megabytes at once, so for a slow client only its own buffer shrinks between two looks."""
    client, sock = full_sockets
    inner, loop = MagicMock(), MagicMock()
    inner.get_extra_info.return_value, inner.get_write_buffer_size.return_value = sock, 7
    inner.is_closing.return_value = False
    transport = ClientTransport(inner, loop)
    transport.close()
    [(seconds, look, unsent)] = [call.args for call in loop.call_later.mock_calls]
    assert seconds == client_transport.PROGRESS_SECONDS
    assert unsent > 7
    while transport.num_unsent_bytes() == unsent:
        assert client.recv(4096)
    look(unsent)
    inner.abort.assert_not_called()
    look(loop.call_later.mock_calls[-1].args[2])
    inner.abort.assert_called_once_with()
    sock.close()
    assert transport.num_unsent_bytes() == 0
