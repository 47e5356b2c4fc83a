"""Translates requests to /v1/messages into OpenAI's chat requests, then validates and tokenizes them."""

from dataclasses import replace

from rtp_llm.api.anthropic.schema import CountTokensRequest, MessagesRequest
from rtp_llm.api.anthropic.translation import to_chat
from rtp_llm.api.body import parse_body, validate
from rtp_llm.api.compact_json import compact_json
from rtp_llm.api.field_names import renamed_field
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.prepared import Prepared
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.api.schema import ChatRequest


def prepare_message(preparation: Preparation, raw: bytes, limits: PromptLimits) -> Prepared[ChatRequest]:
    """Validates and tokenizes a request to /v1/messages. Returns it as a chat request. Raises RequestError: 400 if it
    is invalid, 503 while the model is loading.
    """
    with renamed_field("response_format", "output_config.format"):
        chat = preparation.chat_body(validate(ChatRequest, to_chat(parse_body(MessagesRequest, raw))), limits)
    return replace(chat, constraint="output_config.format") if chat.constraint == "response_format" else chat


def count_tokens(preparation: Preparation, raw: bytes, limits: PromptLimits) -> bytes:
    """Returns the JSON response of /v1/messages/count_tokens: the number of prompt tokens. Raises RequestError 400 if
    the request is invalid.
    """
    prompt = preparation.renderer.render_chat(validate(ChatRequest, to_chat(parse_body(CountTokensRequest, raw))))
    preparation.encoder.check_countable(prompt.text, limits)
    return compact_json({"input_tokens": len(preparation.template.encode(prompt))}).encode()
