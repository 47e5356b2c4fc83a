"""The transport of an HTTP connection: closes it without losing the last response, and disconnects stalled clients."""

import asyncio
import fcntl
import math
import sys
import termios

LINGER_SECONDS = 1.0  # without input, until a connection is closed whose client may still be sending
PROGRESS_SECONDS = 30.0  # in which a client must read or send something, or it is cut


class ClientTransport:
    """The asyncio.Transport of one client's connection, with the methods that uvicorn uses. While `expects_input` is
    set, the client may still be sending a request; then `close` lingers, as nginx's lingering_close does.

    Closing a socket that has unread input sends a reset, and the client's kernel then discards the response (RFC 9112,
    section 9.6). So `close` first shuts down the sending side, then discards input for a while.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop = transport, loop
        self.write, self.abort, self.get_extra_info = transport.write, transport.abort, transport.get_extra_info
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading
        self.expects_input = False  # the request that is being read, or refused, is not complete
        self.is_lingering = False
        self._linger_until = 0.0
        self._linger_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def is_closing(self) -> bool:
        """Returns whether the connection is closing and accepts no more requests."""
        return self.is_lingering or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if self.expects_input:
            self.is_lingering = True
            self._linger_until = self._loop.time() + PROGRESS_SECONDS
            self.resume_reading()
            if self._transport.can_write_eof():  # not with TLS
                self._transport.write_eof()
            self.discard_input()
        else:
            self._transport.close()
        self.watch_writing()

    def discard_input(self) -> None:
        """Postpones the end of a connection that lingers after `close`: to LINGER_SECONDS from now, but at most to
        PROGRESS_SECONDS after `close`. `HttpProtocol` calls it for each input, and discards the input.
        """
        if self._linger_timer:
            self._linger_timer.cancel()
        end = min(self._loop.time() + LINGER_SECONDS, self._linger_until)
        self._linger_timer = self._loop.call_at(end, self._transport.close)

    def watch_writing(self, unsent_before: float = math.inf) -> None:
        """Aborts the connection if its client has received none of the unsent bytes since the last call. Calls itself
        again after PROGRESS_SECONDS, until nothing is unsent. `unsent_before`: number of unsent bytes at the last call.
        """
        self.stop_watching()
        unsent = self._transport.get_write_buffer_size() and self.num_unsent_bytes()
        if unsent and unsent >= unsent_before:
            self.abort()
        elif unsent:
            self._write_timer = self._loop.call_later(PROGRESS_SECONDS, self.watch_writing, unsent)

    def stop_watching(self) -> None:
        if self._write_timer:
            self._write_timer.cancel()
            self._write_timer = None

    def on_lost(self) -> None:
        """Cancels the timers that would end the connection. `HttpProtocol` calls it when the connection is lost."""
        self.stop_watching()
        if self._linger_timer:
            self._linger_timer.cancel()

    def num_unsent_bytes(self) -> int:
        """Returns the number of bytes that the client has not received, including those in the kernel's send buffer.

        That buffer takes megabytes at once: without it, the number would stay the same for a long time although a slow
        client reads. Returns 0 for a closed socket.
        """
        in_kernel = bytearray(4)
        try:
            fcntl.ioctl(self.get_extra_info("socket").fileno(), termios.TIOCOUTQ, in_kernel)
        except (OSError, ValueError):  # closed meanwhile
            return 0
        return self._transport.get_write_buffer_size() + int.from_bytes(in_kernel, sys.byteorder)
