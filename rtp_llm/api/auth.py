"""Access control: API keys, admin keys, and the routes that need no key.

The middleware runs before the router. Without a valid key, only the open paths are served; any other path, known or
unknown, returns 401. Admin routes check the key themselves (`require_admin`), since only the router knows which route a
path selects.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rtp_llm.api.origins import host_header, is_loopback, is_loopback_name
from rtp_llm.config import Config, secret
from rtp_llm.errors import ConfigError, RequestError

Headers = Iterable[tuple[bytes, bytes]]
RespondError = Callable[[str, RequestError], Response]
KEY_HEADERS = {b"authorization", b"x-api-key", b"api-key"}
BEARER = re.compile(rb"bearer +", re.IGNORECASE)
FORWARDING_HEADERS = (b"forwarded", b"via", b"x-forwarded-", b"x-real-ip", b"x-envoy-", b"cf-", b"true-client-ip")
KEY = re.compile(r"(?:(?P<name>[A-Za-z0-9_.-]{1,64}):)?(?P<key>[!-~]+)")


@dataclass(frozen=True)
class NamedKey:
    """An API key or admin key with its name, which the access log shows. `digest`: SHA-256 of the key, so that a
    comparison takes the same time for keys of any length.
    """

    name: str
    digest: bytes


@dataclass(frozen=True)
class Keyring:
    """The API keys and the admin keys. An admin key is accepted for the API as well."""

    api: tuple[NamedKey, ...] = ()
    admin: tuple[NamedKey, ...] = ()

    @classmethod
    def from_config(cls, config: Config) -> "Keyring":
        """Reads API_KEY and ADMIN_KEY, or their files. Raises ConfigError, whose message contains no key."""
        return cls(_read_keys(config, "api_key"), _read_keys(config, "admin_key"))

    def find(self, headers: Headers) -> tuple[str, bool]:
        """Returns the name of the valid key in the headers ("" if there is none), and whether it is an admin key.

        If ADMIN_KEY is not set, an API key counts as an admin key.
        """
        digests = [hashlib.sha256(value).digest() for value in _candidates(headers)]
        if name := _match(self.admin, digests):
            return name, True
        name = _match(self.api, digests)
        return name, bool(name and not self.admin)

    def admits(self, scope: Scope) -> bool:
        """Returns whether a request has a valid key, or needs none because API_KEY is not set.

        Sets in the request's state: `key_name`, for the access log, and `is_admin`, whether the key is an admin key
        (None if no keys are configured).
        """
        name, is_admin = self.find(scope["headers"])
        has_keys = bool(self.api or self.admin)
        scope.setdefault("state", {}).update(key_name=name, is_admin=is_admin if has_keys else None)
        return bool(name or not self.api)


class AuthMiddleware:
    """Rejects requests without a valid key with 401, if API_KEY is set."""

    def __init__(self, app: ASGIApp, keyring: Keyring, open_paths: set[str], respond: RespondError):
        """`open_paths`: served without a key, whatever the method. GET / is open too: it returns the chat page."""
        self.app, self.keyring, self.open_paths, self.respond = app, keyring, open_paths, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.keyring.admits(scope) or self._is_open(scope):
            await self.app(scope, receive, send)
        else:
            await self.respond(scope["path"], _unauthorized(scope["headers"]))(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        method, path = scope["method"], scope["path"]
        return method == "OPTIONS" or path in self.open_paths or (path == "/" and method in ("GET", "HEAD"))


def require_admin(request: Request) -> None:
    """FastAPI dependency of admin routes. Raises RequestError 403 if the request has no admin key or, on a server
    without any keys, does not come from a program on this machine.
    """
    is_admin = request.state.is_admin
    if is_admin is None:
        is_admin = _comes_from_this_machine(request.scope)
    if not is_admin:
        needed = "an admin key: ADMIN_KEY, or API_KEY where it is unset; without both, a call from this machine"
        raise RequestError(403, 403, "PERMISSION_DENIED", f"{request.url.path} needs {needed}")


def _comes_from_this_machine(scope: Scope) -> bool:
    """Returns whether a local program sent the request: not a proxy for others, and not a web page under a name that
    its author made point here (DNS rebinding)."""
    is_forwarded = any(name.startswith(FORWARDING_HEADERS) for name, _ in scope["headers"])
    peer = scope.get("state", {}).get("peer", "")  # unlike scope["client"], never taken from a header
    return is_loopback(peer) and not is_forwarded and is_loopback_name(host_header(scope))


def _candidates(headers: Headers) -> Iterator[bytes]:
    """Yields every header value that may be the key: a library or proxy may add a second header."""
    for name, value in headers:
        if name in KEY_HEADERS:
            yield BEARER.sub(b"", value, count=1).strip() if name == b"authorization" else value.strip()


def _match(keys: tuple[NamedKey, ...], digests: list[bytes]) -> str:
    # A list, so that the time does not tell which key matched.
    names = [key.name for key in keys for digest in digests if hmac.compare_digest(key.digest, digest)]
    return names[0] if names else ""


def _unauthorized(headers: Headers) -> RequestError:
    problem = "the API key is not valid" if any(True for _ in _candidates(headers)) else "an API key is needed"
    message = f"{problem}: send Authorization: Bearer <key>, or x-api-key: <key>"
    return RequestError(401, 401, "INVALID_API_KEY", message)


def _read_keys(config: Config, setting: str) -> tuple[NamedKey, ...]:
    """Returns the keys of a setting. Raises ConfigError if one is malformed, or a file contains none.

    /dev/null counts as no file, since a compose file cannot make a secret optional.
    """
    path: str = getattr(config, f"{setting}_file")
    source = f"{setting.upper()}_FILE={path}" if path else setting.upper()
    raw = secret(config, setting)
    lines = raw.decode(errors="replace").splitlines()
    entries = [entry.strip() for line in lines if not line.lstrip().startswith("#") for entry in line.split(",")]
    keys = []
    for number, entry in enumerate(filter(None, entries), start=1):
        match = KEY.fullmatch(entry)
        if match is None:
            allowed = "key or name:key, of printable ASCII characters without spaces and commas"
            raise ConfigError(f"{source}: entry {number} is not valid; allowed: {allowed}", check="M-14")
        name = match["name"] or f"{setting.removesuffix('_key')}{number}"
        keys.append(NamedKey(name, hashlib.sha256(match["key"].encode()).digest()))
    if path and not keys and not Path(path).is_char_device():
        raise ConfigError(f"{source}: contains no key; allowed: one key or name:key per line", check="M-14")
    return tuple(keys)
