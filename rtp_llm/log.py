"""Logging set up in one place: one line an event, prefixed with the part and the process it comes from."""

import logging
import sys
from typing import TextIO

LEVELS = {
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
}


def setup(who: str, level: str = "INFO", stream: TextIO = sys.stdout) -> None:
    """Sends records of `level` and above to `stream` as `[who] time LEVEL module: text`.

    `who` is "part0", "part0 rank1", "part0 api" …; the supervisor passes the lines through unchanged.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(f"[{who}] %(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)
    logging.captureWarnings(True)


def set_level(level: str) -> None:
    """Changes the level of this process. Raises KeyError on a name that is not in LEVELS."""
    logging.getLogger().setLevel(LEVELS[level.upper()])
