"""Length-prefixed frames over stream sockets: one type byte, and a payload of JSON or binary arrays, never pickle."""

import json
import socket
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

HEADER = struct.Struct("<IB")  # payload length in bytes, frame type
MAX_PAYLOAD_BYTES = 256 << 20
Frame = tuple["FrameType", bytes]


class FrameType(IntEnum):
    """Types of frames, the messages between the processes of a gang. The payload is JSON unless noted."""

    # rendezvous and heartbeats: workers and guards <-> coordinator
    CHALLENGE = 7  # first frame on each TCP port of the gang, see parallel.handshake
    HELLO = 1
    ACCEPTED = 2
    WELCOME = 3
    REJECTED = 4
    HEARTBEAT = 5
    GANG_STATUS = 6
    EPOCH_ENDED = 8
    KILL = 9
    # steps: JOIN from the other ranks to rank 0, then rank 0 -> the other ranks
    JOIN = 10
    STEP = 11  # flat int32, see contract.step
    SNAPSHOT = 13  # uint32, see runner.input_batch; compares the sequences of all ranks after a step
    KEEPALIVE = 12  # empty; sent while rank 0 is idle
    # requests: API <-> rank 0
    READY = 20
    SUBMIT = 21
    ABORT = 22
    EVENTS = 23  # binary, see contract.engine_events
    LAUNCH = 24


class WireError(ConnectionError):
    """The peer closed the connection or sent an invalid frame."""


def pack_frame(frame_type: FrameType, payload: bytes = b"") -> bytes:
    return HEADER.pack(len(payload), frame_type) + payload


def pack_json(frame_type: FrameType, message: Any) -> bytes:
    return pack_frame(frame_type, json.dumps(message, separators=(",", ":")).encode())


def parse_header(header: bytes | bytearray) -> tuple[int, FrameType]:
    """Returns (payload length in bytes, frame type). Raises WireError if the peer does not use this protocol."""
    length, number = HEADER.unpack(header)
    if length > MAX_PAYLOAD_BYTES or number not in FrameType.__members__.values():
        raise WireError(f"not a frame: length {length}, type {number}; is the peer another program (wrong port)?")
    return length, FrameType(number)


def recv_frame(sock: socket.socket, max_payload: int = MAX_PAYLOAD_BYTES) -> Frame:
    """Reads one frame from a blocking socket. Raises WireError on EOF or a payload of more than `max_payload` bytes,
    TimeoutError after the socket's timeout."""
    length, frame_type = parse_header(_recv_exactly(sock, HEADER.size))
    if length > max_payload:
        raise _too_long(length, max_payload)
    return frame_type, bytes(_recv_exactly(sock, length))


def _too_long(length: int, max_payload: int) -> WireError:
    text = f"the peer sent a frame of {length} bytes; allowed: at most {max_payload}"
    return WireError(f"{text}; is it another program, or of another release?")


def _recv_exactly(sock: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        received = sock.recv_into(view)
        if not received:
            raise WireError("the peer closed the connection")
        view = view[received:]
    return data


class FrameBuffer:
    """Buffers the bytes of one connection and yields complete frames."""

    def __init__(self, max_payload: int = MAX_PAYLOAD_BYTES) -> None:
        """`max_payload`: bytes; `feed` raises WireError for a frame with a longer payload."""
        self._data, self._max_payload = bytearray(), max_payload

    def feed(self, data: bytes) -> Iterator[Frame]:
        self._data += data
        while len(self._data) >= HEADER.size:
            length, frame_type = parse_header(bytes(self._data[: HEADER.size]))
            if length > self._max_payload:
                raise _too_long(length, self._max_payload)
            end = HEADER.size + length
            if len(self._data) < end:
                return
            payload = bytes(self._data[HEADER.size : end])
            del self._data[:end]
            yield frame_type, payload


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening TCP socket. Raises OSError, whose message names host and port, if it cannot bind them."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    sock.listen(128)
    return sock


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """Returns a connected TCP socket with TCP_NODELAY, because Nagle's algorithm would delay small frames.

    `timeout`: seconds for connecting, and for later operations on the socket. Raises OSError.
    """
    sock = socket.create_connection((host, port), timeout=timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
