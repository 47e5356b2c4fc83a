"""The sockets on which HTTP listens, and uvicorn's settings."""

import errno
import logging
import socket
from ipaddress import ip_address

import uvicorn
from starlette.types import ASGIApp

from rtp_llm.api.http_protocol import HttpProtocol
from rtp_llm.config import Config
from rtp_llm.errors import ConfigError, FatalError

log = logging.getLogger(__name__)

GRACEFUL_SHUTDOWN_SECONDS = 3  # for responses that are still being written when the drain ends
BACKLOG = 2048


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """Returns sockets that listen on `host`; on all addresses of both families if it is empty or "::".

    One socket per family, so that IPv4 clients keep their IPv4 address in the log; a machine without IPv6 has only
    one. Raises ConfigError (64) if `host` is not an address of this machine, FatalError (70) if the port is taken.
    """
    if host in (socket.gethostname(), socket.getfqdn()) or "-conda" in host:  # as csh and conda's compilers set HOST
        log.warning("HOST=%s is the name of a machine, not an address: listening on all addresses", host)
        host = ""
    hosts = ["0.0.0.0", "::"] if host in ("", "::") else ["127.0.0.1", "::1"] if host == "localhost" else [host]
    listeners: list[socket.socket] = []
    for address in hosts:
        try:
            listeners.append(_listen(address, port))
        except ValueError:
            allowed = "an IP address of this machine, localhost, or unset for all addresses"
            raise ConfigError(f"HOST={host!r}: not valid; allowed: {allowed}", check="M-14") from None
        except OSError as error:
            lacks_ipv6 = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
            if listeners and lacks_ipv6:
                continue
            for listener in listeners:
                listener.close()
            raise _explain(error, address, host, port) from None
    return listeners


def uvicorn_config(app: ASGIApp, config: Config) -> uvicorn.Config:
    """Returns uvicorn's settings. Raises ConfigError if the certificate or its key cannot be used."""
    uvicorn_config = uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=config.timeout_keep_alive,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
        ssl_certfile=config.ssl_certfile or None,
        ssl_keyfile=config.ssl_keyfile or None,
        # OpenSSL would ask for the passphrase on a terminal.
        ssl_keyfile_password="" if config.ssl_certfile else None,
    )
    try:
        if config.ssl_keyfile and not config.ssl_certfile:
            raise ConfigError("SSL_KEYFILE is set without SSL_CERTFILE; allowed: both, or none", check="M-14")
        uvicorn_config.load()
    except OSError as error:  # an ssl.SSLError is one too
        files = f"SSL_CERTFILE={config.ssl_certfile}, SSL_KEYFILE={config.ssl_keyfile}"
        allowed = "a PEM certificate chain and its private key without a passphrase"
        reason = error.strerror or error
        raise ConfigError(f"{files}: cannot be used: {reason}; allowed: {allowed}", check="M-14") from None
    return uvicorn_config


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=BACKLOG)


def _explain(error: OSError, address: str, host: str, port: int) -> FatalError:
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"HOST={host!r}: not an address of this machine; allowed: one of its IP addresses")
    return FatalError(f"HTTP cannot listen on {address} port {port} (START_PORT): {error.strerror}")
