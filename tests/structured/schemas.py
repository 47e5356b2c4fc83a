"""Two hundred JSON schemas, as clients send them: written by hand, and generated over the keywords and their bounds."""

from collections.abc import Iterator
from itertools import product
from typing import Any

Schema = dict[str, Any]

STRING, INTEGER, NUMBER, BOOLEAN = ({"type": name} for name in ("string", "integer", "number", "boolean"))
SHORT = {"type": "string", "maxLength": 12}


def closed(properties: Schema, required: list[str] | None = None, **keywords: Any) -> Schema:
    """Returns the schema of an object with these properties only, all of them required by default."""
    names = list(properties) if required is None else required
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
        **keywords,
    }


def array(items: Schema, minimum: int = 0, maximum: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": minimum, "maxItems": maximum}


ADDRESS = closed({"street": SHORT, "city": SHORT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})
PERSON = closed({"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "address": ADDRESS})
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": closed({"value": INTEGER, "children": array({"$ref": "#/$defs/node"})})},
}
# What pydantic writes for a model with an optional field, an enumeration and a list of another model.
PYDANTIC = {
    "$defs": {
        "Level": {"enum": ["low", "high"], "title": "Level", "type": "string"},
        "Step": {
            "properties": {
                "explanation": {"title": "Explanation", **SHORT},
                "output": {"title": "Output", **SHORT},
            },
            "required": ["explanation", "output"],
            "title": "Step",
            "type": "object",
            "additionalProperties": False,
        },
    },
    "properties": {
        "steps": {"items": {"$ref": "#/$defs/Step"}, "title": "Steps", "type": "array", "maxItems": 3},
        "level": {"$ref": "#/$defs/Level"},
        "note": {"anyOf": [SHORT, {"type": "null"}], "default": None, "title": "Note"},
    },
    "required": ["steps", "level", "note"],
    "title": "Answer",
    "type": "object",
    "additionalProperties": False,
}

WRITTEN: dict[str, Schema] = {
    "person": PERSON,
    "people": array(PERSON, 1),
    "tree": TREE,
    "pydantic": PYDANTIC,
    "any object": {"type": "object", "maxProperties": 3, "additionalProperties": SHORT},
    "definitions": {"definitions": {"id": {"type": "integer"}}, **closed({"id": {"$ref": "#/definitions/id"}})},
    "anchor": {"$defs": {"n": {"$anchor": "n", "type": "boolean"}}, "$ref": "#n"},
    "weather call": closed(
        {
            "name": {"const": "get_weather"},
            "arguments": closed({"location": SHORT, "unit": {"enum": ["celsius", "fahrenheit"]}}, ["location"]),
        }
    ),
    "one of two calls": {
        "anyOf": [
            closed({"name": {"const": "add"}, "arguments": closed({"a": NUMBER, "b": NUMBER})}),
            closed({"name": {"const": "ping"}, "arguments": closed({})}),
        ]
    },
    "invoice": closed(
        {
            "number": {"type": "string", "pattern": r"^INV-\d{4}$"},
            "date": {"type": "string", "format": "date"},
            "lines": array(closed({"text": SHORT, "cents": {"type": "integer", "minimum": 0}}), 1),
            "paid": BOOLEAN,
        }
    ),
    "matrix": array(array(INTEGER, 2, 2), 2, 2),
    "pair": {"type": "array", "prefixItems": [SHORT, INTEGER], "items": False, "minItems": 2},
    "tuple of draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [SHORT, INTEGER],
        "additionalItems": False,
        "minItems": 2,
    },
    "map of counts": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 4},
    "environment": {
        "type": "object",
        "patternProperties": {"^[A-Z]{1,8}$": SHORT},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "at least one": {"type": "object", "additionalProperties": BOOLEAN, "minProperties": 1, "maxProperties": 3},
    "named and others": {
        "type": "object",
        "properties": {"id": INTEGER},
        "required": ["id"],
        "additionalProperties": SHORT,
        "maxProperties": 3,
    },
    "all of": {"allOf": [closed({"a": INTEGER, "b": INTEGER}), {"properties": {"a": {"minimum": 3, "maximum": 9}}}]},
    "one of kinds": {"oneOf": [closed({"kind": {"const": "circle"}, "r": NUMBER}), closed({"kind": {"const": "dot"}})]},
    "nullable": {"type": ["string", "null"], "maxLength": 6},
    "several types": {"type": ["integer", "boolean", "null"]},
    "number and words": {"anyOf": [INTEGER, {"type": "string", "enum": ["none", "all"]}]},
    "mixed enumeration": {"enum": [1, "two", None, False, {"a": [1, 2]}, [3.5]]},
    "constant object": {"const": {"a": [1, None, "x\ny"], "b": {}}},
    "linked list": {
        "$defs": {"node": closed({"v": BOOLEAN, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}})},
        "$ref": "#/$defs/node",
    },
    "expression": {
        "$defs": {
            "expression": {
                "anyOf": [
                    {"type": "integer", "minimum": 0, "maximum": 99},
                    closed(
                        {
                            "op": {"enum": ["+", "-", "*"]},
                            "left": {"$ref": "#/$defs/expression"},
                            "right": {"$ref": "#/$defs/expression"},
                        }
                    ),
                ]
            }
        },
        "$ref": "#/$defs/expression",
    },
    "unicode names": closed(
        {"größe": INTEGER, "名前": SHORT, "a b": BOOLEAN, 'q"uote': INTEGER, "back\\slash": INTEGER}
    ),
    "empty object": closed({}),
    "true": closed({"anything": {"enum": [[], {}, "", 0]}}),
    "password": closed({"user": SHORT, "secret": {"type": "string", "format": "password", "maxLength": 8}}),
    "deep": closed({"a": closed({"b": closed({"c": closed({"d": closed({"e": INTEGER})})})})}),
    "long enumeration": {"enum": [f"item-{number:03}" for number in range(300)]},
    "many properties": closed({f"field_{number}": BOOLEAN for number in range(40)}),
    "optional properties": closed({f"o{number}": INTEGER for number in range(8)}, []),
    "sql": closed({"query": {"type": "string", "pattern": "^SELECT [a-z]{1,8} FROM [a-z]{1,8}$"}}),
    "version": {"type": "string", "pattern": r"^v?\d{1,2}\.\d{1,2}\.\d{1,2}$"},
    "colour": {"type": "string", "pattern": "^#([0-9a-f]{3}|[0-9a-f]{6})$"},
    "unanchored": {"type": "string", "pattern": "ab", "maxLength": 10},
    "annotations": {
        "title": "t",
        "description": "d",
        "examples": [1],
        "default": 2,
        "deprecated": True,
        "$comment": "c",
        "readOnly": True,
        **INTEGER,
    },
}

FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


def _generated() -> Iterator[tuple[str, Schema]]:
    for low, high in ((0, 1), (-5, 5), (10, 99), (-1000, -990), (7, 7), (0, 123456)):
        yield f"integer {low} to {high}", {"type": "integer", "minimum": low, "maximum": high}
        yield f"number {low} to {high}", {"type": "number", "minimum": low, "maximum": high}
        if high - low > 2:
            yield (
                f"integer between {low} and {high}",
                {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high},
            )
    for step in (2, 5, 10, 0.5, 0.25):
        yield f"multiple of {step}", {"type": "number", "multipleOf": step, "minimum": 0, "maximum": 100}
    for low, high in ((0, 0), (1, 1), (0, 5), (3, 8), (20, 20)):
        yield f"string of {low} to {high}", {"type": "string", "minLength": low, "maxLength": high}
        yield f"array of {low} to {high}", array(BOOLEAN, low, high)
    for name in FORMATS:
        yield f"format {name}", {"type": "string", "format": name}
        yield f"object with {name}", closed({"value": {"type": "string", "format": name}, "count": INTEGER})
    items: dict[str, Schema] = {
        "strings": SHORT,
        "integers": INTEGER,
        "booleans": BOOLEAN,
        "nulls": {"type": "null"},
        "people": PERSON,
    }
    for (name, item), required in product(items.items(), (True, False)):
        schema = closed({"items": array(item), "total": INTEGER}, None if required else ["total"])
        yield f"list of {name}, required {required}", schema
        yield (
            f"{name} by key, required {required}",
            closed({"map": closed({"x": item, "y": item})}, ["map"] if required else []),
        )
    kinds: dict[str, Schema] = {
        "string": SHORT,
        "integer": INTEGER,
        "number": NUMBER,
        "boolean": BOOLEAN,
        "null": {"type": "null"},
    }
    for (first, a), (second, b) in product(kinds.items(), repeat=2):
        yield f"{first} and {second}", closed({"first": a, "second": b})
        if first < second:
            yield f"{first} or {second}", closed({"value": {"anyOf": [a, b]}})
    for depth in range(1, 8):
        schema = INTEGER
        for level in range(depth):
            schema = closed({f"level{level}": schema}) if level % 2 else array(schema, 1, 2)
        yield f"nested {depth}", schema
    for count in (1, 2, 5, 20):
        yield f"{count} words", {"enum": [f"word{number}" for number in range(count)]}
        yield f"{count} constants", closed({f"c{number}": {"const": number} for number in range(count)})


SCHEMAS: dict[str, Schema] = WRITTEN | dict(_generated())
