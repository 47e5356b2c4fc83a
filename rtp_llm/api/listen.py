"""The sockets on which the HTTP server listens, and uvicorn's settings."""

import logging
import socket
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from rtp_llm.api.http_protocol import HttpProtocol
from rtp_llm.api.tls_handshake import TlsHandshake
from rtp_llm.config import Config
from rtp_llm.errors import ConfigError, FatalError
from rtp_llm.machine.listen_addresses import is_machine_name, listen_addresses, listen_on

log = logging.getLogger(__name__)

GRACEFUL_SHUTDOWN_SECONDS = 3  # for responses that are still being written when the drain ends
BACKLOG = 2048


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """Returns one listening socket per address of `host`.

    Raises ConfigError (exit code 64) if `host` is not an address of this machine, FatalError (exit code 70) if the port
    is taken.
    """
    if is_machine_name(host):
        log.warning("HOST=%s is a host name, not an address: listening on all addresses", host)
    listeners: list[socket.socket] = []
    for address in listen_addresses(host):
        try:
            listeners.append(listen_on(address, port, BACKLOG))
        except OSError as error:
            for listener in listeners:
                listener.close()
            raise FatalError(f"HTTP cannot listen on {address} port {port} (START_PORT): {error.strerror}") from None
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
            raise ConfigError("SSL_KEYFILE is set without SSL_CERTFILE; allowed: both or neither", check="M-14")
        uvicorn_config.load()
    except OSError as error:  # an ssl.SSLError is one too
        files = f"SSL_CERTFILE={config.ssl_certfile}, SSL_KEYFILE={config.ssl_keyfile}"
        allowed = "a PEM certificate chain and its private key without a passphrase"
        reason = error.strerror or error
        raise ConfigError(f"{files}: cannot be used for TLS: {reason}; allowed: {allowed}", check="M-14") from None
    if uvicorn_config.ssl:
        # uvicorn would show a connection to its protocol only after the handshake, and allow it a minute.
        uvicorn_config.http_protocol_class = partial(TlsHandshake, uvicorn_config.ssl)  # type: ignore[assignment]
        uvicorn_config.ssl = None
    return uvicorn_config
