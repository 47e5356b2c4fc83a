"""Frames over sockets: however the bytes are cut up, whatever else connects, and when the peer goes away."""

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
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        ours.settimeout(10)
        yield ours, theirs


def collect(pieces: list[bytes]) -> list[Frame]:
    buffer = FrameBuffer()
    return [frame for piece in pieces for frame in buffer.feed(piece)]


def test_a_frame_is_length_kind_payload() -> None:
    assert pack_frame(FrameType.STEP, b"abc") == b"\x03\x00\x00\x00" + bytes([FrameType.STEP]) + b"abc"
    assert parse_header(pack_frame(FrameType.KEEPALIVE)) == (0, FrameType.KEEPALIVE)
    assert json.loads(pack_json(FrameType.HELLO, {"rank": 1})[HEADER.size :]) == {"rank": 1}


@settings(max_examples=200, deadline=None)
@given(FRAMES, st.data())
def test_frames_come_out_however_the_bytes_are_cut(frames: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(pack_frame(kind, payload) for kind, payload in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert collect(pieces) == frames


@settings(max_examples=100, deadline=None)
@given(FRAMES)
def test_a_frame_comes_out_no_earlier_than_its_last_byte(frames: list[Frame]) -> None:
    buffer = FrameBuffer()
    for kind, payload in frames:
        frame = pack_frame(kind, payload)
        assert list(buffer.feed(frame[:-1])) == []
        assert list(buffer.feed(frame[-1:])) == [(kind, payload)]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_noise_gives_frames_or_an_error_and_nothing_else(noise: bytes) -> None:
    try:
        frames = collect([noise])
    except WireError:
        return
    assert noise.startswith(b"".join(pack_frame(kind, payload) for kind, payload in frames))


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        HEADER.pack(MAX_PAYLOAD_BYTES + 1, FrameType.STEP),
        HEADER.pack(0, 99),
    ],
    ids=["http", "tls", "oversized", "kind"],
)
def test_what_is_no_frame_is_refused_by_its_header(pair: Pair, noise: bytes) -> None:
    with pytest.raises(WireError, match="is another program connecting to this port"):
        collect([noise])
    ours, theirs = pair
    theirs.sendall(noise)
    with pytest.raises(WireError, match="not a frame"):
        recv_frame(ours)


def test_the_largest_payload_is_allowed() -> None:
    assert parse_header(HEADER.pack(MAX_PAYLOAD_BYTES, FrameType.STEP)) == (MAX_PAYLOAD_BYTES, FrameType.STEP)


def test_a_frame_sent_byte_by_byte_arrives(pair: Pair) -> None:
    ours, theirs = pair
    frame = pack_frame(FrameType.GANG_STATUS, b"payload")

    def trickle() -> None:
        for byte in frame:
            theirs.sendall(bytes([byte]))

    sender = threading.Thread(target=trickle)
    sender.start()
    assert recv_frame(ours) == (FrameType.GANG_STATUS, b"payload")
    sender.join()


def test_a_frame_larger_than_the_socket_buffer_arrives(pair: Pair) -> None:
    ours, theirs = pair
    payload = bytes(range(256)) * 8192
    sender = threading.Thread(target=theirs.sendall, args=(pack_frame(FrameType.STEP, payload),))
    sender.start()
    assert recv_frame(ours) == (FrameType.STEP, payload)
    sender.join()


@pytest.mark.parametrize(
    "sent", [b"", b"\x03\x00", pack_frame(FrameType.STEP, b"abc")[:-1]], ids=["nothing", "header", "payload"]
)
def test_the_end_of_the_connection_is_an_error_of_the_connection(pair: Pair, sent: bytes) -> None:
    ours, theirs = pair
    theirs.sendall(sent)
    theirs.close()
    with pytest.raises(WireError, match="the peer closed the connection"):
        recv_frame(ours)


def test_silence_is_a_timeout(pair: Pair) -> None:
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


def test_listen_takes_an_address_with_colons() -> None:
    try:
        listener = listen("::1", 0)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with closing(listener):
        assert listener.family == socket.AF_INET6
