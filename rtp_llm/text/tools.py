"""The functions that the model may call (`tools` of a request)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_JSON_TYPES: dict[type, tuple[str, ...]] = {
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    list: ("array",),
    dict: ("object",),
}

_MAX_DEPTH = 8  # of references, which may form a circle


@dataclass(frozen=True)
class Tool:
    """One function. `parameters`: the JSON schema of its arguments; {} allows any object."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False

    def types(self, parameter: str) -> frozenset[str]:
        """Returns the JSON types that the schema allows for a parameter; empty if it does not restrict them."""
        properties = self.parameters.get("properties")
        return self.types_of(properties.get(parameter) if isinstance(properties, Mapping) else None)

    def types_of(self, schema: Any) -> frozenset[str]:
        """Returns the JSON types that `schema`, a part of `parameters`, allows; empty if it does not restrict them."""
        return frozenset(_types(schema, self.parameters, set()))

    def resolved(self, schema: Any) -> Any:
        """Returns what `schema`, a part of `parameters`, refers to if it is a `$ref`; otherwise `schema` itself."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
                break
            schema = _resolve(schema["$ref"], self.parameters)
        return schema


def json_types(value: object) -> tuple[str, ...]:
    """Returns the JSON schema type names of a parsed JSON value."""
    return _JSON_TYPES.get(type(value), ("null",))


def _types(schema: Any, root: Mapping[str, Any], seen: set[int]) -> Iterator[str]:
    """`seen`: ids of the parts that were visited, each of which counts once."""
    if not isinstance(schema, Mapping) or id(schema) in seen:
        return
    seen.add(id(schema))
    declared = schema.get("type")
    yield from [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else ()
    values = [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else ())]
    if not declared:
        for value in values:
            yield from json_types(value)
    for alternative in (*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ()), *(schema.get("allOf") or ())):
        yield from _types(alternative, root, seen)
    if isinstance(reference := schema.get("$ref"), str):
        yield from _types(_resolve(reference, root), root, seen)


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    target: Any = root if reference.startswith("#") else None
    for key in reference.split("/")[1:]:
        target = target.get(key) if isinstance(target, Mapping) else None
    return target
