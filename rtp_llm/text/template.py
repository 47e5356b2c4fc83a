"""Renders chat messages to prompt text with the checkpoint's Jinja template.

Templates expect Hugging Face's documented environment: its sandbox, whitespace rules and functions. Messages are
normalized, since OpenAI clients send other formats than templates expect.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rtp_llm import files
from rtp_llm.text.tokenizer import Tokenizer

Message = Mapping[str, Any]


class TemplateError(ValueError):
    """The messages cannot be rendered or the template is invalid. The text is for the client or operator."""


class ChatTemplate:
    """The templates of one server: the default, and optionally one for requests with tools."""

    def __init__(self, name: str, source: str | None, tool_source: str | None, variables: Mapping[str, str]):
        """`variables`: the named special tokens, which templates use.

        Raises TemplateError if a template has a syntax error.
        """
        self.name = name
        self._arguments = (name, source, tool_source, variables)
        self._default = None if source is None else _CompiledTemplate(name, source)
        self._with_tools = self._default if tool_source is None else _CompiledTemplate(name, tool_source)
        self._variables = dict(variables)

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
        """Returns the first of: `explicit` (a built-in name or a path), the checkpoint's, a built-in for `model_type`.

        Raises TemplateError if `explicit` does not exist or a template has a syntax error. Without any template,
        `render` raises.
        """
        if explicit:
            return cls(*_explicit_template(explicit), None, tokenizer.special_tokens)
        default, tool_use = tokenizer.templates.get(default_key), tokenizer.templates.get(tool_key)
        if default is not None:
            return cls(f"the checkpoint's {default_key!r}", default, tool_use, tokenizer.special_tokens)
        built_in = _built_in_for_model_type(model_type, tokenizer)
        name = f"built-in {built_in!r}" if built_in else "none"
        return cls(name, _BUILT_IN.get(built_in or ""), tool_use, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Returns the prompt text. Encode it with add_special_tokens=False: the template adds the bos token.

        `kwargs` are further template variables (a request's chat_template_kwargs). Raises TemplateError.
        """
        template = self._with_tools if tools else self._default
        if template is None:
            raise TemplateError(
                "this checkpoint has no chat template: set MODEL_TEMPLATE_TYPE to one of "
                f"{', '.join(_BUILT_IN)} or to the path of a .jinja file, or send a ready prompt to /v1/completions"
            )
        variables = {
            **self._variables,
            "documents": None,
            **kwargs,
            "messages": [template.normalize_message(message) for message in messages],
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        return template.render(variables)


class _CompiledTemplate:
    """One template, and the message format that it expects, inferred from its source."""

    def __init__(self, name: str, source: str):
        try:
            tree = _ENVIRONMENT.parse(source)
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template ({name}) has an error in line {error.lineno}: {error.message}; "
                "MODEL_TEMPLATE_TYPE can name another one"
            ) from error
        self._accepts_parts = any(_iterates_content(loop.iter) for loop in tree.find_all(nodes.For))
        tests_for_string = any(test.name == "string" for test in tree.find_all(nodes.Test))
        self._requires_parts = self._accepts_parts and not tests_for_string
        self._accepts_null = _TESTS_FOR_NULL.search(source) is not None
        self._concatenates_arguments = _CONCATENATES_ARGUMENTS.search(source) is not None

    def normalize_message(self, message: Message) -> dict[str, Any]:
        """Returns the message in the format that this template expects. Removes null values, since templates test
        whether a key is defined.
        """
        if not isinstance(message, Mapping):  # not all callers validate it
            raise TemplateError(f"a message must be an object with a role and content, not {type(message).__name__}")
        normalized = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            texts = [_part_text(part) for part in content]
            normalized["content"] = list(content) if self._accepts_parts else "".join(texts)
        elif isinstance(content, str) and self._requires_parts:
            normalized["content"] = [{"type": "text", "text": content}]
        elif content is None:
            normalized["content"] = None if self._accepts_null else ""
        if isinstance(normalized.get("tool_calls"), list) and not self._concatenates_arguments:
            normalized["tool_calls"] = [_with_parsed_arguments(call) for call in normalized["tool_calls"]]
        return normalized

    def render(self, variables: Mapping[str, Any]) -> str:
        try:
            return self._template.render(variables)
        except _TemplateRaised as error:
            raise TemplateError(f"the chat template does not accept these messages: {error}") from error
        except Exception as error:  # the template's expressions and filters can raise any exception
            raise TemplateError(f"the chat template failed on these messages: {error}") from error


# A template with `content is none` needs the null content of an assistant turn that only calls tools.
_TESTS_FOR_NULL = re.compile(r"\bcontent['\"]?\]?\s+is\s+(not\s+)?none\b", re.IGNORECASE)
# Templates that concatenate a call's arguments to a string need JSON text; all others expect an object.
_CONCATENATES_ARGUMENTS = re.compile(r"\barguments['\"]?\]?\s*[+~]")


def _iterates_content(node: nodes.Node) -> bool:
    """Returns whether `node`, over which a Jinja loop iterates, is a message's content, filtered or not."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return getattr(node, "attr", getattr(node, "name", None)) == "content"


def _part_text(part: object) -> str:
    part_type = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if part_type != "text":
        raise TemplateError(f"content parts of type {part_type!r} are not supported: this model reads text only")
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise TemplateError('a content part of type "text" needs its "text" as a string')
    return text


def _with_parsed_arguments(call: Any) -> Any:
    """Returns the tool call with its arguments parsed.

    OpenAI clients send the arguments as JSON text, but templates use `tojson` or iterate over them.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call  # arguments that a model generated may be invalid JSON; the template gets them unchanged
    return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call


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
    name = _ALIASES.get(explicit, explicit)
    if name in _BUILT_IN:
        return f"built-in {name!r}", _BUILT_IN[name]
    try:
        return explicit, files.read(Path(explicit)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(
            f"MODEL_TEMPLATE_TYPE={explicit} is neither a built-in template ({', '.join([*_BUILT_IN, *_ALIASES])}) "
            f"nor a readable file: {error}"
        ) from error


def _built_in_for_model_type(model_type: str, tokenizer: Tokenizer) -> str | None:
    name = model_type.lower().replace("-", "_")
    if name == "llama":  # model_type of both generations in config.json; only Llama 3 has this control token
        return "llama2" if tokenizer.token_id("<|start_header_id|>") is None else "llama3"
    return next((built_in for prefix, built_in in _BUILT_IN_BY_MODEL_TYPE.items() if name.startswith(prefix)), None)


_ALIASES = {"default": "chatml", "qwen": "chatml"}
_BUILT_IN_BY_MODEL_TYPE = {
    "qwen": "chatml",
    "llama_2": "llama2",
    "llama2": "llama2",
    "llama_3": "llama3",
    "llama3": "llama3",
    "mistral": "mistral",
    "mixtral": "mistral",
    "internlm2": "internlm2",
}

# With Hermes-style tools, which Qwen's chat models are trained on.
_CHATML = """\
{%- set has_system = messages and messages[0].role == 'system' %}
{%- if tools %}
{{- '<|im_start|>system\n' ~ (messages[0].content ~ '\n\n' if has_system else '') ~ '# Tools\n\n' }}
{{- 'You may call one or more functions to assist with the user query.\n\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
{%- for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": ' }}
{{- '<args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages[1 if has_system and tools else 0:] %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' }}
{{- '\n<tool_response>\n' ~ message.content ~ '\n</tool_response>' }}
{{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
{%- else %}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content }}
{%- for call in message.tool_calls or [] %}
{{- ('\n' if message.content or not loop.first else '') ~ '<tool_call>\n{"name": "' ~ call.function.name }}
{{- '", "arguments": ' ~ (call.function.arguments | tojson) ~ '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""

_INTERNLM2 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' ~ (message.content | trim) ~ '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}"""

# Llama 2 and Mistral support alternating user and assistant turns only; the system text goes into the first turn.
_ALTERNATING_TURNS = """\
{%- set has_system = messages and messages[0].role == 'system' %}
{%- for message in messages[1 if has_system else 0:] %}
{%- if message.role != ('user' if loop.index0 is even else 'assistant') %}
{{- raise_exception('after at most one system message the roles must alternate user, assistant, user, …') }}
{%- endif %}
"""

_LLAMA2 = """\
{%- if message.role == 'user' %}
{{- bos_token ~ '[INST] ' }}
{{- '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' if has_system and loop.first else '' }}
{{- (message.content | trim) ~ ' [/INST]' }}
{%- else %}{{ ' ' ~ (message.content | trim) ~ ' ' ~ eos_token }}
{%- endif %}
{%- endfor %}"""

_MISTRAL = """\
{%- if message.role == 'user' %}
{{- bos_token if loop.first else '' }}
{{- '[INST] ' ~ (messages[0].content ~ '\n\n' if has_system and loop.first else '') ~ message.content ~ ' [/INST]' }}
{%- else %}{{ ' ' ~ (message.content | trim) ~ eos_token }}
{%- endif %}
{%- endfor %}"""

_BUILT_IN = {
    "chatml": _CHATML,
    "llama2": _ALTERNATING_TURNS + _LLAMA2,
    "llama3": _LLAMA3,
    "mistral": _ALTERNATING_TURNS + _MISTRAL,
    "internlm2": _INTERNLM2,
}
