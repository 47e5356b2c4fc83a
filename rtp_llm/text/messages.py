"""Converts messages, as clients send them, to the format that a chat template reads.

OpenAI's clients send null values, content in parts and arguments as JSON text. Templates test which keys are defined,
and each reads its own subset of formats, which is inferred from its source.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import nodes

from rtp_llm.text.json_depth import is_too_deep

Message = Mapping[str, Any]


class TemplateError(ValueError):
    """The messages cannot be rendered, or the template is invalid. The text is shown to the client or operator."""


class MessageFormat:
    """How a chat template reads messages: text or a list of parts, tool arguments as text or objects."""

    def __init__(self, source: str, tree: nodes.Template):
        self._accepts_parts = any(_iterates_content(loop.iter) for loop in tree.find_all(nodes.For))
        tests_for_string = any(test.name == "string" for test in tree.find_all(nodes.Test))
        self._requires_parts = self._accepts_parts and not tests_for_string
        self._accepts_null = _TESTS_FOR_NULL.search(source) is not None
        sums = (operand for node in tree.find_all((nodes.Add, nodes.Concat)) for operand in node.iter_child_nodes())
        self._concatenates_arguments = any(_key(operand) == "arguments" for operand in sums)
        self._requires_short_ids = _TESTS_FOR_SHORT_ID.search(source) is not None
        self._reasoning_names = [name for name in REASONING_NAMES if re.search(rf"\b{name}\b", source)]

    def normalize(self, message: Message) -> dict[str, Any]:
        """Returns the message in the format that the template expects. Raises TemplateError."""
        normalized = {key: value for key, value in message.items() if value is not None}
        normalized |= self._reasoning(normalized)
        content = normalized.get("content", normalized.pop("refusal", None))
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = [_text_part(part) for part in content]
            normalized["content"] = parts if self._accepts_parts else "".join(part["text"] for part in parts)
        elif isinstance(content, str):
            normalized["content"] = [{"type": "text", "text": content}] if self._requires_parts else content
        else:
            normalized["content"] = None if self._accepts_null else ""
        if "function_call" in normalized and "tool_calls" not in normalized:  # as before OpenAI had tools
            normalized["tool_calls"] = [{"type": "function", "function": normalized.pop("function_call")}]
        calls = normalized.pop("tool_calls", None)
        if calls:  # templates test whether the key is defined
            normalized["tool_calls"] = [self._tool_call(call) for call in calls] if isinstance(calls, list) else calls
        if self._requires_short_ids and isinstance(normalized.get("tool_call_id"), str):
            normalized["tool_call_id"] = _short_id(normalized["tool_call_id"])
        return normalized

    def _reasoning(self, message: Message) -> dict[str, Any]:
        """Returns a turn's reasoning under the names that the template reads, whatever name the client sends."""
        reasoning = next((message[name] for name in REASONING_NAMES if name in message), None)
        return {} if reasoning is None else {name: message.get(name, reasoning) for name in self._reasoning_names}

    def _tool_call(self, call: Any) -> Any:
        """Returns a tool call with its arguments as the template needs them: an object, or JSON text.

        Clients send JSON text, an object or, without arguments, "", "null", null or nothing. Text that is not JSON,
        since a model generated it, reaches the template unchanged.
        """
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        arguments = _parsed(function.get("arguments"))
        # A template that adds the arguments to a string needs JSON text; all others expect an object.
        if self._concatenates_arguments and not isinstance(arguments, str):
            text = function.get("arguments")
            is_set = isinstance(text, str) and text.strip() not in ("", "null")
            arguments = text if is_set else json.dumps(arguments, ensure_ascii=False)
        short_id = {"id": _short_id(call["id"])} if self._requires_short_ids and isinstance(call.get("id"), str) else {}
        return {**call, **short_id, "function": {**function, "arguments": arguments}}


REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")  # the first one that a message has counts
TEXT_PARTS = ("text", "input_text", "output_text")
# A template with `content is none` needs the null content of an assistant turn that only calls tools.
_TESTS_FOR_NULL = re.compile(r"\bcontent['\"]?\]?\s+is\s+(not\s+)?none\b", re.IGNORECASE)
# Mistral's templates refuse ids of tool calls that do not have nine characters.
_TESTS_FOR_SHORT_ID = re.compile(r"\bid['\"]?\]?\s*\|\s*length\s*!=\s*9\b")
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


def content_parts(content: Any) -> list[Any]:
    """Returns the content of a message, in whatever format, as a list of parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if isinstance(content, Sequence) else []


def _key(node: nodes.Node) -> Any:
    """Returns the last name in `message.content`, `message["content"]` or `content`, None for other expressions."""
    if isinstance(node, nodes.Getitem):
        return node.arg.value if isinstance(node.arg, nodes.Const) else None
    return getattr(node, "attr", getattr(node, "name", None))


def _iterates_content(node: nodes.Node) -> bool:
    """Returns whether `node`, over which a Jinja loop iterates, is a message's content, filtered or not."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    return bool(_key(node) == "content")


def _text_part(part: Any) -> dict[str, Any]:
    """Returns a content part as a part of type "text"."""
    part_type = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    key = "refusal" if part_type == "refusal" else "text"
    if part_type not in (*TEXT_PARTS, "refusal"):
        raise TemplateError(
            f"content parts of type {part_type!r} are not supported: this model reads text only; allowed: "
            f"{', '.join((*TEXT_PARTS, 'refusal'))}"
        )
    if not isinstance(part.get(key), str):
        raise TemplateError(f'a content part of type "{part_type}" needs its "{key}" as a string')
    return {**part, "type": "text", "text": part[key]}


def _parsed(arguments: Any) -> Any:
    """Returns the arguments of a call as an object, or unchanged if they are not a JSON object or nested too deeply."""
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else None
        except (ValueError, RecursionError):
            return arguments
        is_object = parsed is None or (isinstance(parsed, dict) and not is_too_deep(parsed))
        return (parsed or {}) if is_object else arguments
    return arguments or {}


def _short_id(call_id: str) -> str:
    """Returns an id of nine letters and digits, the same for the same `call_id`."""
    return call_id if _SHORT_ID.fullmatch(call_id) else hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]
