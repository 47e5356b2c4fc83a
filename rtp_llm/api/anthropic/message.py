"""Builds the response of the Messages API: content blocks, delta by delta, and the events that stream them."""

import json
import secrets
from collections.abc import Iterator
from typing import Any

from rtp_llm.api.chat import ChatChoice
from rtp_llm.text.output import OutputDelta, ToolCallDelta

Event = dict[str, Any]
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageBuilder:
    """Builder of one response message. For a stream, call `start`, `add` for each delta and `finish`, and send the
    events; otherwise `add`, `finish` and then `message`. `blocks`: the content blocks so far.
    """

    def __init__(self, model: str, choice: ChatChoice):
        self.id = f"msg_{secrets.token_hex(12)}"
        self.blocks: list[dict[str, Any]] = []
        self._model, self._choice = model, choice
        self._pieces: list[str] = []  # of the newest block
        self._call_index = -1  # of the newest block; -1 if it is no call

    def start(self) -> Iterator[Event]:
        """Yields the event `message_start`. Call it after the engine's first output, whose number of cached prompt
        tokens the event's `usage` contains.
        """
        message = self._header() | {"content": [], "stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": message | {"usage": self._usage()}}

    def add(self, delta: OutputDelta) -> Iterator[Event]:
        """Yields the events for a piece of output (content, reasoning or a tool call). A piece of another kind, or of
        another tool call, first ends the current content block and starts a new one.
        """
        if delta.call:
            if delta.call.index != self._call_index:
                yield from self._open(_call_block(delta.call), delta.call.index)
            yield from self._append("input_json_delta", "partial_json", delta.call.arguments)
        elif delta.reasoning:
            if not self._is_open("thinking"):
                yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
            yield from self._append("thinking_delta", "thinking", delta.reasoning)
        elif delta.content:
            if not self._is_open("text"):
                yield from self._open({"type": "text", "text": ""})
            yield from self._append("text_delta", "text", delta.content)

    def finish(self) -> Iterator[Event]:
        """Yields the last events: content_block_stop, message_delta, message_stop."""
        yield from self._close()
        yield {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def message(self) -> dict[str, Any]:
        """Returns the whole message as a JSON object, with the arguments of tool calls parsed. Call `finish` first."""
        return self._header() | {"content": self.blocks} | self._stop() | {"usage": self._usage()}

    def _is_open(self, block_type: str) -> bool:
        return bool(self.blocks) and self.blocks[-1]["type"] == block_type

    def _open(self, block: dict[str, Any], call_index: int = -1) -> Iterator[Event]:
        yield from self._close()
        self.blocks.append(block)
        self._call_index = call_index
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _append(self, delta_type: str, key: str, text: str) -> Iterator[Event]:
        if text:
            self._pieces.append(text)
            index = len(self.blocks) - 1
            yield {"type": "content_block_delta", "index": index, "delta": {"type": delta_type, key: text}}

    def _close(self) -> Iterator[Event]:
        if not self.blocks:
            return
        block, text = self.blocks[-1], "".join(self._pieces)
        block[_TEXT_KEYS[block["type"]]] = _parse_arguments(text) if block["type"] == "tool_use" else text
        self._pieces = []
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _header(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._model}

    def _stop(self) -> dict[str, Any]:
        reason = _STOP_REASONS.get(self._choice.finish_reason or "", "end_turn")
        stop_string = self._choice.chunks[-1].stop_string if self._choice.chunks else None
        if reason == "end_turn" and stop_string is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": stop_string}
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> dict[str, int]:
        cached = self._choice.chunks[0].cached_tokens if self._choice.chunks else 0
        return {
            "input_tokens": len(self._choice.prompt) - cached,  # Anthropic counts cached tokens apart
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._choice.num_tokens,
        }


_TEXT_KEYS = {"text": "text", "thinking": "thinking", "tool_use": "input"}


def _call_block(call: ToolCallDelta) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}


def _parse_arguments(text: str) -> dict[str, Any]:
    """Returns the arguments of a call. Invalid JSON, such as a truncated one, becomes {"INVALID_JSON": text}."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {"INVALID_JSON": text}
    return arguments if isinstance(arguments, dict) else {"INVALID_JSON": text}
