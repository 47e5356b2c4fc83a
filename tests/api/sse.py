"""Parses server-sent events from the bytes of a response."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

SEPARATORS = (b"\r\n\r\n", b"\n\n")


def split_events(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields each event with its separator as soon as it is complete, and at the end the incomplete rest.

    Leaves out comments, with which a slow server keeps the connection alive.
    """
    buffer = b""
    for chunk in chunks:
        buffer += chunk
        while (end := _event_end(buffer)) is not None:
            if not buffer.startswith(b":"):
                yield buffer[:end]
            buffer = buffer[end:]
    if buffer:
        yield buffer


def _event_end(data: bytes) -> int | None:
    ends = [data.index(s) + len(s) for s in SEPARATORS if s in data]
    return min(ends, default=None)


def payload(event: bytes) -> Any:
    """Returns the JSON of an event, or its text if it is a marker such as [DONE]."""
    text = event.decode().strip().removeprefix("data:").strip()
    return text if text.lower() == "[done]" else json.loads(text)


def payloads(raw: bytes) -> list[Any]:
    return [payload(event) for event in split_events([raw])]
