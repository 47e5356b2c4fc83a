"""Handles fields of a request body that its schema does not declare.

A field that constrains the text, or requests a result that this server cannot return, is refused by name unless its
value means "not set": a client that asks for JSON must not get prose. Hints are accepted. Any other field is ignored
and listed in the response header `x-ignored-fields`, since real clients send more fields than any server knows.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from rtp_llm.api import access_log
from rtp_llm.errors import invalid_format, model_not_found, unsupported
from rtp_llm.metrics import Metrics

log = logging.getLogger(__name__)

MAX_NAMES = 16  # of ignored fields in a response header
MAX_NAME_CHARACTERS = 64
MAX_LOGGED_NAMES = 256  # of all requests, each logged once and a label of the metric
MAX_WALKED_ITEMS = 65536  # schemas refuse longer lists


class Refusal(NamedTuple):
    """Entry of a table of request fields: how to treat a field that must not be ignored silently.

    reason   why a request with this field is rejected if its schema does not declare the field
    default  the value, or a tuple of values, that means "not set" in any case; `is_neutral` (for undeclared fields) and
             `is_empty` (for declared ones) accept further values as "not set"
    """

    reason: str
    default: Any = None

    def is_neutral(self, value: Any) -> bool:
        """Returns whether this value of an undeclared field means "not set": it is the field's default or, unless the
        default is true, it is empty, false, 0 or null.
        """
        defaults = self.default if isinstance(self.default, tuple) else (self.default,)
        return value in defaults or (not value and self.default is not True)

    def is_empty(self, value: Any) -> bool:
        """Returns whether this value of a declared field means "not set", whatever the field's type: it is an empty
        string, list or object or, unless the default is true, it is false. 0 counts as set.
        """
        return value in ("", [], {}) or (value is False and self.default is not True)


def _refuse(reason: str, *names: str, **defaults: Any) -> dict[str, Refusal]:
    return {name: Refusal(reason) for name in names} | {n: Refusal(reason, v) for n, v in defaults.items()}


_STRUCTURED = "output in a given structure is not supported on this route"
_BEAMS = "beam search is not supported"
_BEST = "choosing the best of several answers is not supported; n returns several"
_WORDS = "forbidding or prescribing words in this way is not supported; logit_bias can exclude single tokens"
_TOOLS = "tool calls cannot be demanded on this route"
_PROMPT = "the prompt cannot be altered by this field; send the prompt as it is to be read"
_RESULT = "this result is not computed"
_SAMPLING = "this way of sampling is not supported"
_TEXT = "this form of the output text is not supported"

# The fields of OpenAI, vLLM, SGLang and alibaba/rtp-llm whose meaning is "the text must …" or "return …". A schema that
# declares one of them honours it.
REFUSALS: Mapping[str, Refusal] = {
    **_refuse(_STRUCTURED, "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
    **_refuse(_STRUCTURED, "guided_grammar", "guided_json_object", "guided_whitespace_pattern", "json_schema"),
    **_refuse(_STRUCTURED, "regex", "ebnf", "grammar", "structural_tag", "json_format"),
    **_refuse(_BEAMS, "use_beam_search", "variable_num_beams", "early_stopping"),
    **_refuse(_BEAMS, num_beams=1, length_penalty=1.0),
    **_refuse(_BEST, best_of=1),
    **_refuse(_WORDS, "bad_words", "bad_words_list", "allowed_token_ids", "no_repeat_ngram_size"),
    **_refuse(_WORDS, "banned_combo_token_ids", "stop_regex", "repetition_detection", "eos_token_id"),
    **_refuse("functions are sent as tools, and function_call as tool_choice", "functions", function_call="none"),
    **_refuse(_TOOLS, tool_choice=("auto", "none"), parallel_tool_calls=True),
    **_refuse(_PROMPT, "truncate_prompt_tokens", "chat_template", "continue_final_message", "prompt_embeds"),
    **_refuse(_PROMPT, "template_key", "user_template", "suffix"),
    **_refuse(_RESULT, "prompt_logprobs", "return_logits", "return_hidden_states", "return_all_hidden_states"),
    **_refuse(_RESULT, "return_all_probs", "return_prompt_logits", "calculate_loss", "select_tokens_str"),
    **_refuse(_RESULT, "select_tokens_id", "audio", modalities=["text"], logprobs_mode="none"),
    **_refuse(_SAMPLING, "logits_processors", "custom_logit_processor", "top_p_decay", "top_p_min", "top_p_reset_ids"),
    **_refuse(_TEXT, "return_tokens_as_token_ids", "echo", detokenize=True, spaces_between_special_tokens=True),
    **_refuse("adapters (LoRA) are not supported", "adapter_name", "lora_path", "lora_request"),
}
# Fields that a server may ignore, such as labels: accepted, and not reported.
HINTS = frozenset(
    (
        *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prediction", "verbosity", "reasoning_effort", "reasoning", "thinking"),
        *("include_obfuscation", "guided_decoding_backend", "priority", "request_id", "rid"),
        *("source", "private_request", "trace_id", "chat_id", "request_format", "master_info", "extend_fields"),
        *("md5_value", "unique_key", "profile_trace_name", "traffic_reject_priority", "using_hf_sampling"),
    )
)
# Fields that the SDKs put into each message of a history, of which few templates read any.
MESSAGE_HINTS = frozenset({"tool_call_id", "refusal", "annotations", "reasoning", "reasoning_content", "thinking"})


@dataclass
class FieldRecord:
    """What `FieldPolicy.apply` needs of a request body: the value of its `model`, and the names of the fields that the
    server ignores, such as `messages.id`.

    Keeps the first `MAX_NAMES` names; `has_more`: there were others.
    """

    model: object = None
    names: list[str] = field(default_factory=list)
    has_more: bool = False

    def add(self, path: str, names: Iterable[str]) -> None:
        for name in names:
            if self.has_more:
                return
            shown = re.sub(r"[^\w.:+-]", "?", f"{path}{name[:MAX_NAME_CHARACTERS]}", flags=re.ASCII)
            if shown not in self.names:
                self.has_more = len(self.names) == MAX_NAMES
                self.names += [] if self.has_more else [shown]

    def __str__(self) -> str:
        return ", ".join([*self.names, *(["..."] if self.has_more else [])])


_current: ContextVar[FieldRecord | None] = ContextVar("field_record", default=None)


@contextmanager
def recording() -> Iterator[FieldRecord]:
    """Context manager that returns a record, to which `set_fields` and `ignore` add the fields that they find ignored
    while the context is open, in the same thread or asyncio task.
    """
    record = FieldRecord()
    token = _current.set(record)
    try:
        yield record
    finally:
        _current.reset(token)


def ignore(path: str, names: Iterable[str]) -> None:
    """Adds fields that the server ignores to the record of the current request (see `recording`), for `FieldPolicy` to
    report. `path`: prefix of their names, "" for fields of the body, "messages." for fields of its messages.
    """
    record = _current.get()
    if record is not None:
        record.add(path, names)


def set_fields(model: type[BaseModel], data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns `data`, a request body or an object in it, without the fields that are not set; nested models likewise.

    path  prefix of field names in errors: "" for the body, such as "messages." for an object in it

    Drops fields that are null, except those in `nullable_fields` of `model`. Fields that must not be ignored silently,
    such as a grammar, are in the table `refusals` of `model` (default: REFUSALS for a body, none for an object in it):

    - a field of the table that `model` declares is dropped if its value is empty;
    - one that `model` does not declare raises RequestError 400 unless its value means "not set";
    - any other field that `model` does not declare is recorded as ignored (see `recording`). A model with
      extra="allow" keeps all such fields unchecked, so the caller must check them.

    Raises RequestError 400 also if a number is a boolean.
    """
    schema = _schema(model)
    refusals = schema.refusals if schema.refusals is not None else {} if path else REFUSALS
    values = {
        name: value
        for name, value in data.items()
        if (value is not None or name in schema.nullable)
        and not (name in schema.names and name in refusals and refusals[name].is_empty(value))
    }
    record = _current.get()
    if record is not None and not path:
        record.model = values.get("model", record.model)
    if not schema.allows_extra:
        unknown = [name for name in values if name not in schema.names]
        _check_refusals(refusals, values, unknown, path)
        ignore(path, (name for name in unknown if name not in HINTS and name not in refusals))
    for name in schema.numbers & values.keys():
        if isinstance(values[name], bool):  # which Python, unlike JSON, takes for 0 and 1
            raise invalid_format(f"{path}{name}: Input should be a valid number, not a boolean", f"{path}{name}")
    for name, nested in schema.nested.items():
        if name in values:
            values[name] = _set_fields_of(nested, values[name], f"{path}{name}.")
            if name in refusals and refusals[name].is_empty(values[name]):  # it had only nulls
                del values[name]
    return values


def _set_fields_of(model: type[BaseModel], value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return set_fields(model, value, path)
    if isinstance(value, list) and len(value) <= MAX_WALKED_ITEMS:
        return [set_fields(model, item, path) if isinstance(item, dict) else item for item in value]
    return value


def _check_refusals(
    refusals: Mapping[str, Refusal], values: Mapping[str, Any], unknown: Iterable[str], path: str
) -> None:
    for name in unknown:
        refusal = refusals.get(name)
        if refusal and not refusal.is_neutral(values[name]):
            raise unsupported(f"{path}{name}: {refusal.reason}; leave it out", f"{path}{name}")


class _Schema(NamedTuple):
    """What `set_fields` must know of a model."""

    names: frozenset[str]
    nested: dict[str, type[BaseModel]]
    numbers: frozenset[str]
    nullable: frozenset[str]
    refusals: Mapping[str, Refusal] | None
    allows_extra: bool


@cache
def _schema(model: type[BaseModel]) -> _Schema:
    annotations = {info.alias or name: info.annotation for name, info in model.model_fields.items()}
    return _Schema(
        frozenset(annotations),
        {name: nested for name, annotation in annotations.items() if (nested := _nested_model(annotation))},
        frozenset(name for name, annotation in annotations.items() if _is_number(annotation)),
        getattr(model, "nullable_fields", frozenset()),
        getattr(model, "refusals", None),
        model.model_config.get("extra") == "allow",
    )


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """Returns the model in an annotation such as `list[Model] | None`; None if there is none, or several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = {model for argument in get_args(annotation) if (model := _nested_model(argument))}
    return found.pop() if len(found) == 1 else None


def _is_number(annotation: Any) -> bool:
    """Returns whether the values of an annotation such as `Annotated[int, …] | None` are numbers."""
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) in (list, dict, Literal):
        return False
    return annotation in (int, float) or (bool(arguments) and any(map(_is_number, arguments)) and bool not in arguments)


class FieldPolicy:
    """Reports ignored fields to the client, the log and the metrics, and rejects requests as STRICT_FIELDS and
    STRICT_MODEL_NAME say.

    `is_strict`: reject requests with ignored fields. `model_names`: the allowed values of `model`; None: any.
    """

    def __init__(self, metrics: Metrics, *, is_strict: bool, model_names: Collection[str] | None):
        self._metrics, self._is_strict, self._model_names = metrics, is_strict, model_names
        self._logged: set[str] = set()

    def apply(self, record: FieldRecord) -> None:
        """Raises RequestError 404 if the model name is not allowed, 400 for ignored fields if STRICT_FIELDS is set."""
        if self._model_names is not None and record.model is not None and record.model not in self._model_names:
            raise model_not_found(str(record.model), self._model_names)
        if self._is_strict and record.names:
            message = f"this server does not know {record}; with STRICT_FIELDS=1 no field is ignored"
            raise invalid_format(message, record.names[0])
        if record.names:
            access_log.current().ignored_fields = str(record)
        for name in record.names:
            if name not in self._logged and len(self._logged) < MAX_LOGGED_NAMES:
                self._logged.add(name)
                log.info("requests have the field %s, which this server ignores (logged once per field)", name)
            self._metrics.ignored_fields.labels(field=name if name in self._logged else "other").inc()
