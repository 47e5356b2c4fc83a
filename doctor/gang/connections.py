"""Connections between parts: dialled, listened on, filled with bytes, and ended without waiting for what got stuck."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from doctor.gang.messages import Greeting, new_nonce

DIAL_SECONDS = 3.0
CLOSE_SECONDS = 0.5
SMALL_MSS = 536  # bytes: what every IPv4 link must carry (RFC 9293, 3.7.1)
CHUNK_BYTES = 1 << 16
NUM_EPHEMERAL_PORTS = 3
REFUSALS = {
    errno.ECONNREFUSED: "refused",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.ECONNRESET: "reset",
    errno.ETIMEDOUT: "timeout",
}
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def connect(host: str, port: int, *, small: bool = False) -> Stream:
    """`small`: both ends keep to segments that pass where larger ones are lost. Raises OSError, TimeoutError."""
    sock = socket.socket()
    try:
        sock.setblocking(False)
        if small:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_MSS)
        async with asyncio.timeout(DIAL_SECONDS):
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
        return await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise


async def close(writer: asyncio.StreamWriter) -> None:
    """What is still unsent is given up after a moment: where large segments are lost it would never go."""
    writer.close()
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await writer.wait_closed()
    except OSError:  # TimeoutError is one
        writer.transport.abort()


def classify_error(error: OSError) -> str:
    """What became of a connection that was not made: refused, timeout, unreachable, reset."""
    return "timeout" if isinstance(error, TimeoutError) else REFUSALS.get(error.errno or 0, "unreachable")


async def dial(host: str, port: int, *, greeted: bool = True) -> str:
    """What becomes of a connection: open, refused, timeout, unreachable, reset; foreign where a doctor was to greet and
    somebody else listens."""
    try:
        reader, writer = await connect(host, port)
    except OSError as error:
        return classify_error(error)
    try:
        if greeted:
            async with asyncio.timeout(DIAL_SECONDS):
                await Greeting.read(reader)
        return "open"
    except OSError:
        return "foreign"
    finally:
        await close(writer)


@asynccontextmanager
async def serve_ports(
    part: int, serve: Handler, responder: socket.socket | None, greeters: list[socket.socket]
) -> AsyncIterator[None]:
    """Serves the responder's port in full; the others greet and hang up."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(Greeting(part, new_nonce()).pack())
            await writer.drain()
        await close(writer)

    async with AsyncExitStack() as stack:
        if responder:
            await stack.enter_async_context(_serve_socket(serve, responder))
        for sock in greeters:
            await stack.enter_async_context(_serve_socket(greet, sock))
        yield


@asynccontextmanager
async def _serve_socket(handle: Handler, sock: socket.socket) -> AsyncIterator[None]:
    """Ends with all its connections: each is cut off, and its task waited for. Cancelled, asyncio would print it."""
    tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def taken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks[task] = writer
        try:
            await handle(reader, writer)
        finally:
            del tasks[task]

    server = await asyncio.start_server(taken, sock=sock)
    try:
        yield
    finally:
        server.close()
        await asyncio.sleep(0)  # whoever was accepted just now
        for writer in tasks.values():
            writer.transport.abort()
        await asyncio.gather(*tasks)


def bind_ephemeral(address: str) -> list[socket.socket]:
    """Ports as NCCL takes them: whatever the kernel gives, on the address that it would use."""
    found = []
    for _ in range(NUM_EPHEMERAL_PORTS):
        sock = socket.socket()
        sock.bind((address, 0))
        found.append(sock)
    return found


async def send_bytes(writer: asyncio.StreamWriter, count: int, stall_timeout: float | None = None) -> None:
    """Raises TimeoutError where nothing more is taken for `patience` seconds."""
    piece = os.urandom(CHUNK_BYTES)  # what a link compresses would look faster than it is
    for _ in range(count // len(piece)):
        writer.write(piece)
        async with asyncio.timeout(stall_timeout):
            await writer.drain()


async def receive_bytes(reader: asyncio.StreamReader, count: int, stall_timeout: float | None = None) -> int:
    """Reads as many bytes and drops them. Raises TimeoutError where nothing more comes for `patience` seconds."""
    left = count
    while left:
        async with asyncio.timeout(stall_timeout):
            data = await reader.read(min(left, CHUNK_BYTES))
        if not data:
            raise ConnectionResetError("the connection was closed")
        left -= len(data)
    return count
