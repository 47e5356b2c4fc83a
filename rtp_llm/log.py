"""Sets up logging: one line per event with the part and process as prefix, or one JSON object per line."""

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
    """Formats a record as a JSON object: time (UTC), level, who ("part0 rank1"), logger, message, exception if any.

    Adds the items of a record's `extra={"fields": {…}}` as keys of the object.
    """

    converter = time.gmtime  # type: ignore[assignment]  # the documented way to log in UTC

    def __init__(self, process: str):
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        event = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "who": self.process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False)


def setup(process: str, level: str = "INFO", stream: TextIO = sys.stdout, style: Format = "text") -> None:
    """Configures logging: records of `level` and above go to `stream`, as `[process] time LEVEL module: text` or as
    JSON.

    `process` is "part0", "part0 rank1", "part0 api" …; supervisord passes the lines on unchanged.
    """
    handler = logging.StreamHandler(stream)
    text_formatter = logging.Formatter(f"[{process}] %(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter(process) if style == "json" else text_formatter)
    logging.basicConfig(level=LEVELS[level], handlers=[handler], force=True)
    # What no line shows need not be found out for each (logging HOWTO, "Optimization").
    logging._srcfile = None  # type: ignore[attr-defined]
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.captureWarnings(True)


def set_level(level: str) -> None:
    """Changes the log level of this process. Raises KeyError unless it is DEBUG, INFO, WARN, WARNING or ERROR, in upper
    or lower case.
    """
    logging.getLogger().setLevel(LEVELS[level.upper()])
