"""Length-prefixed frames over stream sockets: one kind byte and raw bytes. JSON or int32 inside, never pickle."""

import json
import socket
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

HEADER = struct.Struct("<IB")  # payload length in bytes, kind
MAX_PAYLOAD = 256 << 20
Frame = tuple["FrameType", bytes]


class FrameType(IntEnum):
    """What a frame carries. JSON unless another form is named."""

    # roll call and heartbeat, rank <-> hub
    HELLO = 1
    WAITING = 2
    WELCOME = 3
    REJECTED = 4
    HEARTBEAT = 5
    GANG_STATUS = 6
    # steps, rank 0 -> the others
    JOIN = 10
    STEP = 11  # flat int32, see contract.step
    KEEPALIVE = 12  # empty: nothing to do, still here
    # requests, api <-> rank 0
    READY = 20
    SUBMIT = 21
    ABORT = 22
    EVENTS = 23


class WireError(ConnectionError):
    """The peer closed the connection, or sent what is no frame."""


def pack_frame(kind: FrameType, payload: bytes = b"") -> bytes:
    return HEADER.pack(len(payload), kind) + payload


def pack_json(kind: FrameType, message: Any) -> bytes:
    return pack_frame(kind, json.dumps(message, separators=(",", ":")).encode())


def parse_header(header: bytes | bytearray) -> tuple[int, FrameType]:
    """(payload length, kind). Raises WireError where the bytes are not from one of us."""
    length, kind = HEADER.unpack(header)
    if length > MAX_PAYLOAD or kind not in FrameType.__members__.values():
        raise WireError(f"not a frame: length {length}, kind {kind}; is something else connecting to this port?")
    return length, FrameType(kind)


def recv_frame(sock: socket.socket) -> Frame:
    """One frame from a blocking socket. Raises WireError on EOF, TimeoutError after the socket's timeout."""
    length, kind = parse_header(_recv_exactly(sock, HEADER.size))
    return kind, bytes(_recv_exactly(sock, length))


def _recv_exactly(sock: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise WireError("the peer closed the connection")
        view = view[got:]
    return data


class FrameBuffer:
    """Collects bytes of one connection and gives out the frames that are complete."""

    def __init__(self, limit: int = MAX_PAYLOAD) -> None:
        """`limit`: largest payload in bytes; a longer one is no frame of ours here."""
        self._data, self._limit = bytearray(), limit

    def feed(self, data: bytes) -> Iterator[Frame]:
        self._data += data
        while len(self._data) >= HEADER.size:
            length, kind = parse_header(bytes(self._data[: HEADER.size]))
            if length > self._limit:
                raise WireError(f"a frame of {length} bytes where at most {self._limit} are taken")
            end = HEADER.size + length
            if len(self._data) < end:
                return
            payload = bytes(self._data[HEADER.size : end])
            del self._data[:end]
            yield kind, payload


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises OSError naming the port where it is taken."""
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
    """A connected TCP socket without Nagle's delay: a step frame must leave at once."""
    sock = socket.create_connection((host, port), timeout=timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
