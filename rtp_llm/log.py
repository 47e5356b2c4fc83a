"""Logging set up in one place: one line an event, prefixed with the part and the process it comes from, or JSON."""

import json
import logging
import sys
import time
from typing import Literal, TextIO

LEVELS = {
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
}
Format = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """An object a line: time (UTC), level, who ("part0 rank1"), logger, message, and exception where there is one."""

    converter = time.gmtime  # type: ignore[assignment]  # the documented way to log in UTC

    def __init__(self, who: str):
        super().__init__()
        self.who = who

    def format(self, record: logging.LogRecord) -> str:
        moment = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        event = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "who": self.who,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False)


def setup(who: str, level: str = "INFO", stream: TextIO = sys.stdout, style: Format = "text") -> None:
    """Sends records of `level` and above to `stream`: as `[who] time LEVEL module: text`, or as JSON.

    `who` is "part0", "part0 rank1", "part0 api" …; the supervisor passes the lines through unchanged.
    """
    handler = logging.StreamHandler(stream)
    text = logging.Formatter(f"[{who}] %(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter(who) if style == "json" else text)
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)
    logging.captureWarnings(True)


def set_level(level: str) -> None:
    """Changes the level of this process. Raises KeyError on a name that is not in LEVELS."""
    logging.getLogger().setLevel(LEVELS[level.upper()])
