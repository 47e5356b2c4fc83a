"""`python -m rtp_llm.api.reference > docs/api.md`: writes the reference of the fields of all request bodies."""

from collections import defaultdict
from typing import Any

from rtp_llm.api.app import BODY_MODELS
from rtp_llm.api.body import component_schemas
from rtp_llm.api.fields import HINTS, MESSAGE_HINTS, REFUSALS

INTRODUCTION = """\
# Fields of requests

What the server does with each field of a body. `/docs` of a running server has the paths, responses and errors.

- A field of the tables below has an effect. `null`, and what the notes call "not set", leave it out; so does an empty
  value (false, "", [], {}) of a field that constrains the text.
- [Refused](#refused-fields): fields that constrain the text, or ask for a result, and that the path's table lacks.
- [Accepted](#accepted-fields): hints and labels, which change nothing.
- Any other field, nested ones too, is ignored. The answer's header `x-ignored-fields` names it, the metric
  `rtp_llm_ignored_request_fields_total` counts it, the log has it once. `STRICT_FIELDS=1` makes it an error 400.

Where a request leaves out a parameter of sampling, generation_config.json decides, then the default: temperature 0.7 in
chats and 1.0 elsewhere. Of that file `do_sample` counts only where it is false, and `max_new_tokens` is a default, no
limit. `GENERATION_CONFIG=none` ignores the file.
"""


def markdown() -> str:
    """Returns the content of docs/api.md: a table per request body, from the pydantic schemas, as Markdown."""
    components = component_schemas(BODY_MODELS)
    bodies = [model.__name__ for model in BODY_MODELS]
    nested = [name for name in components if name not in bodies and "properties" in components[name]]
    sections = [INTRODUCTION]
    for name in [*bodies, *nested]:
        schema = components[name]
        description = " ".join(schema.get("description", "").split())
        sections.append("\n\n".join(filter(None, [f"## {_title(name)}", description, _table(schema)])))
    sections.append(_refused())
    names = ", ".join(f"`{name}`" for name in sorted(HINTS))
    in_messages = ", ".join(f"`{name}`" for name in sorted(MESSAGE_HINTS))
    sections.append(f"## Accepted fields\n\n{names}; in messages {in_messages}.")
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _title(name: str) -> str:
    """Returns a component's name. Pydantic writes the modules before names that several schemas have."""
    package, _, rest = name.removeprefix("rtp_llm__api__").partition("__schema__")
    return f"{package}.{rest}" if rest else name


def _table(schema: dict[str, Any]) -> str:
    rows = ["| Field | Type | Default | Notes |", "| --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else _default(field.get("default"))
        rows.append(f"| `{name}` | {_type(field)} | {default} | {field.get('description', '')} |")
    return "\n".join(rows)


def _default(value: Any) -> str:
    return "" if value in (None, [], {}, "") else str(value).lower() if isinstance(value, bool) else str(value)


def _type(schema: dict[str, Any]) -> str:
    """Returns a JSON schema in words, without null."""
    if "$ref" in schema:
        name = _title(schema["$ref"].rsplit("/", 1)[1])
        return f"[{name}](#{name.lower().replace('.', '')})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(s) for s in schema["anyOf"] if s.get("type") != "null"))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if high is not None and high >= 2**31:  # the largest number that the engine's arrays hold
        high = None
    if low is not None and low <= -(2**31):
        low = None
    bounds = f"{low} … {high}" if low is not None and high is not None else ""
    return f"{kind} {bounds or (f'≥ {low}' if low is not None else f'≤ {high}' if high is not None else '')}".strip()


def _refused() -> str:
    rows = ["| Reason | Fields |", "| --- | --- |"]
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, refusal in REFUSALS.items():
        defaults = refusal.default if isinstance(refusal.default, tuple) else (refusal.default,)
        values = " or ".join(_default(value) for value in defaults if value not in (None, ["text"]))
        neutral = f" ({values} is not set)" if values else ""
        by_reason[refusal.reason].append(f"`{name}`{neutral}")
    rows += [f"| {reason} | {', '.join(names)} |" for reason, names in by_reason.items()]
    text = "An error 400 names the field, unless its value is null, false, 0 or empty, which counts as not set."
    return f"## Refused fields\n\n{text}\n\n" + "\n".join(rows)


if __name__ == "__main__":
    print(markdown(), end="")
