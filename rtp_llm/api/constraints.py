"""Structured output: translates the fields of OpenAI, vLLM, SGLang and alibaba/rtp-llm into one grammar."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError

from rtp_llm.api.fields import Refusal
from rtp_llm.errors import invalid_params, unsupported
from rtp_llm.text import grammar
from rtp_llm.text.json_schema import WHITESPACE, GrammarError
from rtp_llm.text.tokenizer import Tokenizer

Schema = dict[str, Any] | bool | str  # a JSON schema, or its text
Choices = Annotated[list[str], Field(fail_fast=True, max_length=4096)]


class JsonSchemaFormat(BaseModel):
    """OpenAI's `response_format.json_schema`. `strict` has no effect: every schema is enforced."""

    name: str = ""
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TaggedStructure(BaseModel):
    """JSON that matches `schema`, such as a function call, between the texts `begin` and `end`."""

    begin: Annotated[str, Field(min_length=1)]
    schema_: Schema = Field({}, alias="schema")
    end: str


class StructuralTag(BaseModel):
    """Free text that may contain `structures`. As soon as the model writes one of `triggers`, which are prefixes of the
    structures' `begin`, the text must continue as one of these structures.
    """

    structures: Annotated[list[TaggedStructure], Field(min_length=1, max_length=256)]
    triggers: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=256)]

    def grammar(self, tokenizer: Tokenizer) -> str:
        """Returns the grammar of the text that this tag describes, as a string for llguidance.

        Raises GrammarError if a schema has a keyword that cannot be enforced.
        """
        tags = [grammar.Tag(tag.begin, tag.schema_, tag.end) for tag in self.structures]
        return grammar.from_tags(tags, self.triggers, tokenizer)


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`, extended by the structural tags of vLLM and SGLang."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"] = "text"
    json_schema: JsonSchemaFormat | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`."""

    refusals: ClassVar[Mapping[str, Refusal]] = dict.fromkeys(
        ("json", "json_object", "regex", "choice", "grammar", "structural_tag"), Refusal("declared")
    )
    json_: Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    structural_tag: StructuralTag | str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


class StructuredOutputFields(BaseModel):
    """The fields of a request that constrain its text by a grammar. At most one may be set."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    json_schema: Schema | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: StructuralTag | str | None = None


def content_grammar(tokenizer: Tokenizer, *bodies: StructuredOutputFields | None) -> tuple[str, str]:
    """Returns the grammar of the output, as a string for llguidance, and the name of the request field that asks for
    it; two empty strings if no field does.

    `bodies`: the objects of the request that may have such fields. Raises RequestError 400 if several fields are set or
    a grammar is invalid.
    """
    constraints = [constraint for body in bodies if body for constraint in _constraints(body, tokenizer)]
    found = [(name, partial(make, value)) for name, value, make in constraints if value]
    if not found:
        return "", ""
    if len(found) > 1:
        raise invalid_params(f"{found[0][0]} and {found[1][0]} are set: the output can follow only one", found[1][0])
    [(name, make)] = found
    try:
        return make(), name
    except UnicodeEncodeError:
        raise invalid_params(f"{name}: the text has an unpaired surrogate: not valid Unicode", name) from None
    except GrammarError as error:
        raise invalid_params(f"{name}: {error}", name) from None


def _constraints(fields: StructuredOutputFields, tokenizer: Tokenizer) -> list[tuple[str, Any, Callable[[Any], str]]]:
    """Returns (field, value, function that makes the value's grammar) of each field. Empty values are not set."""
    nested = fields.structured_outputs or StructuredOutputs(json=None)
    if nested.disable_additional_properties:
        name = "structured_outputs.disable_additional_properties"
        raise unsupported(f"{name} is not supported: set additionalProperties in the schema", name)
    whitespace = nested.whitespace_pattern or fields.guided_whitespace_pattern or WHITESPACE
    from_schema = partial(grammar.from_json_schema, whitespace="" if nested.disable_any_whitespace else whitespace)
    object_grammar = from_schema({"type": "object"})
    from_tag = partial(_from_structural_tag, tokenizer=tokenizer)
    response_format = (
        fields.response_format if fields.response_format and fields.response_format.type != "text" else None
    )
    return [
        ("response_format", response_format, partial(_from_response_format, tokenizer=tokenizer)),
        ("structured_outputs.json", nested.json_, from_schema),
        ("structured_outputs.json_object", nested.json_object, lambda _: object_grammar),
        ("structured_outputs.regex", nested.regex, grammar.from_regex),
        ("structured_outputs.choice", nested.choice, grammar.from_choice),
        ("structured_outputs.grammar", nested.grammar, grammar.from_ebnf),
        ("structured_outputs.structural_tag", nested.structural_tag, from_tag),
        ("guided_json", fields.guided_json, from_schema),
        ("guided_json_object", fields.guided_json_object, lambda _: object_grammar),
        ("guided_regex", fields.guided_regex, grammar.from_regex),
        ("guided_choice", fields.guided_choice, grammar.from_choice),
        ("guided_grammar", fields.guided_grammar, grammar.from_ebnf),
        ("json_schema", fields.json_schema, from_schema),
        ("regex", fields.regex, grammar.from_regex),
        ("ebnf", fields.ebnf, grammar.from_ebnf),
        ("structural_tag", fields.structural_tag, from_tag),
    ]


def _from_response_format(value: ResponseFormat, tokenizer: Tokenizer) -> str:
    if value.type == "structural_tag":
        return _from_structural_tag({"structures": value.structures, "triggers": value.triggers}, tokenizer)
    if value.type == "json_object":
        return grammar.from_json_schema({"type": "object"})
    if value.json_schema is None:
        raise GrammarError("type json_schema needs the field json_schema: {name, schema}")
    schema = value.json_schema.schema_
    return grammar.from_json_schema({"type": "object"} if schema is None else schema)


def _from_structural_tag(value: StructuralTag | dict[str, Any] | str, tokenizer: Tokenizer) -> str:
    try:
        if isinstance(value, str):
            value = StructuralTag.model_validate_json(value)
        elif isinstance(value, dict):
            value = StructuralTag.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise GrammarError(f"{path}: {first['msg']}; allowed: structures [{{begin, schema, end}}], triggers") from None
    return value.grammar(tokenizer)
