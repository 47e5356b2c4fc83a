"""Prepares a JSON schema for llguidance. Refuses keywords that llguidance cannot enforce."""

import json
from fractions import Fraction
from typing import Any

# At most one line break, with its indentation, or a space: a model that wants only whitespace comes to the next token.
WHITESPACE = r"[\x20]|\n[\x20\t]{0,40}"
MAX_DIVISOR = 10_000
EMAIL_CHARACTERS = 64  # RFC 5321 allows as many before the @, which llguidance does not count
# Formats that allow any text. JSON Schema takes every format for an annotation; those that constrain the text are
# enforced here, or refused.
_FREE_FORMATS = frozenset({"password", "binary", "path", "file-path", "directory-path", "textarea", "html", "markdown"})
_SCHEMA = ("additionalProperties", "additionalItems", "items", "not")
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")


# Keywords that allow an object properties other than those in `properties`.
_OPENING = {
    *("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"),
    *("allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "dependentSchemas"),
}

# Types of the values of keywords that are read here or by the formats of calls, and their names.
_SHAPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), (dict, "an object")),
    **dict.fromkeys(("required", "enum", "anyOf", "oneOf", "allOf", "prefixItems"), (list, "an array")),
    **dict.fromkeys(("format", "$ref"), (str, "a string")),
    "type": ((str, list), "a string or an array of strings"),
}


class GrammarError(ValueError):
    """A grammar cannot be enforced. The message names the reason: for a JSON schema, the keyword."""


def prepare(schema: Any, whitespace: str = WHITESPACE) -> dict[str, Any]:
    """Returns a JSON schema (an object, a boolean or its JSON text) as an object that llguidance reads. Raises
    GrammarError.

    `whitespace`: regular expression for optional whitespace between two JSON tokens; empty: none is allowed.
    """
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(parsed, dict | bool):
            raise GrammarError(f"the JSON schema is a {type(parsed).__name__}; allowed: an object, true or false")
        check_shapes(parsed)
        prepared = _prepare(parsed)
    except RecursionError:
        raise GrammarError("the JSON schema is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise GrammarError(f"the JSON schema is not JSON: {error}") from None
    if prepared is False:
        raise GrammarError("the JSON schema is false, which no JSON value matches; allowed: an object or true")
    options = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    return {**({} if prepared is True else prepared), "x-guidance": options}


def closed(schema: Any) -> Any:
    """Returns a copy of the JSON schema in which objects have only declared properties, unless the schema says
    otherwise.

    The model knows only the declared ones. Without this, it could invent property names until it runs out of tokens.
    """
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    if isinstance(properties := schema.get("properties"), dict):
        result["properties"] = {name: closed(item) for name, item in properties.items()}
        required = schema.get("required")
        if not schema.keys() & _OPENING and (not isinstance(required, list) or properties.keys() >= set(required)):
            result["additionalProperties"] = False
    if isinstance(schema.get("items"), dict):
        result["items"] = closed(schema["items"])
    return result


def check_shapes(schema: Any) -> None:
    """Raises GrammarError if a keyword of the JSON schema has a value of the wrong type, at any depth. Checks only the
    keywords that rtp-llm itself reads, such as `properties`; llguidance checks the others.
    """
    if not isinstance(schema, dict):
        return
    for keyword, (shape, allowed) in _SHAPES.items():
        if keyword in schema and not isinstance(schema[keyword], shape):
            found = type(schema[keyword]).__name__
            raise GrammarError(f"the JSON schema's keyword {keyword} is a {found}; allowed: {allowed}")
    for keyword in ("required", "type"):
        value = schema.get(keyword)
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise GrammarError(f"the JSON schema's keyword {keyword} has an item that is not a string")
    for keyword in _SCHEMA + _SCHEMAS:
        value = schema.get(keyword)
        for item in value if isinstance(value, list) else (value,):
            check_shapes(item)
    for keyword in _SCHEMAS_BY_NAME:
        for item in (schema.get(keyword) or {}).values():
            check_shapes(item)


def _prepare(schema: Any) -> Any:
    """Returns a copy without keywords that constrain nothing. Refuses keywords that cannot be enforced strictly."""
    if not isinstance(schema, dict):
        return schema
    _check_min_properties(schema)
    _check_multiple_of(schema)
    prepared = dict(schema)
    if prepared.get("format") in _FREE_FORMATS:
        del prepared["format"]
    if prepared.get("format") == "email" and isinstance(prepared.get("maxLength", 0), int):
        prepared["maxLength"] = min(prepared.get("maxLength", EMAIL_CHARACTERS), EMAIL_CHARACTERS)
    if prepared.get("uniqueItems") is False:
        del prepared["uniqueItems"]
    for keyword in _SCHEMAS:
        if isinstance(items := prepared.get(keyword), list):
            prepared[keyword] = [_prepare(item) for item in items]
    for keyword in _SCHEMA:
        if keyword in prepared:
            prepared[keyword] = _prepare(prepared[keyword])
    for keyword in _SCHEMAS_BY_NAME:
        if isinstance(items := prepared.get(keyword), dict):
            prepared[keyword] = {name: _prepare(item) for name, item in items.items()}
    return prepared


def _check_multiple_of(schema: dict[str, Any]) -> None:
    """Refuses large divisors: the automaton of the multiples of n has n states."""
    divisor = schema.get("multipleOf")
    if isinstance(divisor, int | float) and divisor > 0 and Fraction(str(divisor)).numerator > MAX_DIVISOR:
        raise GrammarError(
            f"the JSON schema's keyword multipleOf cannot be enforced if it is {divisor}; allowed: a number that, as a"
            f" reduced fraction (0.25 is 1/4), has a numerator of at most {MAX_DIVISOR}"
        )


def _check_min_properties(schema: dict[str, Any]) -> None:
    """Refuses minProperties that only distinct names could satisfy, because the grammar may repeat a name."""
    minimum, required = schema.get("minProperties"), schema.get("required")
    if isinstance(minimum, int) and minimum > (len(required) if isinstance(required, list) else 0) + 1:
        raise GrammarError(
            f"the JSON schema's keyword minProperties cannot be enforced if it is {minimum}; allowed: at most one more"
            " than there are required properties"
        )
