"""Authentication between the processes of a gang with GANG_SECRET, on each of the gang's TCP ports.

The listening side sends a CHALLENGE frame with a random nonce. The connecting side's first frame carries an HMAC over
that nonce and over the frame, and a nonce of its own, for which the reply carries an HMAC. If no part has GANG_SECRET,
the HMACs are empty. The handshake keeps out clients without the secret. It does not encrypt, and does not protect later
frames from a man in the middle.
"""

import hmac
import json
import os
import secrets
from typing import Any

from rtp_llm.config import Config, secret
from rtp_llm.parallel.wire import FrameType, WireError, pack_json

NONCE_BYTES = 16


def read_secret(config: Config) -> bytes:
    """Returns the value of GANG_SECRET from the settings, or if they have none, from the environment, because settings
    that were read from a file contain no secrets. Empty if it is not set.
    """
    return secret(config) or os.environ.get("GANG_SECRET", "").strip().encode()


class Challenge:
    """The listening side's half of the authentication of a connection by GANG_SECRET."""

    def __init__(self, gang_secret: bytes):
        self._secret, self._nonce = gang_secret, secrets.token_hex(NONCE_BYTES)

    def frame(self) -> bytes:
        """Returns the CHALLENGE frame. It reveals only whether a secret is needed."""
        return pack_json(FrameType.CHALLENGE, {"nonce": self._nonce, "secret": bool(self._secret)})

    def check(self, message: dict[str, Any]) -> None:
        """Raises SecretError if the message was not signed with the secret for this challenge."""
        if message["secret"] != bool(self._secret):
            here, there = ("set", "not set") if self._secret else ("not set", "set")
            raise SecretError(f"GANG_SECRET is {here} on this part and {there} on the other; set the same on all parts")
        unsigned = {key: value for key, value in message.items() if key != "mac"}
        if self._secret and not hmac.compare_digest(_sign(self._secret, self._nonce, unsigned), str(message["mac"])):
            raise SecretError("GANG_SECRET of the other part is not the one of this part; set the same on all parts")

    def proof(self, message: dict[str, Any]) -> str:
        """Returns the HMAC over the nonce of the client's `message`, for the reply: it proves that this side knows
        GANG_SECRET, too. Empty without GANG_SECRET.
        """
        return _sign(self._secret, str(message["nonce"]), "proof") if self._secret else ""


class Answer:
    """The connecting side's half of the authentication of a connection by GANG_SECRET: signs that side's first message
    for the challenge that it has received.
    """

    def __init__(self, gang_secret: bytes, challenge: dict[str, Any]):
        """`challenge`: body of the CHALLENGE frame."""
        self._secret, self._nonce = gang_secret, secrets.token_hex(NONCE_BYTES)
        self._challenge = str(challenge["nonce"])
        self._peer_has_secret = bool(challenge["secret"])

    def explain(self, error: OSError) -> OSError:
        """Returns the error to raise after the other side has closed the connection with `error`: a SecretError if
        GANG_SECRET differs or may differ between the two sides, otherwise `error` itself.
        """
        if not self._secret and not self._peer_has_secret:
            return error
        here, there = ("set" if s else "not set" for s in (bool(self._secret), self._peer_has_secret))
        state = "is not the same" if here == there else f"is {here} on this part and {there} on the other"
        return SecretError(f"{error}: GANG_SECRET {state}; set the same on all parts")

    def sign(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns the message with a nonce, and an HMAC over this message and the challenge."""
        message = message | {"nonce": self._nonce, "secret": bool(self._secret)}
        return message | {"mac": _sign(self._secret, self._challenge, message) if self._secret else ""}

    def check_proof(self, proof: str) -> None:
        """Raises SecretError if `proof`, the HMAC in the listening side's reply, was not made with GANG_SECRET."""
        if self._secret and not hmac.compare_digest(_sign(self._secret, self._nonce, "proof"), proof):
            raise SecretError("GANG_SECRET of the other part is not the one of this part; set the same on all parts")


class SecretError(WireError):
    """The two sides of a connection do not have the same GANG_SECRET."""


def _sign(gang_secret: bytes, nonce: str, message: Any) -> str:
    data = json.dumps([nonce, message], sort_keys=True, separators=(",", ":"))
    return hmac.new(gang_secret, data.encode(), "sha256").hexdigest()
