"""Wire format between the parts' doctors: length-prefixed JSON, signed with GANG_SECRET.

The side that accepts a connection sends a greeting with a nonce. A request is signed over that nonce, the reply over
the nonce in the request, so recorded messages cannot be replayed.
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
MAX_MESSAGE_BYTES = 4 << 20  # a part's report has some kilobytes
SIGNATURE_BYTES = 32


class ProtocolError(ConnectionError):
    """The peer is not a doctor of this version, or signs with another secret."""


class NotADoctorError(ProtocolError):
    """Another program listens on the doctor's port."""

    def __init__(self, message: str = "another program listens there") -> None:
        super().__init__(message)


@dataclass(frozen=True)
class Greeting:
    """The first message on a connection, from the listening side."""

    part: int
    nonce: str
    version: int = VERSION

    def pack(self) -> bytes:
        message = {"protocol": PROTOCOL, "version": self.version, "part": self.part, "nonce": self.nonce}
        return _frame(json.dumps(message).encode())

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> "Greeting":
        """Reads a greeting. Raises NotADoctorError if another program listens, ProtocolError if versions differ."""
        message = _parse_object(await _receive(reader))
        if message.get("protocol") != PROTOCOL:
            raise NotADoctorError
        if message.get("version") != VERSION:
            raise ProtocolError(f"its doctor has protocol version {message.get('version')}, this one {VERSION}")
        return cls(int(message["part"]), str(message["nonce"]))


def new_nonce() -> str:
    return secrets.token_hex(16)


def pack_signed(message: dict[str, Any], nonce: str, secret: bytes) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return _frame(_sign(body, nonce, secret) + body)


async def read_signed(reader: asyncio.StreamReader, nonce: str, secret: bytes) -> dict[str, Any]:
    """Reads a signed message. Raises ProtocolError if it was signed with another secret."""
    data = await _receive(reader)
    signature, body = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _sign(body, nonce, secret)):
        raise ProtocolError("GANG_SECRET is not the same on both parts")
    return _parse_object(body)


def _sign(body: bytes, nonce: str, secret: bytes) -> bytes:
    """Returns the HMAC. With an empty secret it still differs from that of a part that has a secret."""
    return hmac.new(secret, nonce.encode() + body, hashlib.sha256).digest()


def _frame(data: bytes) -> bytes:
    return LENGTH.pack(len(data)) + data


async def _receive(reader: asyncio.StreamReader) -> bytes:
    try:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if length > MAX_MESSAGE_BYTES:
            raise NotADoctorError
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("the connection was closed") from None


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        raise NotADoctorError from None
    if not isinstance(value, dict):
        raise NotADoctorError
    return value
