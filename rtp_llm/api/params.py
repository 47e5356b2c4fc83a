"""From what clients ask to what engine and text layer do: the defaults, the limits and the refusals of both APIs."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rtp_llm.api.schema import NATIVE_REFUSED, GenerateConfig, OpenAIRequest
from rtp_llm.api.service import Service, TextParams
from rtp_llm.config import Config
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import ConfigError, invalid_params, unsupported
from rtp_llm.text.tokenizer import Tokenizer

MAX_ID_DIGITS = 10  # of a token id; int() refuses to read thousands
MIN_TEMPERATURE = 1e-5  # below, logits divided by it leave the range of numbers: the likeliest token is meant

_NATIVE_NAMES = {
    "min_new_tokens": "min_tokens",
    "random_seed": "seed",
    "stop_words_str": "stop",
    "print_stop_words": "include_stop_str_in_output",
    "num_return_sequences": "n",
    **{n: n for n in ("top_k", "top_p", "min_p", "temperature", "ignore_eos", "skip_special_tokens")},
    **{n: n for n in ("repetition_penalty", "presence_penalty", "frequency_penalty")},
}

# Which fields of a chat request each native field sets.
_OVERLAID: dict[str, tuple[str, ...]] = {
    **{ours: (theirs,) for ours, theirs in _NATIVE_NAMES.items()},
    "do_sample": ("temperature",),
    "stop_words_list": ("stop", "stop_token_ids"),
}


@dataclass(frozen=True)
class StopWords:
    """Where answers end for this model and server, whatever a request says."""

    token_ids: frozenset[int]
    strings: tuple[str, ...]

    @classmethod
    def read(cls, config: Config, tokenizer: Tokenizer) -> "StopWords":
        """From STOP_WORDS_STR, STOP_WORDS_LIST and FORCE_STOP_WORDS. Raises ConfigError on bad JSON."""
        strings = _json_list("STOP_WORDS_STR", config.stop_words_str, str)
        sequences = _json_list("STOP_WORDS_LIST", config.stop_words_list, list)
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31 for s in sequences for i in s):
            raise ConfigError(f"STOP_WORDS_LIST={config.stop_words_list!r}: allowed: lists of token ids, 0 or more")
        ids, texts = split_stop_ids(sequences, tokenizer)
        own = frozenset() if config.force_stop_words else tokenizer.eos_ids
        return cls(own | ids, (*strings, *texts))


def split_stop_ids(sequences: Sequence[Sequence[int]], tokenizer: Tokenizer) -> tuple[frozenset[int], tuple[str, ...]]:
    """Single ids end a sequence in the engine; longer ones are looked for in the text, as the string they spell."""
    single = frozenset(s[0] for s in sequences if len(s) == 1)
    spelled = (tokenizer.decode(list(s), skip_special_tokens=False) for s in sequences if len(s) > 1)
    return single, tuple(text for text in spelled if text)


def sampling_params(
    body: OpenAIRequest,
    service: Service,
    stop_words: StopWords,
    prompt: Sequence[int],
    *,
    max_tokens: int | None,
    temperature: float,
    logprobs: int | None = None,
    prompt_logprobs: bool = False,
) -> SamplingParams:
    """`max_tokens` None: all the room there is; `temperature`: the endpoint's default. Raises RequestError 400."""
    room = service.remaining_tokens(prompt)
    wanted = _or(body.temperature, temperature)
    limit = min(max(1, max_tokens), room) if max_tokens is not None else room
    ends = frozenset() if body.ignore_eos else stop_words.token_ids
    params = SamplingParams(
        max_tokens=limit,
        temperature=wanted if wanted >= MIN_TEMPERATURE else 0.0,
        top_k=max(0, body.top_k or 0),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=_logit_bias(body.logit_bias or {}, service.engine.vocab_size),
        seed=body.seed if body.seed is not None else secrets.randbits(63),
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(sorted(ends | set(body.stop_token_ids or ()))),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    _check_ids(params.stop_token_ids, service.engine.vocab_size)
    if params.min_tokens > limit:
        raise invalid_params(f"min_tokens={params.min_tokens} is more than max_tokens={limit}", "min_tokens")
    return params


def text_params(body: OpenAIRequest, stop_words: StopWords, timeout_ms: int = 0) -> TextParams:
    own = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return TextParams(
        stop=(*own, *stop_words.strings),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        timeout_ms=timeout_ms,
    )


def native_sampling(config: GenerateConfig, tokenizer: Tokenizer) -> OpenAIRequest:
    """A native generate_config in the names of the OpenAI endpoints. Raises RequestError 400 for what is not served."""
    for name in NATIVE_REFUSED:
        if getattr(config, name):
            raise unsupported(f"{name} is not supported", name)
    if config.num_beams > 1:
        raise unsupported(f"num_beams={config.num_beams}: beam search is not supported; allowed: 1", "num_beams")
    values = {theirs: getattr(config, ours) for ours, theirs in _NATIVE_NAMES.items()}
    ids, texts = split_stop_ids(config.stop_words_list, tokenizer)
    values["stop_token_ids"] = sorted(ids)
    values["stop"] = [*config.stop_words_str, *texts]
    values["n"] = max(1, config.num_return_sequences)
    values["top_p"] = config.top_p or 1.0  # upstream takes 0 for "no limit"
    if not config.do_sample:
        values["temperature"] = 0.0
    return OpenAIRequest.model_construct(**values)


def merge_extra_configs(body: OpenAIRequest, config: GenerateConfig | None, tokenizer: Tokenizer) -> OpenAIRequest:
    """A chat request with its `extra_configs` laid over it: only what the client has set there."""
    if config is None:
        return body
    translated = native_sampling(config, tokenizer)
    given = {name for ours in config.model_fields_set for name in _OVERLAID.get(ours, ())}
    if config.do_sample and "temperature" not in config.model_fields_set:
        given.discard("temperature")  # sampling is what a chat request does by itself, at its own temperature
    return body.model_copy(update={name: getattr(translated, name) for name in given})


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    wrong = next((key for key in bias if not key.isdecimal() or len(key) > MAX_ID_DIGITS), None)
    if wrong is not None:
        raise invalid_params(f"logit_bias: key {wrong[:40]!r} is no token id", "logit_bias")
    table = {int(key): value for key, value in bias.items()}
    _check_ids(table, vocab_size, "logit_bias")
    return table


def _check_ids(ids: Any, vocab_size: int, param: str = "stop_token_ids") -> None:
    wrong = next((i for i in ids if i >= vocab_size), None)
    if wrong is not None:
        raise invalid_params(f"{param}: token id {wrong} is outside the vocabulary of {vocab_size}", param)


def _json_list(name: str, text: str, kind: type) -> list[Any]:
    if not text:
        return []
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}: malformed JSON: {error}") from None
    if not isinstance(value, list) or not all(isinstance(v, kind) and v for v in value):
        what = "strings" if kind is str else "lists of token ids"
        raise ConfigError(f"{name}={text!r}: allowed: a JSON list of non-empty {what}")
    return value
