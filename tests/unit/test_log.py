"""Log lines as text and as JSON."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from rtp_llm import log as logs


@pytest.fixture(autouse=True)
def restore_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level


def test_text_line_starts_with_the_process() -> None:
    stream = io.StringIO()
    logs.setup("part0 rank1", stream=stream)
    logging.getLogger("some.module").info("%d of %d", 1, 2)
    assert stream.getvalue().startswith("[part0 rank1] ")
    assert stream.getvalue().endswith(" INFO some.module: 1 of 2\n")


def test_json_has_one_object_per_line_for_any_message() -> None:
    stream = io.StringIO()
    logs.setup("part1 api", "DEBUG", stream, "json")
    logging.getLogger("x").warning('two\nlines and a "quote" and é')
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("it failed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["who"], first["level"], first["logger"]) == ("part1 api", "WARNING", "x")
    assert first["message"] == 'two\nlines and a "quote" and é'
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first["time"])).total_seconds()) < 3600, "it is UTC"
    assert "ValueError: broken" in second["exception"]
