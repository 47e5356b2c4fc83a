"""What doctors say to each other: length-framed JSON, signed where there is a GANG_SECRET, and bytes to fill a pipe.

Whoever accepts a connection greets first, with a nonce. A question is signed over that nonce, and an answer over the
nonce in the question, so that nothing recorded can be played again.
"""

import asyncio
import hashlib
import hmac
import json
import secrets
import struct
from dataclasses import dataclass
from typing import Any

PROTOCOL = "rtp-llm-doctor"
VERSION = 3
LENGTH = struct.Struct("<I")
MAX_MESSAGE = 4 << 20  # bytes; a row has some kilobytes
SIGNATURE = 32


class ProtocolError(ConnectionError):
    """The other end is not a doctor of this version, or signs with another secret."""


class NotADoctorError(ProtocolError):
    """Whoever listens there is no doctor."""


@dataclass(frozen=True)
class Greeting:
    """Who listens: a part's number, -1 on a port that stands in for one not in use yet."""

    part: int
    nonce: str
    version: int = VERSION

    def pack(self) -> bytes:
        said = {"protocol": PROTOCOL, "version": self.version, "part": self.part, "nonce": self.nonce}
        return _frame(json.dumps(said).encode())

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> "Greeting":
        """Raises Stranger where somebody else listens on this port, ProtocolError where it is a doctor of another
        release."""
        said = _json(await _receive(reader))
        if said.get("protocol") != PROTOCOL:
            raise NotADoctorError("something else listens there")
        if said.get("version") != VERSION:
            raise ProtocolError(f"its doctor speaks version {said.get('version')}, this one {VERSION}")
        return cls(int(said["part"]), str(said["nonce"]))


def new_nonce() -> str:
    return secrets.token_hex(16)


def pack_signed(message: dict[str, Any], nonce: str, secret: bytes) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return _frame(_sign(body, nonce, secret) + body)


async def read_signed(reader: asyncio.StreamReader, nonce: str, secret: bytes) -> dict[str, Any]:
    """Raises ProtocolError where the signature is not that of our secret."""
    data = await _receive(reader)
    if not hmac.compare_digest(data[:SIGNATURE], _sign(data[SIGNATURE:], nonce, secret)):
        raise ProtocolError("GANG_SECRET is not the same on both parts")
    return _json(data[SIGNATURE:])


def _sign(body: bytes, nonce: str, secret: bytes) -> bytes:
    """Without a secret this is a checksum: it tells a part that has one from a part that has none."""
    return hmac.new(secret, nonce.encode() + body, hashlib.sha256).digest()


def _frame(data: bytes) -> bytes:
    return LENGTH.pack(len(data)) + data


async def _receive(reader: asyncio.StreamReader) -> bytes:
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if length > MAX_MESSAGE:
            raise NotADoctorError("something else listens there")
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("the connection was closed") from None


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        raise NotADoctorError("something else listens there") from None
    if not isinstance(value, dict):
        raise NotADoctorError("something else listens there")
    return value
