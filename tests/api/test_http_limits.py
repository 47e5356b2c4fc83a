"""Limits on headers, slow clients and connections, on raw sockets."""

import logging
import socket
import ssl
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from rtp_llm.api import http_protocol, tls_handshake
from rtp_llm.api.connection_limit import ConnectionLimit
from rtp_llm.api.http_protocol import HttpProtocol
from rtp_llm.api.listen import listening_sockets, uvicorn_config
from rtp_llm.config import Config
from rtp_llm.errors import ConfigError, FatalError
from tests.api.conftest import StartApi

DEADLINE_SECONDS = 20.0
HEAD = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_SECONDS)


def read_to_end(sock: socket.socket) -> bytes:
    """Returns all that the server sends until it closes the connection."""
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


@pytest.mark.parametrize(
    "lines",
    [
        [b"X-%d: 1" % i for i in range(129)],
        [b"X: " + b"a" * (64 << 10)],
        [b"X-%d: " % i + b"a" * 8000 for i in range(9)],
        [b"X: " + b"a" * (8 << 20)],
    ],
    ids=["many", "one large", "large together", "one endless"],
)
def test_too_many_or_too_large_headers(lines: list[bytes], start_api: StartApi) -> None:
    api = start_api()
    with connect(api.url) as sock:
        sock.sendall(HEAD + b"\r\n".join(lines) + b"\r\n\r\n")
        answer = read_to_end(sock)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"128 headers, 64 KiB" in answer
    assert api.get("/liveness").status_code == 200


def test_headers_within_the_limits(start_api: StartApi) -> None:
    lines = [b"X-%d: " % i + b"a" * 400 for i in range(120)]
    with connect(start_api().url) as sock:
        sock.sendall(HEAD + b"\r\n".join(lines) + b"\r\nConnection: close\r\n\r\n")
        assert read_to_end(sock).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_and_large_bodies_are_no_headers(start_api: StartApi) -> None:
    body = b'{"prompt": "' + b"x" * 200_000 + b'"}'
    post = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with connect(start_api().url) as sock:
        sock.sendall(post + post + HEAD + b"Connection: close\r\n\r\n")
        answer = read_to_end(sock)
    assert answer.count(b"HTTP/1.1 ") == 3
    assert b" 431 " not in answer


SLOW = {
    "nothing": (b"", b""),
    "half a head": (HEAD, b"HTTP/1.1 408 "),
    "half a body": (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{", b"HTTP/1.1 408 "),
    "half a head after a request": (HEAD + b"\r\n" + HEAD, b"HTTP/1.1 200 "),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_clients_are_cut(name: str, start_api: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "PROGRESS_SECONDS", 0.2)
    sent, start_of_answer = SLOW[name]
    api = start_api()
    with connect(api.url) as sock:
        sock.sendall(sent)
        answer = read_to_end(sock)
    assert answer.startswith(start_of_answer)
    assert answer.count(b" 408 ") == (not name.startswith("nothing"))
    api.wait_until(lambda: api.num_connections == 0)


def test_a_silent_stream_is_not_cut(start_api: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of a running request waits for the server: no timer runs against it."""
    monkeypatch.setattr(http_protocol, "PROGRESS_SECONDS", 0.05)
    api = start_api(lambda submission: [], max_rpc_timeout_ms=600)
    response = api.post("/v1/completions", {"prompt": "a"})
    assert response.status_code == 504


def test_probes_are_answered_when_connections_use_up_the_limit(
    start_api: StartApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections that wait are closed, the longest waiting first; where none waits, only probes get an answer."""
    monkeypatch.setattr(HttpProtocol, "limit", ConnectionLimit(10))
    api = start_api(lambda submission: [])
    api.write_gang_status()
    caplog.set_level(logging.WARNING)
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(api.url)) for _ in range(30)]
        for path in ("/liveness", "/health", "/v1/models"):
            assert api.get(path).status_code == 200
        assert read_to_end(silent[0]) == b""
        assert api.num_connections <= 10
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(api.open_stream("/v1/completions", {"prompt": "a", "stream": True}))
        for path, status in (("/liveness", 200), ("/health", 200), ("/v1/models", 503)):
            assert api.get(path).status_code == status
    assert len([r for r in caplog.records if "open files" in r.getMessage()]) == 1


def test_the_limit_leaves_a_reserve() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 256));"
        "from rtp_llm.api.connection_limit import ConnectionLimit;"
        "print(ConnectionLimit.from_rlimit().limit, *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    limit, soft, hard = (int(word) for word in out.split())
    assert (soft, hard) == (256, 256)
    assert 128 <= limit <= 256 - 64


# Listening


def test_both_families_by_default(start_api: StartApi) -> None:
    addresses = {}
    for host in ("", "::", "0.0.0.0", "127.0.0.1"):
        listeners = listening_sockets(host, 0)
        addresses[host] = [listener.getsockname()[0] for listener in listeners]
        for listener in listeners:
            listener.close()
    both = ["0.0.0.0", "::"] if socket.has_ipv6 else ["0.0.0.0"]
    assert addresses == {"": both, "::": both, "0.0.0.0": ["0.0.0.0"], "127.0.0.1": ["127.0.0.1"]}


def test_one_family_where_ipv6_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    create = socket.create_server

    def create_ipv4(address: tuple[str, int], *, family: int, backlog: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return create(address, family=family, backlog=backlog)

    monkeypatch.setattr(socket, "create_server", create_ipv4)
    [listener] = listening_sockets("", 0)
    listener.close()


def test_addresses_that_cannot_be_used() -> None:
    for host in ("192.0.2.1", "my-machine", "2001:db8::1"):
        with pytest.raises(ConfigError, match=f"HOST='{host}': .*allowed: "):
            listening_sockets(host, 0)
    [taken] = listening_sockets("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(FatalError, match=f"127.0.0.1 port {port} .*in use"):
        listening_sockets("127.0.0.1", port)
    taken.close()


# TLS


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    names = ("cert.pem", "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -out {names[0]} -keyout {names[1]}"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    return str(tmp_path / names[0]), str(tmp_path / names[1])


def test_tls(start_api: StartApi, certificate: tuple[str, str]) -> None:
    api = start_api(ssl_certfile=certificate[0], ssl_keyfile=certificate[1])
    context = ssl.create_default_context(cafile=certificate[0])
    context.check_hostname = False
    with context.wrap_socket(connect(api.url)) as sock:
        sock.sendall(b"GET /liveness HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert read_to_end(sock).startswith(b"HTTP/1.1 200 ")


def client_hello() -> bytes:
    """Returns the first message of a TLS handshake."""
    sent = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    return sent.read()


def test_tls_handshakes_that_never_end(
    start_api: StartApi, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count as connections, are closed at the deadline of the headers, and so are those that are no TLS."""
    monkeypatch.setattr(tls_handshake, "PROGRESS_SECONDS", 1.0)
    api = start_api(ssl_certfile=certificate[0], ssl_keyfile=certificate[1])
    with ExitStack() as stack:
        for sent in (b"", client_hello()[:20], client_hello()):
            sock = stack.enter_context(connect(api.url))
            sock.sendall(sent)
            api.wait_until(lambda: api.num_connections == 1)
            read_to_end(sock)
            api.wait_until(lambda: api.num_connections == 0)
        with connect(api.url) as sock:
            sock.sendall(HEAD + b"\r\n")
            read_to_end(sock)
    api.wait_until(lambda: api.num_connections == 0)


def test_tls_handshakes_count_against_the_limit(
    start_api: StartApi, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HttpProtocol, "limit", ConnectionLimit(10))
    api = start_api(ssl_certfile=certificate[0], ssl_keyfile=certificate[1])
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(api.url)) for _ in range(30)]
        with httpx.Client(verify=False, trust_env=False) as client:
            assert client.get(api.url.replace("http:", "https:") + "/v1/models").status_code == 200
        assert read_to_end(silent[0]) == b""
        api.wait_until(lambda: api.num_connections <= 10)


def test_what_a_tls_client_has_sent_before_it_is_accepted_counts(
    start_api: StartApi, certificate: tuple[str, str]
) -> None:
    api = start_api(ssl_certfile=certificate[0], ssl_keyfile=certificate[1])
    with ExitStack() as stack:
        with api.blocked_event_loop():
            clients = [stack.enter_context(connect(api.url)) for _ in range(50)]
            for sock in clients:
                sock.sendall(client_hello())
        assert [sock.recv(1) for sock in clients] == [b"\x16"] * 50  # a record of the handshake (RFC 8446, 5.1)


def test_certificates_that_cannot_be_used(start_api: StartApi, certificate: tuple[str, str]) -> None:
    for cert, key in ((certificate[1], certificate[1]), ("/nowhere", certificate[1]), ("", certificate[1])):
        with pytest.raises(ConfigError, match="allowed: "):
            start_api(ssl_certfile=cert, ssl_keyfile=key)


def test_idle_connections_outlive_those_of_proxies() -> None:
    """nginx and Envoy keep an idle connection for 60 to 75 s, and who closes first may lose a request."""
    assert uvicorn_config(FastAPI(), Config.model_validate({})).timeout_keep_alive > 75
    config = Config.model_validate({"timeout_keep_alive": 5})
    assert uvicorn_config(FastAPI(), config).timeout_keep_alive == 5
