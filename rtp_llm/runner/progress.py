"""Progress of loading weights: a bar on a terminal, otherwise a log line every few seconds."""

import logging
import sys
import time

log = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS, REDRAW_INTERVAL_SECONDS, BAR_WIDTH = 3.0, 0.1, 40


class ProgressBar:
    """Callback that shows the fraction loaded, 0 … 1.

    `tty`: draw a bar on stdout instead of logging. `silent`: show nothing (every rank of a part except its first).
    """

    def __init__(self, label: str, *, tty: bool, silent: bool):
        self.label, self.tty, self.silent = label, tty, silent
        self._started = time.monotonic()
        self._next_update = self._started + (REDRAW_INTERVAL_SECONDS if tty else LOG_INTERVAL_SECONDS)

    def __call__(self, fraction: float) -> None:
        now = time.monotonic()
        if self.silent or (now < self._next_update and fraction < 1):
            return
        self._next_update = now + (REDRAW_INTERVAL_SECONDS if self.tty else LOG_INTERVAL_SECONDS)
        if self.tty:
            filled = round(fraction * BAR_WIDTH)
            bar = "#" * filled + "-" * (BAR_WIDTH - filled)
            sys.stdout.write(f"\r{self.label} [{bar}] {fraction:4.0%}" + ("\n" if fraction >= 1 else ""))
            sys.stdout.flush()
        elif fraction < 1:
            log.info("%s: %.0f%% loaded after %.0f s", self.label, fraction * 100, now - self._started)
