"""Errors in Anthropic's format (platform.claude.com/docs/en/api/errors)."""

from typing import Any

from rtp_llm.errors import RequestError

PATH_PREFIX = "/v1/messages"
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: RequestError) -> dict[str, Any]:
    """Returns the error as Anthropic's JSON object {"type": "error", "error": {type, message}}: the body of an error
    response, or the data of an `error` event in a stream.
    """
    default = "invalid_request_error" if error.status < 500 else "api_error"
    return {"type": "error", "error": {"type": _TYPES.get(error.status, default), "message": error.message}}
