"""Limits the number of HTTP connections, according to the limit on open files (ulimit -n).

Beyond it, closes connections without a request, the one that has waited longest first.
"""

import asyncio
import logging
import os
import resource
import time
from typing import Protocol

log = logging.getLogger("rtp_llm.api")

RESERVED_DESCRIPTORS = 32  # for probes, files and the engine's socket when clients use up the rest
MAX_DESCRIPTORS = 65_536
LOG_SECONDS = 60.0


class Connection(Protocol):
    """The interface of a connection that `ConnectionLimit` can close."""

    transport: asyncio.Transport


class ConnectionLimit:
    """Limit on the number of open HTTP connections. For a new connection beyond it, closes the connection that has
    waited longest for a request or, if all others have requests, the new one. Logs at most one line a minute about it.

    waiting  connections without a request, the one that has waited longest first
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.waiting: dict[Connection, None] = {}
        self._refused = 0
        self._logged_at = -LOG_SECONDS

    @classmethod
    def from_rlimit(cls) -> "ConnectionLimit":
        """Raises this process's soft limit on open files (RLIMIT_NOFILE) to the hard one, or to MAX_DESCRIPTORS if that
        is lower. Allows as many connections, less the files that are open and 2 * RESERVED_DESCRIPTORS; at least 8.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = max(soft, min(hard, MAX_DESCRIPTORS)) if hard != resource.RLIM_INFINITY else MAX_DESCRIPTORS
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return cls(max(8, wanted - len(os.listdir("/proc/self/fd")) - 2 * RESERVED_DESCRIPTORS))

    def admit(self, connection: Connection, num_open: int) -> None:
        """Registers a new connection as waiting for its first request. Beyond the limit, closes the connection that has
        waited longest for a request. If all others have requests, keeps the new one, as it may bring a health probe;
        closes it only if more connections are open than the limit plus RESERVED_DESCRIPTORS.

        `num_open`: number of open connections, including the new one.
        """
        self.waiting[connection] = None
        if num_open <= self.limit:
            return
        longest = next(iter(self.waiting))
        if longest is not connection:
            self.log_refusal("the ones that wait longest are closed")
            longest.transport.abort()
            self.waiting.pop(longest, None)
        elif num_open > self.limit + RESERVED_DESCRIPTORS:
            self.log_refusal("new ones are closed")
            connection.transport.abort()

    def log_refusal(self, action: str) -> None:
        self._refused += 1
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            text = "HTTP connections use up the limit on open files (%d connections): %s; %d times since the last line"
            log.warning(text, self.limit, action, self._refused)
            self._refused, self._logged_at = 0, time.monotonic()
