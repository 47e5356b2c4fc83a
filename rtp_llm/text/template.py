"""Renders chat messages to prompt text with the checkpoint's Jinja template.

Provides the environment that Hugging Face documents for templates: sandbox, whitespace rules and functions.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rtp_llm import files
from rtp_llm.text.built_in_templates import ALIASES, BUILT_IN, BY_MODEL_TYPE
from rtp_llm.text.control_tokens import ControlTokens, new_mark
from rtp_llm.text.messages import REASONING_NAMES, Message, MessageFormat, TemplateError
from rtp_llm.text.roles import Roles
from rtp_llm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

__all__ = ["ChatTemplate", "Prompt", "TemplateError"]


@dataclass(frozen=True)
class Prompt:
    """A rendered chat: the concatenation of `pieces`. The text of a control token, such as `<|im_end|>`, is encoded as
    that token if it lies within one piece, and as plain text if it spans two.
    """

    pieces: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class ChatTemplate:
    """The chat templates of one server: the default one, and optionally one for requests with tools."""

    def __init__(self, name: str, source: str | None, tool_source: str | None, tokenizer: Tokenizer):
        """Raises TemplateError if a template has a syntax error."""
        self.name = name
        self._arguments = (name, source, tool_source, tokenizer)
        self._default = None if source is None else _CompiledTemplate(name, source, tokenizer)
        self._with_tools = self._default if tool_source is None else _CompiledTemplate(name, tool_source, tokenizer)
        self._token_names = frozenset(tokenizer.special_tokens)
        self._control_tokens = ControlTokens(tokenizer, [text for text in (source, tool_source) if text])
        self.source = "\n".join(filter(None, (tool_source, source)))
        self._words = frozenset(re.findall(r"\w+", self.source))

    def reads(self, name: str) -> bool:
        """Returns whether the template's source contains `name`, so that a variable of this name can have an effect."""
        return name in self._words

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets another process compile the same template; compiled ones cannot be pickled."""
        return ChatTemplate, self._arguments

    @classmethod
    def select(
        cls,
        tokenizer: Tokenizer,
        *,
        explicit: str | None,
        default_key: str = "default",
        tool_key: str = "tool_use",
        model_type: str = "",
    ) -> "ChatTemplate":
        """Returns the chat template `explicit` (a built-in name or a path) if set; otherwise the checkpoint's, or if it
        has none, the built-in one for `model_type` of config.json.

        default_key  name of the checkpoint's template for requests without tools
        tool_key     name of the checkpoint's template for requests with tools; without it, they use the other one

        Raises TemplateError if `explicit` does not exist or a template has a syntax error. If there is no template,
        `render` raises TemplateError.
        """
        if explicit:
            return cls(*_explicit_template(explicit), None, tokenizer)
        default, tool_use = tokenizer.templates.get(default_key), tokenizer.templates.get(tool_key)
        if default is not None:
            return cls(f"the checkpoint's {default_key!r}", default, tool_use, tokenizer)
        built_in = _built_in_for_model_type(model_type, tokenizer)
        name = f"built-in {built_in!r}" if built_in else "none"
        return cls(name, BUILT_IN.get(built_in or ""), tool_use, tokenizer)

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        allow_special_tokens: bool = False,
        **kwargs: Any,
    ) -> Prompt:
        """Returns the rendered chat, whose token ids `encode` of this class returns.

        continue_final_message  leaves the last message open, so that the model continues it
        allow_special_tokens    gives control tokens in messages their effect; otherwise they are plain text
        kwargs                  further variables of the template (a request's chat_template_kwargs)

        Raises TemplateError.
        """
        template = self._with_tools if tools else self._default
        if template is None:
            raise TemplateError(
                "this checkpoint has no chat template: set MODEL_TEMPLATE_TYPE to one of "
                f"{', '.join(BUILT_IN)} or to the path of a .jinja file, or send a rendered prompt to /v1/completions"
            )
        normalized = template.normalize(messages)
        variables = {**kwargs, "tools": list(tools) if tools else None}
        mark, end = new_mark(), f"{new_mark()} "
        try:
            if not allow_special_tokens:
                normalized = [self._marked_message(message, mark) for message in normalized]
                variables = {
                    key: value if key in self._token_names else self._control_tokens.marked(value, mark)
                    for key, value in variables.items()
                }
            if continue_final_message:
                normalized[-1] = _with_end(normalized[-1], end)
            text = template.render(
                {**variables, "messages": normalized, "add_generation_prompt": add_generation_prompt}
            )
        except TemplateError as error:
            raise TemplateError(str(error).replace(mark, "").replace(end, "")) from error
        return Prompt(tuple((_cut(text, end) if continue_final_message else text).split(mark)))

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a prompt. Adds no bos token: the template writes it."""
        return self._control_tokens.encode(prompt.pieces)

    def encode_text(self, text: str) -> list[int]:
        """Returns the token ids of a client's text, without special tokens. Control tokens in it are plain text."""
        mark = new_mark()
        return self._control_tokens.encode(self._control_tokens.marked(text, mark).split(mark))

    def _marked_message(self, message: Message, mark: str) -> dict[str, Any]:
        own_words = ("content", *REASONING_NAMES) if message.get("role") == "assistant" else ()
        return {
            key: value if key == "role" else self._control_tokens.marked(value, mark, is_answer=key in own_words)
            for key, value in message.items()
        }


class _CompiledTemplate:
    """One template, with the roles and the format of messages that it accepts."""

    def __init__(self, name: str, source: str, tokenizer: Tokenizer):
        try:
            tree = _ENVIRONMENT.parse(source)
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template ({name}) has an error in line {error.lineno}: {error.message}; "
                "set MODEL_TEMPLATE_TYPE to use another one"
            ) from error
        self._variables = {**tokenizer.special_tokens, "documents": None}
        self._format = MessageFormat(source, tree)
        self._roles = Roles(self._probe)
        if mapped := [f"{sent} as {role}" for sent, role in self._roles.renamed.items() if sent != role]:
            text = "the chat template (%s) does not handle some roles and gets their messages as other roles: %s"
            log.info(text, name, ", ".join(mapped))

    def normalize(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Returns the messages in the format that this template reads. Raises TemplateError."""
        for message in messages:
            if not isinstance(message, Mapping):  # not all callers validate it
                raise TemplateError(
                    f"a message must be an object with a role and content, not {type(message).__name__}"
                )
        return [self._format.normalize(message) for message in self._roles.adapt(messages)]

    def render(self, variables: Mapping[str, Any]) -> str:
        try:
            return self._template.render({**self._variables, **variables})
        except _TemplateRaised as error:
            raise TemplateError(f"the chat template does not accept these messages: {error}") from error
        except Exception as error:  # the template's expressions and filters can raise any exception
            raise TemplateError(f"the chat template failed on these messages: {error}") from error

    def _probe(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
        normalized = [self._format.normalize(message) for message in messages]
        return self.render({"messages": normalized, "tools": tools or None, "add_generation_prompt": False})


def _with_end(message: dict[str, Any], end: str) -> dict[str, Any]:
    """Returns the message with `end` after its last text. Raises TemplateError if it has none."""
    content = message.get("content")
    if isinstance(content, list) and content:
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + end}]}
    if not isinstance(content, str) or not content:
        raise TemplateError("continue_final_message needs a last message with content to continue")
    return {**message, "content": content + end}


def _cut(text: str, end: str) -> str:
    """Returns the text before `end`. The space in `end` shows whether the template strips the message."""
    before, found, after = text.rpartition(end.rstrip())
    if not found:
        raise TemplateError(
            "continue_final_message: the model's chat template leaves out the end of the last message's content, so no"
            " response can continue it; leave this field out"
        )
    return before if after.startswith(" ") else before.rstrip()


class _TemplateRaised(jinja2.TemplateError):
    """Raised when a template calls its function `raise_exception`."""


class _GenerationTag(Extension):
    """Renders the body of `{% generation %}`, which marks assistant text for training."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it an instance variable, so it cannot be a ClassVar

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise _TemplateRaised(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja's filter `tojson`, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


_ENVIRONMENT = _environment()


def _explicit_template(explicit: str) -> tuple[str, str]:
    """Returns name and source of the template that MODEL_TEMPLATE_TYPE sets. Raises TemplateError."""
    name = ALIASES.get(explicit, explicit)
    if name in BUILT_IN:
        return f"built-in {name!r}", BUILT_IN[name]
    try:
        return explicit, files.read(Path(explicit)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(
            f"MODEL_TEMPLATE_TYPE={explicit} is neither a built-in template ({', '.join([*BUILT_IN, *ALIASES])}) "
            f"nor a readable file: {error}"
        ) from error


def _built_in_for_model_type(model_type: str, tokenizer: Tokenizer) -> str | None:
    name = model_type.lower().replace("-", "_")
    if name == "llama":  # model_type of both generations in config.json; only Llama 3 has this control token
        return "llama2" if tokenizer.token_id("<|start_header_id|>") is None else "llama3"
    return next((built_in for prefix, built_in in BY_MODEL_TYPE.items() if name.startswith(prefix)), None)
