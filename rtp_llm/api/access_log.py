"""The access log: one line per HTTP request, with the request's id, token counts and times as fields.

The middleware starts a record per request. Any code that handles the request can add to it through `current()`.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("rtp_llm.access")

SAFE_ID = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")


@dataclass(eq=False)
class SequenceRecord:
    """What the access log counts of one generated sequence: tokens, times and finish reason. Times in milliseconds,
    except `first_token_at` (time.monotonic(); None until the first token).

    `prompt_key` is equal for the n sequences of one prompt, so that the log line counts the prompt's tokens once.
    """

    prompt_key: int
    prompt_tokens: int
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_ms: float | None = None
    first_token_at: float | None = None
    finish: str | None = None


@dataclass
class AccessRecord:
    """Fields of the access log for one HTTP request.

    `started`, `body_read`: time.monotonic() when the request started and when its whole body had been read.
    `ignored_fields`: names of body fields that have no effect; sent in a response header only, not logged.
    """

    request_id: str
    ignored_fields: str = ""
    started: float = field(default_factory=time.monotonic)
    body_read: float = field(default_factory=time.monotonic)
    sequences: list[SequenceRecord] = field(default_factory=list)

    def add_sequence(self, prompt: Sized) -> SequenceRecord:
        self.sequences.append(SequenceRecord(id(prompt), len(prompt)))
        return self.sequences[-1]

    def fields(self) -> dict[str, Any]:
        """Returns the request's token counts and times; empty if it started no sequence. Counts each prompt once.

        queue_ms is the longest queue time of its sequences, ttft_ms the time to the first token of any sequence.
        """
        if not self.sequences:
            return {}
        by_prompt: dict[int, SequenceRecord] = {}
        for sequence in self.sequences:
            by_prompt.setdefault(sequence.prompt_key, sequence)
        first_token_at = min((s.first_token_at for s in self.sequences if s.first_token_at), default=None)
        return {
            "prompt_tokens": sum(s.prompt_tokens for s in by_prompt.values()),
            "cached_tokens": sum(s.cached_tokens for s in by_prompt.values()),
            "output_tokens": sum(s.output_tokens for s in self.sequences),
            "queue_ms": max((round(s.queue_ms, 1) for s in self.sequences if s.queue_ms is not None), default=None),
            "ttft_ms": round((first_token_at - self.started) * 1000, 1) if first_token_at else None,
            "finish": ",".join(sorted({s.finish or "error" for s in self.sequences})),
        }


_current: ContextVar[AccessRecord | None] = ContextVar("access_record", default=None)


def start(header: str | None) -> AccessRecord:
    """Starts and returns the record of the HTTP request that the current asyncio task handles.

    header  the client's `X-Request-Id`, used as the request's id if it has at most 128 characters, all of them
            letters, digits or ._~:/+=@-; otherwise the id is random
    """
    is_safe = header is not None and SAFE_ID.fullmatch(header)
    record = AccessRecord(header if header and is_safe else secrets.token_hex(12))
    _current.set(record)
    return record


def current() -> AccessRecord:
    """Returns the record of the HTTP request that the current asyncio task handles; outside a request, a new record
    that is never logged.
    """
    return _current.get() or AccessRecord("")


def write(record: AccessRecord, request: Mapping[str, Any]) -> None:
    """Logs an HTTP request in one line: its id, the fields in `request`, the token counts and times, the duration.

    `request`: client address, name of the API key, method, path and status.
    """
    duration_ms = round((time.monotonic() - record.started) * 1000, 1)
    fields = {"request_id": record.request_id, **request, **record.fields(), "duration_ms": duration_ms}
    text = " ".join(f"{name}={_quoted(value)}" for name, value in fields.items() if value not in (None, ""))
    log.info(text, extra={"fields": fields})


def _quoted(value: object) -> str:
    """Returns the value as one word, so that no path can forge a field or a line."""
    text = str(value)
    return text if text.isprintable() and " " not in text and '"' not in text else json.dumps(text)
