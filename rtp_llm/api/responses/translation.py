"""Translates a request of the Responses API into a chat request, and collects the fields that its response repeats."""

import logging
from collections.abc import Sequence
from typing import Any

from rtp_llm.api.compact_json import compact_json
from rtp_llm.api.responses.schema import InputItem, Part, ResponsesRequest, Tool, ToolChoice
from rtp_llm.errors import invalid_params, unsupported

log = logging.getLogger(__name__)
LOGPROBS = "message.output_text.logprobs"  # in `include`
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def to_chat(body: ResponsesRequest, history: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Returns the request as the fields of a ChatRequest. `history`: the chat messages up to the response that the
    request continues. Raises RequestError 400 for fields and items that are not supported.
    """
    for name in ("conversation", "prompt"):
        if getattr(body, name):
            raise unsupported(f"{name} is not supported: send the whole conversation as input", name)
    if body.truncation == "auto":
        raise unsupported("truncation='auto' is not supported: leave out old turns, or use 'disabled'", "truncation")
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": [*instructions, *history, *input_messages(body)],
        "max_completion_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        **{n: getattr(body, n) for n in ("temperature", "top_p", "stream", "user", "seed", "chat_template_kwargs")},
    }
    if LOGPROBS in (body.include or ()):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return fields | _tool_fields(body.tools or [], body.tool_choice) | _format_fields(body)


def input_messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Returns the request's `input` as chat messages. Reasoning and tool calls become parts of an assistant message.
    Raises RequestError 400 for items that are not supported.
    """
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}]
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(body.input):
        _add_item(messages, item, f"input.{index}")
    if not messages:
        raise invalid_params("input has no item that this server can use: send a message or a tool's output", "input")
    return messages


def _add_item(messages: list[dict[str, Any]], item: InputItem, where: str) -> None:
    if item.type == "message":
        if item.role is None:
            raise invalid_params(f"{where}: a message needs a role", where)
        text = _text(item.content, where)
        if item.role == "assistant":
            turn = _assistant_turn(messages, continues="content")
            turn["content"] = text
        else:
            messages.append({"role": item.role, "content": text})
    elif item.type == "reasoning":
        thoughts = _text(item.content or item.summary, where)
        if thoughts:
            _assistant_turn(messages, continues="reasoning_content")["reasoning_content"] = thoughts
    elif item.type in ("function_call", "custom_tool_call"):
        calls = _assistant_turn(messages, continues="").setdefault("tool_calls", [])
        arguments = item.arguments if item.type == "function_call" else item.input
        function = {"name": item.name or "", "arguments": arguments or ""}
        calls.append({"id": item.call_id or "", "type": "function", "function": function})
    elif item.type in ("function_call_output", "custom_tool_call_output"):
        messages.append({"role": "tool", "tool_call_id": item.call_id or "", "content": _text(item.output, where)})
    elif item.type == "item_reference":
        raise unsupported(f"{where}: an item_reference is not supported: send the item itself", where)
    else:
        log.info("left out an input item of type %.64r: this server has no such tool", item.type)


def _assistant_turn(messages: list[dict[str, Any]], continues: str) -> dict[str, Any]:
    """Returns the assistant message for an item: the last message, or a new one if that has `continues` already."""
    if not messages or messages[-1]["role"] != "assistant" or (continues and messages[-1].get(continues)):
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(content: str | Sequence[Part] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_part_text(part, where) for part in content)


def _part_text(part: Part, where: str) -> str:
    if part.type == "refusal":
        return part.refusal or ""
    if part.type not in _TEXT_PARTS:
        raise unsupported(f"{where}: a {part.type!r} part is not supported: this model reads text only", where)
    return part.text or ""


def _tool_fields(tools: Sequence[Tool], choice: str | ToolChoice | None) -> dict[str, Any]:
    functions = [tool for tool in tools if tool.type == "function"]
    dropped = sorted({tool.type for tool in tools} - {"function"})
    if dropped:
        log.info("left out tools of types that this server cannot run: %s", ", ".join(dropped)[:200])
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
        names = {tool.get("name") for tool in choice.tools or ()}
        functions = [tool for tool in functions if tool.name in names]
        choice = choice.mode or "auto"
    elif isinstance(choice, ToolChoice):
        if choice.type != "function":
            message = f"tool_choice: a tool of type {choice.type!r} is not supported; allowed: function"
            raise unsupported(message, "tool_choice")
        return {
            "tools": [_function(tool) for tool in functions] or None,
            "tool_choice": {"type": "function", "function": {"name": choice.name or ""}},
        }
    return {"tools": [_function(tool) for tool in functions] or None, "tool_choice": choice}


def _function(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name or "", "description": tool.description, "parameters": tool.parameters}
    function["strict"] = tool.strict or None
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _format_fields(body: ResponsesRequest) -> dict[str, Any]:
    text_format = body.text.format if body.text else None
    if text_format is None:
        return {}
    if text_format.type != "json_schema":
        return {"response_format": {"type": text_format.type}}
    json_schema: dict[str, Any] = {"name": text_format.name or "output", "schema": text_format.json_schema}
    if text_format.strict is not None:
        json_schema["strict"] = text_format.strict
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


def echoed_fields(body: ResponsesRequest) -> dict[str, Any]:
    """Returns the request's fields that the response repeats."""
    raw = body.model_dump(by_alias=True, exclude_unset=True)
    text_format = (raw.get("text") or {}).get("format") or {"type": "text"}
    return {
        "background": bool(body.background),
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "temperature": body.temperature,
        "text": {"format": text_format},
        "tool_choice": raw.get("tool_choice") or "auto",
        "tools": [_echoed_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def input_items_json(body: ResponsesRequest) -> str:
    """Returns the input as a JSON array of items, each with an id."""
    if isinstance(body.input, str):
        content = [{"type": "input_text", "text": body.input}]
        items: list[dict[str, Any]] = [{"type": "message", "role": "user", "content": content}]
    else:
        items = [item.model_dump(exclude_none=True) for item in body.input]
    numbered = [{"id": f"item_{index}", **item} for index, item in enumerate(items)]
    return compact_json(numbered)


def _echoed_tool(tool: Tool) -> dict[str, Any]:
    echoed = tool.model_dump(exclude_none=True)
    return {"parameters": None, "strict": None, **echoed} if tool.type == "function" else echoed
