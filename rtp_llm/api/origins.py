"""Protects a server without API keys from web pages of other origins.

A web page can make its visitor's browser send requests to any server that the visitor can reach. Browsers state the
page's origin in the header Origin, and send JSON only after a preflight request. In a DNS rebinding attack, a foreign
name resolves to 127.0.0.1; the header Host shows that name.
"""

from collections.abc import Callable, Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rtp_llm.config import Config
from rtp_llm.errors import ConfigError, RequestError

APP_SCHEMES = {"app", "tauri", "vscode-webview"}  # pages of programs on this machine
# The content types that a browser sends to another origin without a preflight (fetch.spec.whatwg.org: safelisted).
SIMPLE_CONTENT_TYPES = {"", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"}


class OriginPolicy:
    """Decides from the headers Origin and Host which web pages may use a server without API keys: those of this machine
    and of this server, and those that ALLOWED_ORIGINS and ALLOWED_HOSTS name.
    """

    def __init__(self, config: Config):
        """Raises ConfigError if ALLOWED_ORIGINS has an invalid entry."""
        self.origins = _entries(config.allowed_origins)
        self.hosts = {host.lower() for host in _entries(config.allowed_hosts)}
        self.checks_host = is_loopback(config.host) or config.host == "localhost"
        for origin in self.origins - {"*"}:
            parts = urlsplit(origin)
            if not parts.scheme or not parts.netloc or parts.path:
                allowed = "scheme://host[:port], such as https://chat.example.com, or *"
                raise ConfigError(f"ALLOWED_ORIGINS: {origin!r} is not an origin; allowed: {allowed}", check="M-14")

    def allows_origin(self, origin: str) -> bool:
        if origin in self.origins or "*" in self.origins:
            return True
        scheme, _, rest = origin.partition("://")
        return scheme in APP_SCHEMES or (scheme in ("http", "https") and is_loopback_name(host_name(rest)))

    def refusal(self, scope: Scope) -> RequestError | None:
        """Returns the error for a refused request, otherwise None: 403 for a foreign origin or host, 415 for a web
        page's POST with a content type that browsers send without a preflight, such as that of a form.
        """
        host, origin = host_header(scope), _header(scope, b"origin")
        if self.checks_host and not self._allows_host(host):
            hint = f"set ALLOWED_HOSTS={host[:200]}, or an API_KEY"
            return _forbidden(f"host {host[:200]!r} is not a name of this machine's loopback address: {hint}")
        if not origin:
            return None
        if not self.allows_origin(origin) and not self._is_same_origin(origin, scope):
            hint = f"set ALLOWED_ORIGINS={origin[:200]}, or an API_KEY"
            return _forbidden(f"web pages of origin {origin[:200]!r} may not use this server: {hint}")
        content_type = _header(scope, b"content-type").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and content_type in SIMPLE_CONTENT_TYPES:
            message = f"content type {content_type!r} from a web page: send Content-Type: application/json"
            return RequestError(415, 507, "ERROR_INPUT_FORMAT_ERROR", message)
        return None

    def _is_same_origin(self, origin: str, scope: Scope) -> bool:
        """Returns whether the page came from this server, under an address or name that no outsider can point to it.

        Public names contain a dot, so only the local network can have defined a name without one.
        """
        host = host_header(scope)
        is_trusted = is_local_host(host) or bool({host, "*"} & self.hosts) or "." not in host
        scheme, _, address = origin.lower().partition("://")
        default_port = {"http": ":80", "https": ":443"}.get(scheme, "")
        return is_trusted and address.removesuffix(default_port) == _header(scope, b"host").lower().removesuffix(
            default_port
        )

    def _allows_host(self, host: str) -> bool:
        return not host or is_local_host(host) or bool({host, "*"} & self.hosts)


class OriginMiddleware(CORSMiddleware):
    """Middleware that answers CORS preflight requests, adds CORS headers, and rejects requests that `policy` refuses.
    `policy` is None on a server with API keys, which protect it: then any origin is allowed.
    """

    def __init__(self, app: ASGIApp, policy: OriginPolicy | None, respond: Callable[[str, RequestError], Response]):
        origins: Collection[str] = () if policy else ("*",)
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("*",),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=("X-Request-Id", "X-Ignored-Fields", "Retry-After"),
        )
        self.policy, self.respond = policy, respond

    def is_allowed_origin(self, origin: str) -> bool:
        return self.policy.allows_origin(origin) if self.policy else super().is_allowed_origin(origin)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.policy.refusal(scope) if self.policy and scope["type"] == "http" else None
        if refusal:
            await self.respond(scope["path"], refusal)(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def host_header(scope: Scope) -> str:
    """Returns the name in the header Host, without port and brackets, in lower case; "" without the header."""
    return host_name(_header(scope, b"host"))


def host_name(authority: str) -> str:
    """Returns the host in `host[:port]` or `[IPv6 address][:port]`, in lower case."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].rstrip(".").lower()


def is_local_host(host: str) -> bool:
    """Returns whether `host` is safe from DNS rebinding: any IP address, or a loopback name."""
    return _is_ip(host) or is_loopback_name(host)


def is_loopback(address: str) -> bool:
    """Returns whether the text is a loopback IP address; an IPv4-mapped IPv6 address counts."""
    if not _is_ip(address):
        return False
    ip = ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback_name(host: str) -> bool:
    return host == "localhost" or host.endswith(".localhost") or is_loopback(host)


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1").strip() for key, value in scope["headers"] if key == name), "")


def _entries(setting: str) -> set[str]:
    return {entry.strip().rstrip("/") for entry in setting.split(",") if entry.strip()}


def _forbidden(message: str) -> RequestError:
    return RequestError(403, 403, "PERMISSION_DENIED", message)
