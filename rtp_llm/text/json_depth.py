"""A limit on the nesting depth of JSON, far below the depth at which templates and grammars, which recurse, fail."""

from typing import Any

MAX_DEPTH = 128
TOO_DEEP = f"JSON nested more deeply than {MAX_DEPTH} levels"


def is_too_deep(value: Any) -> bool:
    """Returns whether arrays and objects are nested deeper than MAX_DEPTH. Takes about as long as parsing the JSON."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return False
        level = [item for c in containers for item in (c.values() if isinstance(c, dict) else c)]
    return True
