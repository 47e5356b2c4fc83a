"""Creates the responses of /tokenize, /detokenize and /tokenizer/encode.

All functions raise RequestError 400 if `raw`, the request's JSON body, is invalid. They run where
`Service.prepare` decides: on the event loop, in a thread or in another process.
"""

from rtp_llm.api.body import parse_body
from rtp_llm.api.compact_json import compact_json
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.prompt_encoder import MAX_COUNTED_TOKENS
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.api.schema import DetokenizeRequest, EncodeRequest, TokenizeRequest
from rtp_llm.errors import RequestError, invalid_params


def tokenize(preparation: Preparation, raw: bytes, limits: PromptLimits) -> bytes:
    """Returns the JSON response of /tokenize: the token ids of a prompt or of a rendered chat."""
    body = parse_body(TokenizeRequest, raw)
    if body.messages and body.prompt is not None:
        raise invalid_params("prompt and messages exclude each other: send one of them", "messages")
    if body.messages:
        prompt = preparation.renderer.render(body.messages, body, body.tools)
        preparation.encoder.check_countable(prompt.text, limits)
        ids = preparation.template.encode(prompt)
    elif body.prompt is None:
        raise RequestError(400, 509, "NO_PROMPT_ERROR", "send prompt or messages", param="prompt")
    else:
        preparation.encoder.check_countable(body.prompt, limits)
        tokenizer, has_bos = preparation.tokenizer, body.add_special_tokens
        ids = tokenizer.encode_prompt(body.prompt) if has_bos else tokenizer.encode(body.prompt, False)
    max_model_len = limits.max_seq_len or None
    return compact_json({"token_ids": ids, "tokens": ids, "count": len(ids), "max_model_len": max_model_len}).encode()


def detokenize(preparation: Preparation, raw: bytes, limits: PromptLimits) -> bytes:
    """Returns the JSON response of /detokenize, the text of the given token ids, in vLLM's format."""
    body = parse_body(DetokenizeRequest, raw)
    if len(body.tokens) > MAX_COUNTED_TOKENS:
        message = f"tokens has {len(body.tokens)} ids; this route decodes at most {MAX_COUNTED_TOKENS}"
        raise invalid_params(message, "tokens")
    return compact_json({"prompt": preparation.tokenizer.decode(body.tokens, skip_special_tokens=False)}).encode()


def encode(preparation: Preparation, raw: bytes, limits: PromptLimits) -> bytes:
    """Returns the JSON response of /tokenizer/encode: the token ids of a prompt, in alibaba/rtp-llm's format."""
    body = parse_body(EncodeRequest, raw)
    preparation.encoder.check_countable(body.prompt, limits)
    ids, tokens, offsets = preparation.tokenizer.encode_with_offsets(body.prompt)
    response = {"token_ids": ids, "tokens": tokens, "error": ""}
    return compact_json(response | ({"offset_mapping": offsets} if body.return_offsets_mapping else {})).encode()
