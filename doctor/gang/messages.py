"""Messages between the doctors of the parts: JSON with a length prefix, signed with GANG_SECRET.

The side that accepts a connection first sends a greeting with a random number (nonce). A request is signed together
with that nonce, and the reply together with the nonce in the request, so recorded messages cannot be replayed.
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
MAX_MESSAGE_BYTES = 4 << 20  # the report of one part has a few KiB
SIGNATURE_BYTES = 32


class ProtocolError(ConnectionError):
    """The other side is not a doctor, has another protocol version or another GANG_SECRET, or closed the connection."""


class NotADoctorError(ProtocolError):
    """Another program listens on the doctor's port."""

    def __init__(self, message: str = "another program listens on the doctor's port") -> None:
        super().__init__(message)


@dataclass(frozen=True)
class Greeting:
    """The first message on a connection between doctors, sent by the side that accepted the connection.

    `part`: number of the sender's part. `nonce`: random number with which requests on this connection are signed.
    `version`: version of the protocol.
    """

    part: int
    nonce: str
    version: int = VERSION

    def pack(self) -> bytes:
        message = {"protocol": PROTOCOL, "version": self.version, "part": self.part, "nonce": self.nonce}
        return _frame(json.dumps(message).encode())

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> "Greeting":
        """Reads a greeting. Raises NotADoctorError if the message is not a greeting, ProtocolError if its protocol
        version differs, and ConnectionResetError if the connection ends first.
        """
        message = _parse_object(await _receive(reader))
        if message.get("protocol") != PROTOCOL:
            raise NotADoctorError
        if message.get("version") != VERSION:
            raise ProtocolError(
                f"the other part's doctor has protocol version {message.get('version')}, this part's doctor {VERSION}:"
                " run the same release on both parts"
            )
        return cls(int(message["part"]), str(message["nonce"]))


def new_nonce() -> str:
    return secrets.token_hex(16)


def pack_signed(message: dict[str, Any], nonce: str, secret: bytes) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return _frame(_sign(body, nonce, secret) + body)


async def read_signed(reader: asyncio.StreamReader, nonce: str, secret: bytes) -> dict[str, Any]:
    """Reads a signed message and returns its JSON object. `nonce`: the number that was signed together with the
    message.

    Raises ProtocolError if the signature is wrong because the sender has another `secret`, NotADoctorError if the
    message is malformed, and ConnectionResetError if the connection ends first.
    """
    data = await _receive(reader)
    signature, body = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _sign(body, nonce, secret)):
        raise ProtocolError("GANG_SECRET is not the same on both parts")
    return _parse_object(body)


def _sign(body: bytes, nonce: str, secret: bytes) -> bytes:
    """Returns the HMAC of a message. An empty secret is valid: its HMAC differs from that of every other secret."""
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
        raise ConnectionResetError("the other side closed the connection before a complete message arrived") from None


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        raise NotADoctorError from None
    if not isinstance(value, dict):
        raise NotADoctorError
    return value
