"""Translates a request of the Messages API into OpenAI's chat request."""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from rtp_llm.api.anthropic.schema import Block, CountTokensRequest, Message, MessagesRequest, Tool, ToolChoice
from rtp_llm.errors import invalid_params, unsupported

log = logging.getLogger(__name__)
# Claude Code begins its system prompt with a line that differs in every request, so that no cached prefix would match.
BILLING_PREFIX = "x-anthropic-billing-header:"
_THOUGHT = ("thinking", "redacted_thinking")


def to_chat(body: CountTokensRequest) -> dict[str, Any]:
    """Returns the request as the fields of a ChatRequest. Raises RequestError 400 for content that is not text, such as
    images.
    """
    messages = [*_system_turns(body.system)]
    for index, message in enumerate(body.messages):
        messages += _turns(message, f"messages.{index}")
    fields: dict[str, Any] = {"model": body.model, "messages": messages}
    fields |= _tool_fields(body.tools or [], body.tool_choice)
    fields |= _thinking_fields(body)
    output_format = (body.output_config.format if body.output_config else None) or body.output_format
    if output_format:
        json_schema = {"name": "output", "schema": output_format.json_schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    if body.messages[-1].role == "assistant":  # the client has written the start of the response
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(body, MessagesRequest):
        fields |= {n: getattr(body, n) for n in ("max_tokens", "stream", "temperature", "top_p", "top_k")}
        fields["stop"] = body.stop_sequences or None
    return fields


def _system_turns(system: str | Sequence[Block] | None) -> list[dict[str, Any]]:
    blocks = [system] if isinstance(system, str) else [_text(block, "system") for block in system or ()]
    texts = [text for text in blocks if text and not text.startswith(BILLING_PREFIX)]
    return [{"role": "system", "content": "\n".join(texts)}] if texts else []


def _turns(message: Message, where: str) -> Iterator[dict[str, Any]]:
    """Yields the chat messages for one message: each tool result is a message of its own in OpenAI's API."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
    elif message.role == "assistant":
        yield _assistant_turn(message.content, where)
    else:
        texts: list[str] = []
        for block in message.content:
            if block.type == "tool_result":
                if texts:
                    yield {"role": message.role, "content": "\n".join(texts)}
                    texts = []
                yield _tool_turn(block, where)
            else:
                texts.append(_text(block, where))
        if texts:
            yield {"role": message.role, "content": "\n".join(texts)}


def _assistant_turn(blocks: Sequence[Block], where: str) -> dict[str, Any]:
    thoughts = [block.thinking or "" for block in blocks if block.type in _THOUGHT]
    calls = [_call(block, where) for block in blocks if block.type == "tool_use"]
    texts = [_text(block, where) for block in blocks if block.type not in (*_THOUGHT, "tool_use")]
    turn: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    if any(thoughts):
        turn["reasoning_content"] = "".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return turn


def _call(block: Block, where: str) -> dict[str, Any]:
    if not block.id or not block.name:
        raise invalid_params(f"{where}: a tool_use block needs its id and its name", where)
    arguments = json.dumps(block.input or {}, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _tool_turn(block: Block, where: str) -> dict[str, Any]:
    content = block.content
    text = content if isinstance(content, str) else "\n".join(_text(part, where) for part in content or ())
    text = f"Error: {text}" if block.is_error else text
    return {"role": "tool", "tool_call_id": block.tool_use_id or "", "content": text}


def _text(block: Block, where: str) -> str:
    if block.type != "text":
        raise unsupported(f"{where}: a {block.type!r} block is not supported: this model reads text only", where)
    if block.text is None:
        raise invalid_params(f"{where}: a text block needs its text", where)
    return block.text


def _tool_fields(tools: Sequence[Tool], choice: ToolChoice | None) -> dict[str, Any]:
    runnable = [tool for tool in tools if tool.type in (None, "custom")]
    dropped = sorted({tool.type for tool in tools if tool.type not in (None, "custom")})
    if dropped:
        log.info("left out tools of types that this server cannot run: %s", ", ".join(dropped)[:200])
    fields: dict[str, Any] = {"tools": [_function(tool) for tool in runnable] or None}
    if choice:
        named = {"type": "function", "function": {"name": choice.name or ""}}
        by_type: dict[str, Any] = {"auto": "auto", "none": "none", "any": "required", "tool": named}
        fields["tool_choice"] = by_type[choice.type]
        if choice.disable_parallel_tool_use:
            fields["parallel_tool_calls"] = False
    return fields


def _function(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema or {"type": "object", "properties": {}}
    return {"type": "function", "function": function | ({"strict": True} if tool.strict else {})}


def _thinking_fields(body: CountTokensRequest) -> dict[str, Any]:
    """Returns the fields that switch reasoning on or off. As with Anthropic's models, it is off unless requested."""
    thinks = body.thinking is not None and body.thinking.type != "disabled"
    fields: dict[str, Any] = {"enable_thinking": thinks}
    if body.thinking and body.thinking.budget_tokens and thinks:
        fields["thinking_budget"] = body.thinking.budget_tokens
    if body.output_config and body.output_config.effort:
        fields["reasoning_effort"] = body.output_config.effort
    if body.chat_template_kwargs:
        fields["chat_template_kwargs"] = body.chat_template_kwargs
    return fields
