"""Converts request bodies of the OpenAI and native APIs to parameters; applies defaults and limits.

SamplingParams are for the engine, TextParams for the API process.
"""

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rtp_llm.api.schema import GenerateConfig, OpenAIRequest
from rtp_llm.api.service import Service
from rtp_llm.api.text_stream import TextParams
from rtp_llm.config import Config
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import ConfigError, invalid_params
from rtp_llm.text.tokenizer import Tokenizer

MAX_ID_DIGITS = 10  # of a token id in logit_bias; int() raises on thousands of digits
N = TypeVar("N", int, float)
MIN_TEMPERATURE = 1e-5  # below it sampling is greedy, since dividing the logits would overflow

# {native field: OpenAI field} of equivalent request fields.
_OPENAI_NAME = {
    "min_new_tokens": "min_tokens",
    "random_seed": "seed",
    "stop_words_str": "stop",
    "print_stop_words": "include_stop_str_in_output",
    "num_return_sequences": "n",
    **{n: n for n in ("top_k", "top_p", "min_p", "temperature", "ignore_eos", "skip_special_tokens")},
    **{n: n for n in ("timeout_ms", "ttft_timeout_ms")},
    **{n: n for n in ("repetition_penalty", "presence_penalty", "frequency_penalty")},
}

# The chat request's fields that each native field of `extra_configs` overrides.
_OVERRIDDEN_FIELDS: dict[str, tuple[str, ...]] = {
    **{native: (openai,) for native, openai in _OPENAI_NAME.items()},
    "do_sample": ("temperature",),
    "stop_words_list": ("stop", "stop_token_ids"),
}


@dataclass(frozen=True)
class StopWords:
    """Stop token ids and stop strings from the model and the settings, which apply to every request."""

    token_ids: frozenset[int]
    strings: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Config, tokenizer: Tokenizer) -> "StopWords":
        """Reads STOP_WORDS_STR, STOP_WORDS_LIST and FORCE_STOP_WORDS. Raises ConfigError if one is invalid."""
        strings = _json_list("STOP_WORDS_STR", config.stop_words_str, str)
        sequences = _json_list("STOP_WORDS_LIST", config.stop_words_list, list)
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31 for s in sequences for i in s):
            raise ConfigError(
                f"STOP_WORDS_LIST={config.stop_words_list!r}: allowed: [[ID, …], …] with token ids of 0 or more"
            )
        ids, texts = split_stop_ids(sequences, tokenizer)
        eos_ids = frozenset() if config.force_stop_words else tokenizer.eos_ids
        return cls(eos_ids | ids, (*strings, *texts))


def split_stop_ids(sequences: Sequence[Sequence[int]], tokenizer: Tokenizer) -> tuple[frozenset[int], tuple[str, ...]]:
    """Splits stop sequences of token ids into (stop token ids, stop strings). The engine stops at single ids. A longer
    sequence is decoded to a stop string, which the API process looks for in the output text.
    """
    single_ids = frozenset(s[0] for s in sequences if len(s) == 1)
    texts = (tokenizer.decode(list(s), skip_special_tokens=False) for s in sequences if len(s) > 1)
    return single_ids, tuple(text for text in texts if text)


def sampling_params(
    body: OpenAIRequest,
    service: Service,
    stop_words: StopWords,
    prompt: Sequence[int],
    *,
    max_tokens: int | None,
    temperature: float,
    default_max_tokens: int | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: str = "",
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> SamplingParams:
    """Returns the engine's parameters for one prompt. Raises RequestError 400.

    Precedence of a parameter: the request, generation_config.json, the endpoint's default.

    max_tokens   the request's limit; None: not set
    temperature, default_max_tokens  the endpoint's defaults; default_max_tokens=None: up to MAX_SEQ_LEN
    logprobs, prompt_logprobs  how many of the most likely tokens to return for each output or prompt token; None: none
    grammar      of llguidance that the output must match; generation ends where the grammar ends, even with ignore_eos
    bad_words    token ids of each forbidden word
    """
    defaults = service.sampling_defaults
    remaining_tokens = service.remaining_tokens(prompt)
    if max_tokens is None:
        max_tokens = defaults.max_new_tokens or default_max_tokens
    limit = min(max(1, max_tokens), remaining_tokens) if max_tokens is not None else remaining_tokens
    temperature = _first(body.temperature, defaults.default_temperature, temperature)
    top_p = _first(body.top_p, defaults.top_p, 1.0)
    default_stop_ids = frozenset() if body.ignore_eos else stop_words.token_ids
    if grammar:
        default_stop_ids |= service.tokenizer.eos_ids
    params = SamplingParams(
        max_tokens=limit,
        temperature=temperature if temperature >= MIN_TEMPERATURE and top_p else 0.0,
        top_k=max(0, _first(body.top_k, defaults.top_k, 0)),
        top_p=top_p or 1.0,
        min_p=_first(body.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias or {}, service.engine_info.vocab_size),
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=bad_words,
        seed=body.seed if body.seed is not None else secrets.randbits(63),
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(sorted(default_stop_ids | set(body.stop_token_ids or ()))),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )
    _check_ids(params.stop_token_ids, service.engine_info.vocab_size)
    _check_ids(params.allowed_token_ids, service.engine_info.vocab_size, "allowed_token_ids")
    if params.min_tokens > limit:
        raise invalid_params(f"min_tokens={params.min_tokens} is more than max_tokens={limit}", "min_tokens")
    return params


def text_params(body: OpenAIRequest, stop_words: StopWords) -> TextParams:
    stop_strings = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return TextParams(
        stop=(*stop_strings, *stop_words.strings),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        timeout_ms=body.timeout_ms or 0,
        ttft_timeout_ms=body.ttft_timeout_ms or 0,
    )


def native_to_openai(config: GenerateConfig, tokenizer: Tokenizer) -> OpenAIRequest:
    """Returns alibaba/rtp-llm's `generate_config` as an OpenAI request. Fields that the client did not send stay unset,
    except `n`, `stop` and `stop_token_ids`.
    """
    sent = config.model_fields_set
    values = {openai: getattr(config, native) for native, openai in _OPENAI_NAME.items() if native in sent}
    ids, texts = split_stop_ids(config.stop_words_list, tokenizer)
    values["stop_token_ids"] = sorted(ids)
    values["stop"] = [*config.stop_words_str, *texts]
    values["n"] = max(1, config.num_return_sequences)
    if config.top_p == 0:
        values["top_p"] = 1.0  # upstream: 0 means no limit
    if not config.do_sample:
        values["temperature"] = 0.0
    return OpenAIRequest.model_construct(**values)


def merge_extra_configs(body: OpenAIRequest, config: GenerateConfig | None, tokenizer: Tokenizer) -> OpenAIRequest:
    """Returns the chat request `body`, in which the fields that the client set in `config` (the request's
    `extra_configs`, in alibaba/rtp-llm's format) override the equivalent fields.
    """
    if config is None:
        return body
    overrides = native_to_openai(config, tokenizer)
    names = {name for native in config.model_fields_set for name in _OVERRIDDEN_FIELDS.get(native, ())}
    if config.do_sample and "temperature" not in config.model_fields_set:
        names.discard("temperature")  # do_sample=true is the chat default and keeps the request's temperature
    return body.model_copy(update={name: getattr(overrides, name) for name in names})


def _first(value: N | None, of_model: N | None, default: N) -> N:
    return next(v for v in (value, of_model, default) if v is not None)


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    invalid_key = next((key for key in bias if not key.isdecimal() or len(key) > MAX_ID_DIGITS), None)
    if invalid_key is not None:
        raise invalid_params(f"logit_bias: key {invalid_key[:40]!r} is not a token id", "logit_bias")
    bias_by_id = {int(key): value for key, value in bias.items()}
    _check_ids(bias_by_id, vocab_size, "logit_bias")
    return bias_by_id


def _check_ids(ids: Iterable[int], vocab_size: int, param: str = "stop_token_ids") -> None:
    invalid_id = next((i for i in ids if i >= vocab_size), None)
    if invalid_id is not None:
        raise invalid_params(f"{param}: token id {invalid_id} is outside the vocabulary of {vocab_size}", param)


def _json_list(name: str, text: str, item_type: type) -> list[Any]:
    if not text:
        return []
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}: malformed JSON: {error}") from None
    if not isinstance(value, list) or not all(isinstance(v, item_type) and v for v in value):
        items = "strings" if item_type is str else "lists of token ids"
        raise ConfigError(f"{name}={text!r}: allowed: a JSON list of non-empty {items}")
    return value
