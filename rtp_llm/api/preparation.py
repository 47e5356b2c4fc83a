"""Turns the bytes of a request body into a validated request and the token ids of its prompts.

Everything whose cost grows with the body happens here: JSON, validation, the chat template, the tokenizer. The
functions are synchronous and use no state but tokenizer and template, so that `preparer` can run them in another
process. What they return is small whatever the client sent, apart from the prompts, whose length is limited.
"""

import array
import asyncio
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from rtp_llm.api.body import parse_object, validate
from rtp_llm.api.schema import (
    BatchInferRequest,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    EncodeRequest,
    GenerateConfig,
    NativeRequest,
    TokenizeRequest,
)
from rtp_llm.errors import (
    RequestError,
    empty_prompt,
    engine_gone,
    invalid_format,
    invalid_params,
    long_prompt,
    overloaded,
    unsupported,
)
from rtp_llm.text.template import ChatTemplate, TemplateError
from rtp_llm.text.tokenizer import Tokenizer

Model = TypeVar("Model", bound=BaseModel)
MAX_COUNTED_TOKENS = 1 << 18  # of a text for /tokenize, where the model's limit is lower

_ALIASES = {
    "gen_length": "max_new_tokens",
    **{f"output_{n}": f"return_{n}" for n in ("hidden_states", "logits", "input_ids")},
}
# Fields whose value is itself a list. In all other fields, a list has one value per prompt of a batch.
_LIST_FIELDS = {"stop_words_str", "stop_words_list", "bad_words_list", "select_tokens_str", "select_tokens_id"}


@dataclass(frozen=True)
class PromptLimits:
    """What prompts may be at the moment. `max_seq_len` is 0 until the model has been loaded.

    max_seq_len_reason  what bounds `max_seq_len`
    full_message  of the error if a batch has more than `free_sequences` prompts
    """

    max_seq_len: int
    max_seq_len_reason: str
    vocab_size: int
    free_sequences: int
    full_message: str

    def check_engine(self) -> None:
        """Raises RequestError 503 until the ranks have first loaded."""
        if not self.max_seq_len:
            raise engine_gone("the model is still loading: see /health")

    def check_length(self, num_tokens: int, prefix: str = "") -> None:
        """Raises RequestError 400 if a prompt of so many tokens leaves no room for output."""
        if num_tokens >= self.max_seq_len:
            raise long_prompt(
                f"the prompt has {prefix}{num_tokens} tokens; at most {self.max_seq_len - 1} fit "
                f"({self.max_seq_len_reason})"
            )

    def check_count(self, sequences: int) -> None:
        """Raises RequestError 429 if a batch has more sequences than there are free slots."""
        if sequences > self.free_sequences:
            raise overloaded(self.full_message.format(sequences=sequences))


@dataclass(frozen=True)
class Prepared(Generic[Model]):
    """A request whose prompts are encoded. `body` lacks the fields that they come from.

    text      the rendered chat, for /chat/render; empty for other requests
    is_batch  whether a native request has `prompt_batch`
    """

    body: Model
    packed_prompts: list[bytes]  # int32 ids: bytes are copied between processes at once, a list item by item
    text: str = ""
    is_batch: bool = False

    async def prompts(self) -> list[list[int]]:
        """Returns the token ids of each prompt. Other tasks run between two prompts."""
        prompts = []
        for packed in self.packed_prompts:
            prompts.append(array.array("i", packed).tolist())
            await asyncio.sleep(0)
        return prompts


class Preparation:
    """The preparation of each kind of request, by the name of a method. All raise RequestError."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self._tokenizer, self._template = tokenizer, template

    def chat(self, raw: bytes, limits: PromptLimits) -> Prepared[ChatRequest]:
        body = _parse(ChatRequest, raw)
        if body.response_format and body.response_format.get("type", "text") != "text":
            raise unsupported("response_format: only {'type': 'text'} is supported", "response_format")
        limits.check_engine()
        kwargs = dict(body.chat_template_kwargs or {})
        if body.enable_thinking is not None:
            kwargs.setdefault("enable_thinking", body.enable_thinking)
        tools = None if body.tool_choice == "none" else body.tools
        text = self._render(body.messages, tools, body.add_generation_prompt, kwargs)
        prompt = self._encode_prompt(text, limits, add_special_tokens=False)
        used = ("messages", "tools", "tool_choice", "response_format", "chat_template_kwargs")
        return _prepared(body, [prompt], used, text)

    def completion(self, raw: bytes, limits: PromptLimits) -> Prepared[CompletionRequest]:
        body = _parse(CompletionRequest, raw)
        if body.suffix:
            raise unsupported("suffix is not supported: this model completes to the right only", "suffix")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise unsupported("best_of is not supported: leave it out, or make it equal to n", "best_of")
        limits.check_engine()
        items: Sequence[Any] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if not items:
            raise empty_prompt("prompt is an empty list: send a text, texts, token ids or lists of token ids")
        if isinstance(items[0], int):
            items = [items]
        limits.check_count(len(items) * (body.n or 1))
        prompts = [self._encode_prompt(i, limits) if isinstance(i, str) else _checked(i, limits) for i in items]
        return _prepared(body, prompts, ("prompt",))

    def native(self, raw: bytes, limits: PromptLimits) -> Prepared[NativeRequest]:
        """Returns a body whose `generate_config` has all fields of the request, and no others."""
        body = _parse(NativeRequest, raw)
        config = merged_config(body)
        if body.urls or body.images:
            raise unsupported("urls and images are not supported: this is a language model", "urls")
        limits.check_engine()
        return _native(body, config, self._native_prompts(body, limits))

    def batch_infer(self, raw: bytes, limits: PromptLimits) -> Prepared[NativeRequest]:
        batch = _parse(BatchInferRequest, raw)
        config = merged_config(validate(NativeRequest, batch.model_dump()))
        limits.check_engine()
        body = NativeRequest(prompt_batch=batch.prompt_batch)
        return _native(body, config, self._native_prompts(body, limits))

    def tokenize(self, raw: bytes, limits: PromptLimits) -> bytes:
        """Returns the response of /tokenize."""
        body = _parse(TokenizeRequest, raw)
        if body.messages:
            text, add_special_tokens = self._render(body.messages, body.tools), False
        elif body.prompt is None:
            raise RequestError(400, 509, "NO_PROMPT_ERROR", "send prompt or messages", param="prompt")
        else:
            text, add_special_tokens = body.prompt, body.add_special_tokens
        self._check_countable(text, limits)
        return _json({"token_ids": self._tokenizer.encode(text, add_special_tokens)})

    def encode(self, raw: bytes, limits: PromptLimits) -> bytes:
        """Returns the response of /tokenizer/encode."""
        body = _parse(EncodeRequest, raw)
        self._check_countable(body.prompt, limits)
        ids, tokens, offsets = self._tokenizer.encode_with_offsets(body.prompt)
        response = {"token_ids": ids, "tokens": tokens, "error": ""}
        return _json(response | ({"offset_mapping": offsets} if body.return_offsets_mapping else {}))

    def _native_prompts(self, body: NativeRequest, limits: PromptLimits) -> list[list[int]]:
        if body.prompt_batch is not None:
            if not body.prompt_batch:
                raise empty_prompt("prompt_batch is empty: send at least one prompt")
            limits.check_count(len(body.prompt_batch))
            return [self._encode_prompt(text, limits) for text in body.prompt_batch]
        text = body.prompt if body.prompt is not None else body.text
        if text is None and body.messages:
            return [self._encode_prompt(self._render(body.messages), limits, add_special_tokens=False)]
        if text is None:
            message = "no prompt: send prompt, text, prompt_batch or messages"
            raise RequestError(400, 509, "NO_PROMPT_ERROR", message, param="prompt")
        if isinstance(text, list):  # as upstream: only prompt_batch makes a batch, other lists use their first item
            text = text[0] if text else ""
        return [self._encode_prompt(text, limits)]

    def _render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        reserved = {"messages", "tools", "add_generation_prompt"} & (kwargs or {}).keys()
        if reserved:
            message = f"chat_template_kwargs: {min(reserved)!r} is reserved; use the request field of that name"
            raise invalid_params(message, "chat_template_kwargs")
        plain = [m.model_dump(exclude_unset=True) for m in messages]
        try:
            return self._template.render(
                plain, tools=tools or None, add_generation_prompt=add_generation_prompt, **(kwargs or {})
            )
        except TemplateError as error:
            raise invalid_params(str(error), "messages") from None

    def _encode_prompt(self, text: str, limits: PromptLimits, add_special_tokens: bool = True) -> list[int]:
        if not text:
            raise empty_prompt()
        _check_unicode(text)
        limits.check_length(self._tokenizer.min_tokens(text, limits.max_seq_len), prefix="at least ")
        return _checked(self._tokenizer.encode(text, add_special_tokens), limits)

    def _check_countable(self, text: str, limits: PromptLimits) -> None:
        _check_unicode(text)
        limit = max(MAX_COUNTED_TOKENS, limits.max_seq_len)
        num_tokens = self._tokenizer.min_tokens(text, limit)
        if num_tokens > limit:
            raise long_prompt(f"the text has at least {num_tokens} tokens; this route encodes at most {limit}")


def merged_config(body: NativeRequest) -> GenerateConfig:
    """Merges generate_config, generation_config and top-level fields; later ones win. Raises RequestError 400."""
    fields = GenerateConfig.model_fields.keys()
    nested = (body.generate_config or {}) | (body.generation_config or {})
    top_level = body.model_extra or {}
    merged: dict[str, Any] = {}
    for name, value in itertools.chain(nested.items(), top_level.items()):
        name = _ALIASES.get(name, name)
        # Upstream accepts a list with a value per prompt; only the first one is used here.
        is_per_prompt = isinstance(value, list) and name not in _LIST_FIELDS
        if name in fields and value is not None:
            merged[name] = value[0] if is_per_prompt and value else value
    return validate(GenerateConfig, merged)


def _parse(model: type[Model], raw: bytes) -> Model:
    return validate(model, parse_object(raw))


def _native(body: NativeRequest, config: GenerateConfig, prompts: list[list[int]]) -> Prepared[NativeRequest]:
    small = NativeRequest(
        generate_config=config.model_dump(exclude_unset=True), yield_generator=body.yield_generator, stream=body.stream
    )
    packed = [array.array("i", prompt).tobytes() for prompt in prompts]
    return Prepared(small, packed, is_batch=body.prompt_batch is not None)


def _prepared(body: Model, prompts: list[list[int]], used: Sequence[str], text: str = "") -> Prepared[Model]:
    small = body.model_copy(update=dict.fromkeys(used))
    return Prepared(small, [array.array("i", prompt).tobytes() for prompt in prompts], text)


def _checked(prompt: list[int], limits: PromptLimits) -> list[int]:
    """Returns the prompt. Raises RequestError 400 if it is empty, longer than MAX_SEQ_LEN - 1 tokens or has an id
    outside the vocabulary.
    """
    if not prompt:
        raise empty_prompt()
    limits.check_length(len(prompt))
    invalid_id = next((t for t in prompt if not 0 <= t < limits.vocab_size), None)
    if invalid_id is not None:
        raise invalid_params(f"token id {invalid_id} is outside the vocabulary of {limits.vocab_size}", "prompt")
    return prompt


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the text has an unpaired surrogate at character {error.start}: not valid Unicode"
        raise invalid_format(message) from None


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
