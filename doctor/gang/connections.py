"""TCP connections between the doctors of the parts: opens them, serves them, transfers test data and probes ports.

Closing a connection never waits long, since some links never deliver its last packets.
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address

from doctor.gang.messages import Greeting, new_nonce

DIAL_SECONDS = 3.0
CLOSE_SECONDS = 0.5
SMALL_MSS = 536  # bytes; the default MSS of IPv4, small enough for every link (RFC 9293, 3.7.1)
CHUNK_BYTES = 1 << 16
NUM_EPHEMERAL_PORTS = 3
CONNECT_ERRORS = {
    errno.ECONNREFUSED: "refused",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.ECONNRESET: "reset",
    errno.ETIMEDOUT: "timeout",
}
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def connect(host: str, port: int, *, small_mss: bool = False) -> Stream:
    """Opens a TCP connection. Raises TimeoutError after DIAL_SECONDS, and OSError if it fails otherwise.

    `small_mss`: limits TCP segments in both directions to SMALL_MSS bytes, for links that drop larger packets.
    """
    sock = socket.socket()
    try:
        sock.setblocking(False)
        if small_mss:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_MSS)
        async with asyncio.timeout(DIAL_SECONDS):
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
        return await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise


async def close(writer: asyncio.StreamWriter) -> None:
    """Closes a connection. Aborts it if unsent data is not delivered within CLOSE_SECONDS: some links lose all large
    packets, so that a normal close would wait forever.
    """
    writer.close()
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await writer.wait_closed()
    except OSError:  # includes TimeoutError
        writer.transport.abort()


def classify_error(error: OSError) -> str:
    """Returns the reason why a connection failed: refused, timeout, unreachable or reset."""
    return "timeout" if isinstance(error, TimeoutError) else CONNECT_ERRORS.get(error.errno or 0, "unreachable")


async def is_address_of(host: str, address: str) -> bool:
    """Returns whether the host name or IP address `host` resolves to the IP address `address`. Returns False if it does
    not resolve.
    """
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host, None)
    except OSError:
        return False
    return _plain_ip(address) in {_plain_ip(str(info[4][0])) for info in infos}


def _plain_ip(address: str) -> IPv4Address | IPv6Address:
    """Returns the address without a scope, and IPv4 not as mapped to IPv6."""
    ip = ip_address(address.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip


async def dial(host: str, port: int, *, expect_greeting: bool = True) -> str:
    """Tests whether a TCP port can be reached: connects to it and closes the connection. Returns the result: open,
    refused, timeout, unreachable, reset or not_doctor.

    `expect_greeting`: a doctor should listen on this port. If it does not send its first message, the greeting, the
    result is not_doctor.
    """
    try:
        reader, writer = await connect(host, port)
    except OSError as error:
        return classify_error(error)
    try:
        if expect_greeting:
            async with asyncio.timeout(DIAL_SECONDS):
                await Greeting.read(reader)
        return "open"
    except OSError:
        return "not_doctor"
    finally:
        await close(writer)


@asynccontextmanager
async def serve_ports(
    part: int, handle: Handler, responder: socket.socket | None, greeting_sockets: list[socket.socket]
) -> AsyncIterator[None]:
    """Serves the ports of this part's doctor while the context is open, so that other parts can exchange reports with
    it and test whether its ports can be reached.

    `responder`: socket of the doctor's own port; `handle` serves its connections. `greeting_sockets`: sockets of all
    other ports; a connection to them receives the doctor's greeting and is closed.
    """

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(Greeting(part, new_nonce()).pack())
            await writer.drain()
        await close(writer)

    async with AsyncExitStack() as stack:
        for sock in greeting_sockets:
            await stack.enter_async_context(_serve_socket(greet, sock))
        # The responder starts last, because another part dials the other ports as soon as the responder has replied.
        if responder:
            await stack.enter_async_context(_serve_socket(handle, responder))
        yield


@asynccontextmanager
async def _serve_socket(handle: Handler, sock: socket.socket) -> AsyncIterator[None]:
    """Serves a socket while the context is open. On exit, aborts all connections and waits for their handlers.

    Handlers are not cancelled, because asyncio logs the cancellation of a connection handler as an error.
    """
    connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        connections[task] = writer
        try:
            await handle(reader, writer)
        finally:
            del connections[task]

    server = await asyncio.start_server(on_connection, sock=sock)
    try:
        yield
    finally:
        server.close()
        await asyncio.sleep(0)  # lets the handlers of the latest connections start and register themselves
        for writer in connections.values():
            writer.transport.abort()
        await asyncio.gather(*connections)


def bind_ephemeral(address: str) -> list[socket.socket]:
    """Returns NUM_EPHEMERAL_PORTS sockets, bound to `address` on ports that the kernel chooses, as NCCL does. Other
    parts connect to them to test whether a firewall blocks such ports.
    """
    sockets = []
    for _ in range(NUM_EPHEMERAL_PORTS):
        sock = socket.socket()
        sock.bind((address, 0))
        sockets.append(sock)
    return sockets


async def send_bytes(writer: asyncio.StreamWriter, count: int, stall_timeout: float | None = None) -> None:
    """Sends `count` random bytes, rounded down to a multiple of CHUNK_BYTES, to measure the throughput of a link.

    Raises TimeoutError if no chunk can be written for `stall_timeout` seconds.
    """
    chunk = os.urandom(CHUNK_BYTES)  # a tunnel that compresses data would otherwise look faster than it is
    for _ in range(count // len(chunk)):
        writer.write(chunk)
        async with asyncio.timeout(stall_timeout):
            await writer.drain()


async def receive_bytes(reader: asyncio.StreamReader, count: int, stall_timeout: float | None = None) -> int:
    """Receives and discards `count` bytes, to measure the throughput of a link. Returns `count`.

    Raises TimeoutError if no bytes arrive for `stall_timeout` seconds, and ConnectionResetError if the other side
    closes the connection early.
    """
    remaining = count
    while remaining:
        async with asyncio.timeout(stall_timeout):
            data = await reader.read(min(remaining, CHUNK_BYTES))
        if not data:
            raise ConnectionResetError("the other side closed the connection before all test data arrived")
        remaining -= len(data)
    return count
