"""Builds the response of the Responses API: output items, delta by delta, and the events that stream them."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

from rtp_llm.api.chat import ChatChoice
from rtp_llm.api.compact_json import compact_json
from rtp_llm.text.output import OutputDelta

Fields = dict[str, Any]


class ResponseBuilder:
    """Builder of one response. Call `start`, `add` for each chunk of output, and one of `finish`, `fail` and `cancel`.
    They yield server-sent events with consecutive `sequence_number`; iterate over them even if nobody reads the events.
    """

    def __init__(self, model: str, choice: ChatChoice, echo: str, *, is_stored: bool):
        """`echo`: JSON object with the fields of the request that the response repeats."""
        self.id = f"resp_{secrets.token_hex(12)}"
        self.output: list[Fields] = []
        self._fields: Fields = {"id": self.id, "object": "response", "created_at": int(time.time()), "model": model}
        self._fields |= {"status": "in_progress", "error": None, "incomplete_details": None, "output": []}
        self._fields |= {"usage": None, "store": is_stored}
        self._choice, self._echo = choice, echo
        self._pieces: list[str] = []  # of the newest item
        self._logprobs: list[Fields] = []  # of the newest item
        self._call_index = -1  # of the newest item; -1 if it is no call
        self._sequence_number = 0

    def start(self) -> Iterator[str]:
        for status in ("created", "in_progress"):
            yield self._response_event(f"response.{status}")

    def add(self, deltas: list[OutputDelta], logprobs: list[Fields]) -> Iterator[str]:
        """Adds the parsed output of one chunk, and yields its events. The first text delta of the chunk gets all
        `logprobs`, the entries of the chunk's tokens.
        """
        for delta in deltas:
            if delta.call:
                if delta.call.index != self._call_index:
                    call = {"call_id": delta.call.id, "name": delta.call.name, "arguments": ""}
                    yield from self._open("function_call", "fc", call)
                    self._call_index = delta.call.index
                yield from self._append("function_call_arguments", delta.call.arguments, {})
            elif delta.reasoning:
                if not self._is_open("reasoning"):
                    yield from self._open("reasoning", "rs", {"summary": [], "content": []})
                yield from self._append("reasoning_text", delta.reasoning, {"content_index": 0})
            elif delta.content:
                if not self._is_open("message"):
                    yield from self._open("message", "msg", {"role": "assistant", "content": []})
                self._logprobs += logprobs
                yield from self._append("output_text", delta.content, {"content_index": 0, "logprobs": logprobs})
                logprobs = []

    def finish(self) -> Iterator[str]:
        """Yields the last events of a response that ended normally, or at its token limit (status "incomplete")."""
        status = "incomplete" if self._choice.finish_reason == "length" else "completed"
        yield from self._close(status)
        self._end(status)
        yield self._response_event(f"response.{status}")

    def fail(self, code: str, message: str) -> Iterator[str]:
        """Yields the last events of a response that failed."""
        yield from self._close("incomplete")
        self._end("failed", {"code": code, "message": message})
        yield self._response_event("response.failed")

    def cancel(self) -> Iterator[str]:
        """Ends a background response that its client has cancelled. Yields the events that end its open output item; as
        in OpenAI's API, there is no event for the cancellation.
        """
        yield from self._close("incomplete")
        self._end("cancelled")

    @property
    def status(self) -> str:
        return str(self._fields["status"])

    def to_json(self) -> str:
        """Returns the response so far, as JSON."""
        return f"{compact_json(self._fields)[:-1]},{self._echo[1:]}"

    def message(self) -> Fields:
        """Returns the output as a chat message with role assistant, for the conversation that a later request
        continues.
        """
        answer = self._choice.answer
        message: Fields = {"role": "assistant", "content": answer.content}
        message |= {"reasoning_content": answer.reasoning} if answer.reasoning else {}
        return message | ({"tool_calls": [c.to_json() for c in answer.calls]} if answer.has_calls else {})

    def _end(self, status: str, error: Fields | None = None) -> None:
        self._fields |= {"status": status, "error": error, "output": self.output, "usage": self._usage()}
        if status == "incomplete":
            self._fields["incomplete_details"] = {"reason": "max_output_tokens"}
        if status == "completed":
            self._fields["completed_at"] = int(time.time())

    def _is_open(self, item_type: str) -> bool:
        return bool(self.output) and self.output[-1]["type"] == item_type

    def _open(self, item_type: str, prefix: str, fields: Fields) -> Iterator[str]:
        yield from self._close("completed")
        item = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": item_type, "status": "in_progress", **fields}
        self.output.append(item)
        self._call_index = -1
        yield self._event("response.output_item.added", {"output_index": len(self.output) - 1, "item": item})
        if item_type in _PART_TYPES:
            yield self._event("response.content_part.added", self._place() | {"part": self._part("")})

    def _append(self, name: str, text: str, fields: Fields) -> Iterator[str]:
        if text:
            self._pieces.append(text)
            place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
            yield self._event(f"response.{name}.delta", place | fields | {"delta": text})

    def _close(self, status: str) -> Iterator[str]:
        if not self.output or self.output[-1]["status"] != "in_progress":
            return
        item, text, place = self.output[-1], "".join(self._pieces), self._place()
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            done = {"arguments": text, "name": item["name"]}
            yield self._event("response.function_call_arguments.done", place | done)
        else:
            part = self._part(text)
            item["content"] = [part]
            place |= {"content_index": 0}
            logprobs = {"logprobs": self._logprobs} if item["type"] == "message" else {}
            yield self._event(f"response.{part['type']}.done", place | {"text": text} | logprobs)
            yield self._event("response.content_part.done", place | {"part": part})
        self._pieces, self._logprobs = [], []
        yield self._event("response.output_item.done", {"output_index": len(self.output) - 1, "item": item})

    def _place(self) -> Fields:
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
        return place | ({"content_index": 0} if self.output[-1]["type"] in _PART_TYPES else {})

    def _part(self, text: str) -> Fields:
        part_type = _PART_TYPES[self.output[-1]["type"]]
        extra = {"annotations": [], "logprobs": self._logprobs} if part_type == "output_text" else {}
        return {"type": part_type, "text": text, **extra}

    def _usage(self) -> Fields:
        prompt, output = len(self._choice.prompt), self._choice.num_tokens
        cached = self._choice.chunks[0].cached_tokens if self._choice.chunks else 0
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": self._choice.num_reasoning_tokens},
            "total_tokens": prompt + output,
        }

    def _response_event(self, event_type: str) -> str:
        return self._frame(event_type, f'"response":{self.to_json()}')

    def _event(self, event_type: str, fields: Fields) -> str:
        return self._frame(event_type, compact_json(fields)[1:-1])

    def _frame(self, event_type: str, members: str) -> str:
        number = self._sequence_number
        self._sequence_number += 1
        head = f'"type":"{event_type}","sequence_number":{number}'
        return f"event: {event_type}\ndata: {{{head},{members}}}\n\n"


_PART_TYPES = {"message": "output_text", "reasoning": "reasoning_text"}
