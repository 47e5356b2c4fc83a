"""The limit on HTTP connections, derived from the limit on open files."""

import logging
import os
import resource
import time

log = logging.getLogger("rtp_llm.api")

RESERVED_DESCRIPTORS = 32  # for probes, files and the engine's socket when clients use up the rest
MAX_DESCRIPTORS = 65_536
LOG_SECONDS = 60.0


class ConnectionLimit:
    """The number of HTTP connections that the limit on open files allows. Logs refusals, at most one line a minute."""

    def __init__(self, limit: int):
        self.limit = limit
        self._refused = 0
        self._logged_at = -LOG_SECONDS

    @classmethod
    def from_rlimit(cls) -> "ConnectionLimit":
        """Raises this process's soft limit on open files, and returns that limit less a reserve."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = max(soft, min(hard, MAX_DESCRIPTORS)) if hard != resource.RLIM_INFINITY else MAX_DESCRIPTORS
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return cls(max(8, wanted - len(os.listdir("/proc/self/fd")) - 2 * RESERVED_DESCRIPTORS))

    def log_refusal(self, action: str) -> None:
        self._refused += 1
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            text = "HTTP connections use up the limit on open files (%d connections): %s; %d times since the last line"
            log.warning(text, self.limit, action, self._refused)
            self._refused, self._logged_at = 0, time.monotonic()
