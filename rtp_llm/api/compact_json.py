"""The JSON encoding of all responses and events."""

import json
import re
from typing import Any

# OpenAI's SDK and httpx end a line of a stream also at U+0085, U+2028 and U+2029, which JSON allows in strings as they
# are. UTF-8 has no unpaired surrogates, but a client can send and get them as escapes.
_ESCAPED = re.compile("[\u0085\u2028\u2029\ud800-\udfff]")


def compact_json(value: Any) -> str:
    """Returns JSON without spaces or line separators (not even Unicode's), which can always be encoded as UTF-8."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if text.isascii() else _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
