"""Validates and tokenizes requests in alibaba/rtp-llm's own format (POST / and /batch_infer).

All functions raise RequestError 400 if a request is invalid, 429 if too few slots are free for a batch, 503 while the
model is loading.
"""

import itertools
from dataclasses import replace
from typing import Any

from rtp_llm.api.body import parse_body, validate
from rtp_llm.api.constraints import StructuredOutputFields, content_grammar
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.prepared import Prepared
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.api.schema import BatchInferRequest, GenerateConfig, NativeRequest, PromptOptions
from rtp_llm.errors import RequestError, empty_prompt, unsupported

_ALIASES = {
    "gen_length": "max_new_tokens",
    **{f"output_{n}": f"return_{n}" for n in ("hidden_states", "logits", "input_ids")},
}
# Fields whose value is itself a list. In all other fields, a list has one value per prompt of a batch.
_LIST_FIELDS = {"guided_choice", "stop_words_str", "stop_words_list"}


def prepare_native(preparation: Preparation, raw: bytes, limits: PromptLimits) -> Prepared[NativeRequest]:
    """Validates and tokenizes a request in alibaba/rtp-llm's native format (POST /). `body.generate_config` of the
    result has all generation fields of the request; see `merged_config` for where a request may have them.
    """
    body = parse_body(NativeRequest, raw)
    config = merged_config(body)
    if body.urls or body.images:
        raise unsupported("urls and images are not supported: this is a language model", "urls")
    limits.check_engine()
    return _prepare(preparation, body, config, limits)


def prepare_batch(preparation: Preparation, raw: bytes, limits: PromptLimits) -> Prepared[NativeRequest]:
    """Validates and tokenizes a request to /batch_infer. Returns it as if it had been sent to POST /."""
    batch = parse_body(BatchInferRequest, raw)
    config = merged_config(validate(NativeRequest, batch.model_dump()))
    limits.check_engine()
    return _prepare(preparation, NativeRequest(prompt_batch=batch.prompt_batch), config, limits)


def merged_config(body: NativeRequest) -> GenerateConfig:
    """Merges the three places where a native request may have generation fields: `generate_config`, `generation_config`
    and the top level of the body. If several have a field, the top level takes precedence, then `generation_config`.

    Raises RequestError 400 if a field is invalid.
    """
    nested = (body.generate_config or {}) | (body.generation_config or {})
    top_level = body.model_extra or {}
    merged: dict[str, Any] = {}
    for name, value in itertools.chain(nested.items(), top_level.items()):
        name = _ALIASES.get(name, name)
        # Upstream accepts a list with a value per prompt; only the first one is used here.
        is_per_prompt = isinstance(value, list) and name in GenerateConfig.model_fields and name not in _LIST_FIELDS
        if value is not None:
            merged[name] = value[0] if is_per_prompt and value else value
    return validate(GenerateConfig, merged)


def _prepare(
    preparation: Preparation, body: NativeRequest, config: GenerateConfig, limits: PromptLimits
) -> Prepared[NativeRequest]:
    grammar, constraint = content_grammar(preparation.tokenizer, config)
    prompts = _prompts(preparation, body, limits)
    generate_config = config.model_dump(exclude_unset=True, exclude=set(StructuredOutputFields.model_fields))
    small = NativeRequest(generate_config=generate_config, yield_generator=body.yield_generator, stream=body.stream)
    is_batch = body.prompt_batch is not None or len(prompts) > 1
    return replace(Prepared.pack(small, prompts), is_batch=is_batch, grammar=grammar, constraint=constraint)


def _prompts(preparation: Preparation, body: NativeRequest, limits: PromptLimits) -> list[list[int]]:
    name = next((n for n in ("prompt_batch", "prompt", "text") if getattr(body, n) is not None), "messages")
    limits = replace(limits, prompt_field=name)
    if name == "messages" and body.messages:
        prompt = preparation.renderer.render(body.messages, PromptOptions())
        return [preparation.encoder.encode_chat(prompt, limits)]
    if name == "messages":
        message = "no prompt: send prompt, text, prompt_batch or messages"
        raise RequestError(400, 509, "NO_PROMPT_ERROR", message, param="prompt")
    texts: str | list[str] = getattr(body, name)
    if not texts:
        raise empty_prompt(f"{name} is empty: send at least one prompt", name)
    texts = [texts] if isinstance(texts, str) else texts
    limits.check_count(len(texts))
    return [preparation.encoder.encode_prompt(text, limits) for text in texts]
