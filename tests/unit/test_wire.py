"""Frames (messages with a header) over sockets: split data, foreign protocols and closed connections."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.parallel.wire import (
    HEADER,
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameBuffer,
    FrameType,
    WireError,
    connect,
    listen,
    pack_frame,
    pack_json,
    parse_header,
    recv_frame,
)

Pair = tuple[socket.socket, socket.socket]
FRAMES = st.lists(st.tuples(st.sampled_from(FrameType), st.binary(max_size=40)), max_size=6)


@pytest.fixture
def pair() -> Iterator[Pair]:
    local, peer = socket.socketpair()
    with closing(local), closing(peer):
        local.settimeout(10)
        yield local, peer


def collect(chunks: list[bytes]) -> list[Frame]:
    buffer = FrameBuffer()
    return [frame for chunk in chunks for frame in buffer.feed(chunk)]


def test_frame_is_length_type_payload() -> None:
    assert pack_frame(FrameType.STEP, b"abc") == b"\x03\x00\x00\x00" + bytes([FrameType.STEP]) + b"abc"
    assert parse_header(pack_frame(FrameType.KEEPALIVE)) == (0, FrameType.KEEPALIVE)
    assert json.loads(pack_json(FrameType.HELLO, {"rank": 1})[HEADER.size :]) == {"rank": 1}


@settings(max_examples=200, deadline=None)
@given(FRAMES, st.data())
def test_frames_do_not_depend_on_chunk_boundaries(frames: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(pack_frame(frame_type, payload) for frame_type, payload in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert collect(chunks) == frames


@settings(max_examples=100, deadline=None)
@given(FRAMES)
def test_frame_is_yielded_with_its_last_byte(frames: list[Frame]) -> None:
    buffer = FrameBuffer()
    for frame_type, payload in frames:
        frame = pack_frame(frame_type, payload)
        assert list(buffer.feed(frame[:-1])) == []
        assert list(buffer.feed(frame[-1:])) == [(frame_type, payload)]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_give_frames_or_wire_error(noise: bytes) -> None:
    try:
        frames = collect([noise])
    except WireError:
        return
    assert noise.startswith(b"".join(pack_frame(frame_type, payload) for frame_type, payload in frames))


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        HEADER.pack(MAX_PAYLOAD_BYTES + 1, FrameType.STEP),
        HEADER.pack(0, 99),
    ],
    ids=["http", "tls", "oversized", "unknown type"],
)
def test_invalid_header_is_rejected(pair: Pair, noise: bytes) -> None:
    with pytest.raises(WireError, match="is the peer another program"):
        collect([noise])
    local, peer = pair
    peer.sendall(noise)
    with pytest.raises(WireError, match="not a frame"):
        recv_frame(local)


def test_maximum_payload_is_allowed() -> None:
    assert parse_header(HEADER.pack(MAX_PAYLOAD_BYTES, FrameType.STEP)) == (MAX_PAYLOAD_BYTES, FrameType.STEP)


def test_a_frame_sent_byte_by_byte_arrives(pair: Pair) -> None:
    local, peer = pair
    frame = pack_frame(FrameType.GANG_STATUS, b"payload")

    def trickle() -> None:
        for byte in frame:
            peer.sendall(bytes([byte]))

    sender = threading.Thread(target=trickle)
    sender.start()
    assert recv_frame(local) == (FrameType.GANG_STATUS, b"payload")
    sender.join()


def test_a_frame_larger_than_the_socket_buffer_arrives(pair: Pair) -> None:
    local, peer = pair
    payload = bytes(range(256)) * 8192
    sender = threading.Thread(target=peer.sendall, args=(pack_frame(FrameType.STEP, payload),))
    sender.start()
    assert recv_frame(local) == (FrameType.STEP, payload)
    sender.join()


@pytest.mark.parametrize(
    "sent", [b"", b"\x03\x00", pack_frame(FrameType.STEP, b"abc")[:-1]], ids=["nothing", "header", "payload"]
)
def test_closed_connection_raises_wire_error(pair: Pair, sent: bytes) -> None:
    local, peer = pair
    peer.sendall(sent)
    peer.close()
    with pytest.raises(WireError, match="the peer closed the connection"):
        recv_frame(local)


def test_silent_peer_raises_timeout_error(pair: Pair) -> None:
    pair[0].settimeout(0.01)
    with pytest.raises(TimeoutError):
        recv_frame(pair[0])


def test_listen_and_connect_without_delay() -> None:
    with closing(listen("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with closing(connect("127.0.0.1", port, 5)) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_listen_accepts_an_ipv6_address() -> None:
    try:
        listener = listen("::1", 0)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with closing(listener):
        assert listener.family == socket.AF_INET6
