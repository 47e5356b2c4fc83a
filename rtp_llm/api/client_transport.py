"""The transport of an HTTP connection, which ends so that the last answer arrives, and never waits for ever."""

import asyncio
import fcntl
import math
import sys
import termios

LINGER_SECONDS = 1.0  # without input, until a connection is closed whose client may still be sending
PROGRESS_SECONDS = 30.0  # in which a client must read or send something, or it is cut


class ClientTransport:
    """What uvicorn uses of a transport. `close` is a lingering close, as nginx has it, if `expects_input` is set.

    A socket that is closed with unread input sends a reset, and a reset makes the client's kernel throw away the answer
    (RFC 9112, section 9.6). So the answer is followed by the end of the stream, and input is discarded for a while.
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
        """Returns whether no more requests are served."""
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
        """Is called for the input of a lingering connection: starts the time without input anew, within a limit."""
        if self._linger_timer:
            self._linger_timer.cancel()
        end = min(self._loop.time() + LINGER_SECONDS, self._linger_until)
        self._linger_timer = self._loop.call_at(end, self._transport.close)

    def watch_writing(self, unsent_before: float = math.inf) -> None:
        """Aborts the connection once its client has read nothing for PROGRESS_SECONDS although there is something."""
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
        """Ends all timers."""
        self.stop_watching()
        if self._linger_timer:
            self._linger_timer.cancel()

    def num_unsent_bytes(self) -> int:
        """Returns the bytes that the client has not received. The kernel's buffer counts too: it takes megabytes at
        once, so a slow client seems to make no progress for long.
        """
        in_kernel = bytearray(4)
        try:
            fcntl.ioctl(self.get_extra_info("socket").fileno(), termios.TIOCOUTQ, in_kernel)
        except (OSError, ValueError):  # closed meanwhile
            return 0
        return self._transport.get_write_buffer_size() + int.from_bytes(in_kernel, sys.byteorder)
