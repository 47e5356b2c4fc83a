"""What strangers send to a socket: nothing, other protocols, half frames, frames that nobody expects, random bytes."""

import random
from collections.abc import Iterator

from rtp_llm.parallel.wire import HEADER, FrameType, pack_frame, pack_json

VALUES: tuple[object, ...] = (
    *(None, True, -1, 0, 1, 1 << 40, 1e308, "", "x", [], [1], {}, {"rank": -1}),
    *({"rank": 0}, {"rank": 1, "epoch": 0}, {"rank": 1, "epoch": 1}, {"rank": 99, "fingerprint": {}}),
    *({"rank": 1, "fingerprint": {"model": "made up"}}, {"id": 1}, {"id": "x", "prompt": "text", "params": 0}),
    *({"id": "x", "prompt": [-1], "output": [], "params": {}}, {"phase": "nothing", "rank": 1}, {"ids": None}),
)
OTHERS = (
    b"",
    b"\0",
    b"\n" * 100,
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\x80\x04\x95",  # pickle
    b"\xff" * 4096,
    HEADER.pack(0xFFFFFFFF, 1),
    HEADER.pack(0, 0),
    HEADER.pack(1 << 20, FrameType.HELLO),  # announces what never comes
)


def noise(seed: float) -> Iterator[bytes]:
    """Yields without end what one connection sends; the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield rng.choice((_frame, _other, _random_bytes, _broken_frame))(rng)


def _frame(rng: random.Random) -> bytes:
    return pack_json(rng.choice(list(FrameType)), rng.choice(VALUES))


def _other(rng: random.Random) -> bytes:
    return rng.choice(OTHERS)


def _random_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 5, 64, 5000)))


def _broken_frame(rng: random.Random) -> bytes:
    """Returns a frame with changed bytes, or cut off."""
    frame = bytearray(pack_frame(rng.choice(list(FrameType)), rng.randbytes(rng.choice((0, 4, 40)))) + _frame(rng))
    for _ in range(rng.randrange(3)):
        frame[rng.randrange(len(frame))] = rng.randrange(256)
    return bytes(frame[: rng.randrange(1, len(frame) + 1)])
