"""Supports message roles that a chat template does not handle.

Templates raise an error for such a role, silently drop its text, or write its name, which the model may never have seen
in training. Rendering short test chats shows how a template handles each role.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rtp_llm.text.messages import Message, TemplateError, content_parts

Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]]], str]
PROBE_SECONDS = 2.0  # after which a template is taken to accept whatever has not been tried
TEXT = "Quartz"  # of the turn that is tried; like the texts of the others it occurs in no template
UNKNOWN_ROLE = "sphinx"
SEPARATOR = "\n\n"  # between turns that become one


class Roles:
    """How a chat template handles each role, found out by rendering test messages.

    renamed          {role: the role that the template gets instead}
    leading_system   whether the template accepts a system message at the start
    leading_systems  whether the template accepts two system messages at the start
    lone_system      whether the template accepts a system message as the only message
    later_system     whether the template accepts a system message after other messages
    repeated_user    whether the template accepts two user messages in a row
    """

    def __init__(self, render: Render):
        """`render`: renders messages and tools to text. Raises TemplateError if the template refuses them."""
        probe = _Probe(render)
        self.renamed: dict[str, str] = {}
        self.leading_system = self.leading_systems = self.lone_system = self.later_system = self.repeated_user = True
        if not probe.shows("user", [([], [])]):
            return  # this template needs more than messages, so trying roles says nothing
        self.leading_system = probe.shows("system", [([], [_USER])])
        self.leading_systems = probe.shows("system", [([_SYSTEM], [_USER])])
        self.lone_system = probe.shows("system", [([], [])])
        self.later_system = probe.shows("system", [([_USER, _ASSISTANT], [_USER])])
        self.repeated_user = probe.shows("user", [([_USER], [])])
        result = "tool" if probe.shows("tool", _RESULT_CONTEXTS) else "user"
        self.renamed["tool"] = result
        for role in ("function", "observation"):
            self.renamed[role] = role if probe.knows(role, _RESULT_CONTEXTS) else result
        self.renamed["developer"] = "developer" if probe.knows("developer", [([], [_USER])]) else "system"

    def adapt(self, messages: Iterable[Message]) -> list[Message]:
        """Returns the messages of a chat, with roles replaced and neighbours merged as far as the template needs it.

        Messages keep their order, so that the prompt of a growing chat keeps its prefix (prefix caching).
        """
        turns: list[_Turn] = []
        is_leading = True
        for message in messages:
            turn = self._turn(message, is_leading)
            is_leading = is_leading and turn.role == "system"
            if turns and self._merges(turns[-1], turn, is_leading):
                turns[-1] = turns[-1].merged(turn)
            else:
                turns.append(turn)
        if is_leading and not self.lone_system:
            return [{**turn.message, "role": "user"} for turn in turns]
        return [turn.message for turn in turns]

    def _turn(self, message: Message, is_leading: bool) -> "_Turn":
        sent = message.get("role", "")
        role = self.renamed.get(sent, sent)
        if role == "system" and not (self.leading_system if is_leading else self.later_system):
            role = "user"
        return _Turn(message) if role == sent else _Turn({**message, "role": role}, is_converted=True)

    def _merges(self, previous: "_Turn", turn: "_Turn", is_leading: bool) -> bool:
        """Returns whether two messages are merged into one; messages with unchanged roles only if necessary."""
        if previous.role != turn.role:
            return False
        is_converted = previous.is_converted or turn.is_converted
        if turn.role == "system":
            return is_leading and (is_converted or not self.leading_systems)
        return turn.role == "user" and is_converted and not self.repeated_user


@dataclass(frozen=True)
class _Turn:
    """A message; `is_converted`: the client sent it with another role."""

    message: Message
    is_converted: bool = False

    @property
    def role(self) -> Any:
        return self.message.get("role")

    def merged(self, other: "_Turn") -> "_Turn":
        contents = self.message.get("content") or "", other.message.get("content") or ""
        if isinstance(contents[0], str) and isinstance(contents[1], str):
            content: Any = contents[0] + SEPARATOR + contents[1]
        else:
            content = [*content_parts(contents[0]), *content_parts(SEPARATOR), *content_parts(contents[1])]
        return _Turn({**self.message, "content": content}, is_converted=True)


_USER, _SYSTEM = {"role": "user", "content": "Zebra"}, {"role": "system", "content": "Walnut"}
_ASSISTANT = {"role": "assistant", "content": "Yacht"}
_CALL_ID = "abcdefghi"  # Mistral's templates accept nine letters only
_CALL = {"id": _CALL_ID, "type": "function", "function": {"name": "f", "arguments": {}}}
_CALLS = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_PARAMETERS = {"type": "object", "properties": {}}
_TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": _PARAMETERS}}]
_Context = tuple[list[Message], list[Message]]  # the messages before and after the one that is tried
_RESULT_CONTEXTS: list[_Context] = [([_USER, _CALLS], []), ([_USER, _ASSISTANT], [])]


class _Probe:
    """Renders a role in several contexts, with and without tools, to see what a template does with it."""

    def __init__(self, render: Render):
        self._render = render
        self._deadline = time.monotonic() + PROBE_SECONDS

    def shows(self, role: str, contexts: list[_Context]) -> bool:
        """Returns whether the template, in at least one of `contexts` (messages around it), renders a test message of
        this role in its place and loses none of the others.
        """
        return self._is_late() or any(_has_in_order(text, chat) for chat, text in self._rendered(role, contexts))

    def knows(self, role: str, contexts: list[_Context]) -> bool:
        """Returns whether the template renders this role in one of `contexts` (messages around it), and not just like
        an arbitrary unknown role.
        """
        if self._is_late():
            return True
        unknown = [text.replace(UNKNOWN_ROLE, role) for _, text in self._rendered(UNKNOWN_ROLE, contexts)]
        rendered = self._rendered(role, contexts)
        return any(
            _has_in_order(text, chat) and text != other for (chat, text), other in zip(rendered, unknown, strict=True)
        )

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _rendered(self, role: str, contexts: list[_Context]) -> list[tuple[list[Message], str]]:
        """Returns each test chat and its rendered text; "" if the template refuses it."""
        turn = {"role": role, "content": TEXT, "name": "f", "tool_call_id": _CALL_ID}
        chats = [[*before, turn, *after] for before, after in contexts]
        return [(chat, self._text(chat, tools)) for chat in chats for tools in ([], _TOOLS)]

    def _text(self, chat: list[Message], tools: list[dict[str, Any]]) -> str:
        try:
            return self._render(chat, tools)
        except TemplateError:
            return ""


def _has_in_order(text: str, chat: list[Message]) -> bool:
    """Returns whether `text` has the contents of all messages, each after that of the one before it."""
    position = 0
    for message in chat:
        start = text.find(message["content"], position)
        if start < 0:
            return False
        position = start + len(message["content"])
    return True
