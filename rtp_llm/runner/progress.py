"""Says how far loading is: a bar on a terminal, a line every few seconds elsewhere."""

import logging
import sys
import time

log = logging.getLogger(__name__)

LINE_SECONDS, BAR_SECONDS, BAR_WIDTH = 3.0, 0.1, 40


class ProgressBar:
    """Call it with the share done, 0 … 1. Says nothing where `silent` (all ranks but the part's first)."""

    def __init__(self, label: str, *, tty: bool, silent: bool):
        self.label, self.tty, self.silent = label, tty, silent
        self._started = time.monotonic()
        self._next = self._started + (BAR_SECONDS if tty else LINE_SECONDS)

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        if self.silent or (now < self._next and share < 1):
            return
        self._next = now + (BAR_SECONDS if self.tty else LINE_SECONDS)
        if self.tty:
            filled = round(share * BAR_WIDTH)
            bar = "#" * filled + "-" * (BAR_WIDTH - filled)
            sys.stdout.write(f"\r{self.label} [{bar}] {share:4.0%}" + ("\n" if share >= 1 else ""))
            sys.stdout.flush()
        elif share < 1:
            log.info("%s: %.0f%% after %.0f s", self.label, share * 100, now - self._started)
