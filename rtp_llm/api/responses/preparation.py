"""Translates requests to /v1/responses into OpenAI's chat requests, then validates and tokenizes them."""

import json
from dataclasses import replace
from typing import Any

from rtp_llm.api.body import parse_body, validate
from rtp_llm.api.compact_json import compact_json
from rtp_llm.api.field_names import renamed_field
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.prepared import PreparedResponse
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.api.responses.schema import ResponsesRequest
from rtp_llm.api.responses.translation import echoed_fields, input_items_json, input_messages, to_chat
from rtp_llm.api.schema import ChatRequest
from rtp_llm.errors import invalid_params, unsupported


def prepare_response(
    preparation: Preparation, raw: bytes, limits: PromptLimits, *, stores: bool, history: str = ""
) -> PreparedResponse:
    """Validates and tokenizes a request to /v1/responses.

    `history`: JSON array of the chat messages up to the response that the request continues; empty if it continues
    none. `stores`: whether the server stores responses.

    Raises RequestError 400 if the request is invalid, 503 while the model is loading.
    """
    body = parse_body(ResponsesRequest, raw)
    if body.previous_response_id and not history:
        message = "previous_response_id: write the name of this field without escapes"
        raise invalid_params(message, "previous_response_id")
    is_stored = stores and body.store is not False
    if body.background and not is_stored:
        message = "background needs a stored response: set RESPONSES_STORE_MB, and not store to false"
        raise unsupported(message, "background")
    earlier: list[dict[str, Any]] = json.loads(history) if history else []
    with renamed_field("response_format", "text.format"):
        chat = preparation.chat_body(validate(ChatRequest, to_chat(body, earlier)), limits, "input")
    if chat.constraint == "response_format":
        chat = replace(chat, constraint="text.format")
    echo = compact_json(echoed_fields(body))
    if not is_stored:
        return PreparedResponse(chat, echo)
    conversation = compact_json([*earlier, *input_messages(body)])
    return PreparedResponse(chat, echo, bool(body.background), conversation, input_items_json(body))


def previous_response_id(preparation: Preparation, raw: bytes, limits: PromptLimits) -> str | None:
    """Returns the id of the response that a request continues; None if it continues none.

    Raises RequestError 400 if the body is invalid.
    """
    return parse_body(ResponsesRequest, raw).previous_response_id
