"""Tool options of a chat request: which functions the model may call, and whether it must call one."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rtp_llm.api.schema import ChatRequest
from rtp_llm.errors import invalid_params
from rtp_llm.text.json_schema import GrammarError, check_shapes
from rtp_llm.text.tools import Tool

log = logging.getLogger(__name__)

Choice = Literal["none", "auto", "required"]
_NAME = re.compile(r"[\w.:/-]{1,128}")  # OpenAI allows [a-zA-Z0-9_-]{1,64}


@dataclass(frozen=True)
class ToolUse:
    """The tool options of a chat request.

    tools     the functions that the model may call: those that `tool_choice` names, otherwise all in the request
    choice    "none": the model must not call one; "auto": it may; "required": it must
    parallel  whether it may make several calls
    """

    tools: tuple[Tool, ...] = ()
    choice: Choice = "none"
    parallel: bool = True

    @property
    def is_constrained(self) -> bool:
        """True if a grammar is needed to enforce the request's tool options."""
        if self.choice == "auto":
            return not self.parallel or any(tool.strict for tool in self.tools)
        return self.choice == "required"


def rendered_tools(body: ChatRequest) -> list[dict[str, Any]]:
    """Returns the tools that the chat template gets: the functions in `tools`, none if `tool_choice` is "none". Leaves
    out other types of tools, such as web search, which only OpenAI's servers can run.
    """
    tools = body.tools or []
    dropped = sorted({str(tool.get("type"))[:64] for tool in tools if tool.get("type", "function") != "function"})
    if dropped:
        log.info("left out tools of types that this server cannot run: %s", ", ".join(dropped)[:200])
    if body.tool_choice == "none":
        return []
    return [tool for tool in tools if tool.get("type", "function") == "function"]


def tool_use(body: ChatRequest) -> ToolUse:
    """Returns the tool options of the request. Raises RequestError 400 if a tool is malformed, or `tool_choice` needs a
    tool that the request does not have.
    """
    tools = tuple(_tool(tool, f"tools.{index}") for index, tool in enumerate(rendered_tools(body)))
    choice, names = _choice(body.tool_choice)
    unknown = sorted(set(names) - {tool.name for tool in tools})
    if unknown:
        known = ", ".join(tool.name for tool in tools) or "none, as there are no tools"
        raise invalid_params(
            f"tool_choice: there is no tool {unknown[0][:64]!r}; allowed: {known[:500]}", "tool_choice"
        )
    if choice == "required" and not tools:
        raise invalid_params("tool_choice: a call is required, but there are no tools of type function", "tool_choice")
    if names:
        tools = tuple(tool for tool in tools if tool.name in names)
    is_named = isinstance(body.tool_choice, dict) and body.tool_choice.get("type") == "function"  # means one call
    parallel = body.parallel_tool_calls is not False and not is_named
    return ToolUse(tools, choice if tools else "none", parallel)


def _tool(tool: dict[str, Any], where: str) -> Tool:
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid_params(f'{where}: a tool needs "function", an object with its name and parameters', where)
    name, parameters = function.get("name"), function.get("parameters") or {}
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"{where}.function.name: allowed: 1 to 128 letters, digits and _ . : / -"
        raise invalid_params(message, f"{where}.function.name")
    if not isinstance(parameters, dict):
        message = f"{where}.function.parameters: allowed: a JSON schema of type object"
        raise invalid_params(message, f"{where}.function.parameters")
    try:
        check_shapes(parameters)
    except (GrammarError, RecursionError) as error:
        message = f"{where}.function.parameters: {error}"
        raise invalid_params(message, f"{where}.function.parameters") from None
    return Tool(name, parameters, function.get("strict") is True)


def _choice(choice: str | dict[str, Any] | None) -> tuple[Choice, Sequence[str]]:
    """Returns the choice, and the names of the functions to which it is limited."""
    if isinstance(choice, str) or choice is None:
        return {"none": "none", "required": "required"}.get(choice or "auto", "auto"), ()  # type: ignore[return-value]
    if choice.get("type") == "function":
        return "required", (_function_name(choice),)
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        if isinstance(allowed, dict) and isinstance(allowed.get("tools"), list):
            mode: Choice = "required" if allowed.get("mode") == "required" else "auto"
            return mode, [_function_name(tool) for tool in allowed["tools"]]
    raise invalid_params(
        'tool_choice: allowed: none, auto, required, {"type": "function", "function": {"name": …}}, or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}',
        "tool_choice",
    )


def _function_name(choice: object) -> str:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        message = 'tool_choice: a function is chosen by {"type": "function", "function": {"name": …}}'
        raise invalid_params(message, "tool_choice")
    return name
