"""Server-sent events as a client sees them: frames cut from the bytes, and what they hold."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

SEPARATORS = (b"\r\n\r\n", b"\n\n")


def frames(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Each frame with its separator, as soon as it is complete; what follows the last one comes last."""
    held = b""
    for piece in pieces:
        held += piece
        while (end := _frame_end(held)) is not None:
            yield held[:end]
            held = held[end:]
    if held:
        yield held


def _frame_end(data: bytes) -> int | None:
    found = [data.index(s) + len(s) for s in SEPARATORS if s in data]
    return min(found, default=None)


def payload(frame: bytes) -> Any:
    """The JSON of a frame, or its text where it is a marker such as [DONE]."""
    text = frame.decode().strip().removeprefix("data:").strip()
    return text if text.lower() == "[done]" else json.loads(text)


def payloads(raw: bytes) -> list[Any]:
    return [payload(frame) for frame in frames([raw])]
