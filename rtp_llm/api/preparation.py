"""Turns the bytes of a request body into a validated request and the token ids of its prompts.

Everything whose cost grows with the body happens here: JSON, validation, the chat template, the tokenizer. The
functions are synchronous and use no state but tokenizer and template, so that `preparer` can run them in another
process. What they return is small whatever the client sent, apart from the prompts, whose length is limited.
"""

import array
import asyncio
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from rtp_llm.api import fields
from rtp_llm.api.anthropic import translation as anthropic
from rtp_llm.api.anthropic.schema import CountTokensRequest, MessagesRequest
from rtp_llm.api.body import parse_object, validate
from rtp_llm.api.compact_json import compact_json
from rtp_llm.api.constraints import StructuredOutputFields, content_grammar
from rtp_llm.api.reasoning import template_kwargs
from rtp_llm.api.responses import translation as responses
from rtp_llm.api.responses.schema import ResponsesRequest
from rtp_llm.api.schema import (
    BatchInferRequest,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EncodeRequest,
    GenerateConfig,
    NativeRequest,
    OpenAIRequest,
    PromptOptions,
    TokenizeRequest,
)
from rtp_llm.api.tools import ToolUse, rendered_tools, tool_use
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
from rtp_llm.text.grammar import check, combine
from rtp_llm.text.json_schema import GrammarError
from rtp_llm.text.output_format import AnswerFormats, OutputFormat
from rtp_llm.text.template import ChatTemplate, Prompt, TemplateError
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.truncation import encode_truncated

Model = TypeVar("Model", bound=BaseModel)
MAX_COUNTED_TOKENS = 1 << 18  # of a text for /tokenize, where the model's limit is lower

_ALIASES = {
    "gen_length": "max_new_tokens",
    **{f"output_{n}": f"return_{n}" for n in ("hidden_states", "logits", "input_ids")},
}
# Arguments of `ChatTemplate.render`, which have request fields of their own.
_RESERVED_KWARGS = {"messages", "tools", "add_generation_prompt", "continue_final_message", "allow_special_tokens"}
# Fields whose value is itself a list. In all other fields, a list has one value per prompt of a batch.
_LIST_FIELDS = {"guided_choice", "stop_words_str", "stop_words_list"}


@dataclass(frozen=True)
class PromptLimits:
    """What prompts may be at the moment. `max_seq_len` is 0 until the model has been loaded.

    max_seq_len_reason, slots_reason  what bounds `max_seq_len` and `slots`
    slots, used_slots  sequences that fit at most, and those that are open
    prompt_field  the body's field that an error on the prompt names
    """

    max_seq_len: int
    max_seq_len_reason: str
    vocab_size: int
    slots: int
    used_slots: int
    slots_reason: str
    prompt_field: str = "prompt"

    @property
    def free_slots(self) -> int:
        return self.slots - self.used_slots

    def check_engine(self) -> None:
        """Raises RequestError 503 until the ranks have first loaded."""
        if not self.max_seq_len:
            raise engine_gone("the model is still loading: see /health")

    def check_length(self, num_tokens: int, prefix: str = "") -> None:
        """Raises RequestError 400 if a prompt of so many tokens leaves no room for output."""
        if num_tokens >= self.max_seq_len:
            # LangChain looks for the first sentence, litellm and others for OpenAI's wording of the second.
            raise long_prompt(
                f"The prompt is too long: it has {prefix}{num_tokens} tokens. This model's maximum context length is "
                f"{self.max_seq_len} tokens ({self.max_seq_len_reason}), of which a prompt may have "
                f"{self.max_seq_len - 1}",
                self.prompt_field,
            )

    def num_kept(self, truncate: int | None, max_tokens: int) -> int | None:
        """Returns how many of its last tokens a prompt keeps at most, None: all.

        truncate: the request's `truncate_prompt_tokens`; -1: as many as fit beside `max_tokens` of output.
        Raises RequestError 400 if none fits.
        """
        if truncate != -1:
            return truncate or None
        if max_tokens >= self.max_seq_len:
            message = (
                f"max_tokens={max_tokens} leaves no room for a prompt in the {self.max_seq_len} tokens of this model"
            )
            raise invalid_params(f"{message}, so truncate_prompt_tokens=-1 would drop all of it", "max_tokens")
        return self.max_seq_len - max_tokens

    def check_count(self, sequences: int) -> None:
        """Raises RequestError 400 if a request has more sequences than ever fit, 429 if they do not fit now."""
        if sequences > self.slots:
            raise invalid_params(
                f"the request has {sequences} sequences (prompts x n); at most {self.slots} fit: {self.slots_reason}"
            )
        if sequences > self.free_slots:
            message = f"{self.used_slots} sequences are open, {sequences} more do not fit: {self.slots_reason}"
            raise overloaded(f"{message}; try again later")


@dataclass(frozen=True)
class Prepared(Generic[Model]):
    """A request whose prompts are encoded. `body` lacks the fields that they come from.

    text      the rendered chat, for /chat/render; empty for other requests
    is_batch  whether a native request has `prompt_batch`, or several prompts
    output_format  of the answers to a chat
    bad_words  the token ids of each
    grammar, constraint  what all of the answer's tokens must match, and the field that asks for it; empty: any text
    """

    body: Model
    packed_prompts: list[bytes]  # int32 ids: bytes are copied between processes at once, a list item by item
    text: str = ""
    is_batch: bool = False
    output_format: OutputFormat = field(default_factory=OutputFormat)
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""
    constraint: str = ""

    async def prompts(self) -> list[list[int]]:
        """Returns the token ids of each prompt. Other tasks run between two prompts."""
        prompts = []
        for packed in self.packed_prompts:
            prompts.append(array.array("i", packed).tolist())
            await asyncio.sleep(0)
        return prompts


@dataclass(frozen=True)
class PreparedResponse:
    """A request to /v1/responses whose prompt is encoded.

    echo          JSON object: the fields of the request that the answer repeats
    conversation  JSON array of messages, for the response that continues this one; empty if it is not stored
    input_items   JSON array, for its clients; empty if it is not stored
    """

    chat: Prepared[ChatRequest]
    echo: str
    is_background: bool = False
    conversation: str = ""
    input_items: str = ""

    @property
    def body(self) -> ChatRequest:
        return self.chat.body


class Preparation:
    """The preparation of each kind of request, by the name of a method. All raise RequestError."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, formats: AnswerFormats):
        self._tokenizer, self._template, self._formats = tokenizer, template, formats

    def grammar_error(self, raw: bytes, limits: PromptLimits) -> str:
        """Returns why a grammar cannot be enforced, empty if it can."""
        try:
            check(raw.decode())
        except GrammarError as error:
            return str(error)
        return ""

    def encode_text(self, text: str) -> list[int]:
        """Returns the ids of a part of a prompt, in which the client cannot spell control tokens."""
        _check_unicode(text)
        return self._template.encode_text(text)

    def chat(self, raw: bytes, limits: PromptLimits) -> Prepared[ChatRequest]:
        return self.chat_body(_parse(ChatRequest, raw), limits)

    def chat_body(
        self, body: ChatRequest, limits: PromptLimits, prompt_field: str = "messages"
    ) -> Prepared[ChatRequest]:
        """Prepares a chat, into which another dialect's request may have been translated."""
        if body.top_logprobs and not body.logprobs:
            raise invalid_params(f"top_logprobs={body.top_logprobs} needs logprobs: true", "top_logprobs")
        _check_prompt_logprobs(body)
        limits = replace(limits, prompt_field=prompt_field)
        content, constraint = content_grammar(self._tokenizer, body, body.extra_configs)
        limits.check_engine()
        use = tool_use(body)
        prompt = self._chat_prompt(body)
        max_tokens = body.max_completion_tokens or body.max_tokens or 1
        ids = self._encode_chat(prompt, limits, limits.num_kept(body.truncate_prompt_tokens, max_tokens))
        used = ("messages", "tools", "tool_choice", "chat_template_kwargs", "documents")
        output_format = self._formats.output_format(
            use.tools if use.choice != "none" else (),
            prompt.text,
            _prefill(body),
            include_reasoning=body.include_reasoning is not False,
            skip_special_tokens=body.skip_special_tokens is not False,
        )
        grammar = self._chat_grammar(content, constraint, use, output_format)
        return replace(
            _prepared(body, [ids], used, prompt.text),
            output_format=output_format,
            bad_words=self._bad_words(body),
            grammar=grammar,
            constraint=constraint or "tools",
        )

    def _chat_grammar(self, content: str, constraint: str, use: ToolUse, output_format: OutputFormat) -> str:
        """Returns the grammar of an answer: of its calls, of its content, and of the reasoning before; empty: any."""
        if content and use.choice == "required" and constraint != "response_format":
            message = f"{constraint} and this tool_choice exclude each other: a call has to be the whole answer"
            raise invalid_params(message, constraint)
        calls = ""
        if use.is_constrained or (content and use.choice == "auto"):
            try:
                calls = self._formats.tool_format.grammar(use.tools, use.parallel, self._tokenizer)
            except GrammarError as error:
                raise invalid_params(f"tools: {error}", "tools") from None
        return combine(
            self._tokenizer, content=content, calls=calls, choice=use.choice, reasoning=output_format.reasoning
        )

    def responses(self, raw: bytes, limits: PromptLimits, *, stores: bool, history: str = "") -> PreparedResponse:
        """`history`: JSON array of the messages of the response that this one continues; empty: it continues none.

        `stores`: whether responses can be stored.
        """
        body = _parse(ResponsesRequest, raw)
        if body.previous_response_id and not history:
            raise invalid_params(
                "previous_response_id: write the name of this field without escapes", "previous_response_id"
            )
        is_stored = stores and body.store is not False
        if body.background and not is_stored:
            message = "background needs a stored response: set RESPONSES_STORE_MB, and not store to false"
            raise unsupported(message, "background")
        earlier: list[dict[str, Any]] = json.loads(history) if history else []
        with _renamed("response_format", "text.format"):
            chat = self.chat_body(validate(ChatRequest, responses.to_chat(body, earlier)), limits, "input")
        if chat.constraint == "response_format":
            chat = replace(chat, constraint="text.format")
        echo = compact_json(responses.echoed_fields(body))
        if not is_stored:
            return PreparedResponse(chat, echo)
        conversation = compact_json([*earlier, *responses.input_messages(body)])
        return PreparedResponse(chat, echo, bool(body.background), conversation, responses.input_items_json(body))

    def previous_response_id(self, raw: bytes, limits: PromptLimits) -> str | None:
        """Returns the id of the response that a body for /v1/responses continues."""
        return _parse(ResponsesRequest, raw).previous_response_id

    def messages(self, raw: bytes, limits: PromptLimits) -> Prepared[ChatRequest]:
        with _renamed("response_format", "output_config.format"):
            chat = self.chat_body(validate(ChatRequest, anthropic.to_chat(_parse(MessagesRequest, raw))), limits)
        return replace(chat, constraint="output_config.format") if chat.constraint == "response_format" else chat

    def count_tokens(self, raw: bytes, limits: PromptLimits) -> bytes:
        """Returns the response of /v1/messages/count_tokens."""
        body = validate(ChatRequest, anthropic.to_chat(_parse(CountTokensRequest, raw)))
        prompt = self._chat_prompt(body)
        self._check_countable(prompt.text, limits)
        return compact_json({"input_tokens": len(self._template.encode(prompt))}).encode()

    def completion(self, raw: bytes, limits: PromptLimits) -> Prepared[CompletionRequest]:
        body = _parse(CompletionRequest, raw)
        _check_prompt_logprobs(body)
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
        last = limits.num_kept(body.truncate_prompt_tokens, body.max_tokens or 1)
        prompts = [
            self._encode_prompt(i, limits, last) if isinstance(i, str) else _checked(_tail(i, last), limits)
            for i in items
        ]
        grammar, constraint = content_grammar(self._tokenizer, body)
        prepared = _prepared(body, prompts, ("prompt",))
        return replace(prepared, bad_words=self._bad_words(body), grammar=grammar, constraint=constraint)

    def native(self, raw: bytes, limits: PromptLimits) -> Prepared[NativeRequest]:
        """Returns a body whose `generate_config` has all fields of the request, and no others."""
        body = _parse(NativeRequest, raw)
        config = merged_config(body)
        if body.urls or body.images:
            raise unsupported("urls and images are not supported: this is a language model", "urls")
        limits.check_engine()
        return self._native(body, config, limits)

    def batch_infer(self, raw: bytes, limits: PromptLimits) -> Prepared[NativeRequest]:
        batch = _parse(BatchInferRequest, raw)
        config = merged_config(validate(NativeRequest, batch.model_dump()))
        limits.check_engine()
        body = NativeRequest(prompt_batch=batch.prompt_batch)
        return self._native(body, config, limits)

    def tokenize(self, raw: bytes, limits: PromptLimits) -> bytes:
        """Returns the response of /tokenize."""
        body = _parse(TokenizeRequest, raw)
        if body.messages and body.prompt is not None:
            raise invalid_params("prompt and messages exclude each other: send one of them", "messages")
        if body.messages:
            prompt = self._render(body.messages, body, body.tools)
            self._check_countable(prompt.text, limits)
            ids = self._template.encode(prompt)
        elif body.prompt is None:
            raise RequestError(400, 509, "NO_PROMPT_ERROR", "send prompt or messages", param="prompt")
        else:
            self._check_countable(body.prompt, limits)
            has_bos = body.add_special_tokens
            ids = self._tokenizer.encode_prompt(body.prompt) if has_bos else self._tokenizer.encode(body.prompt, False)
        max_model_len = limits.max_seq_len or None
        return compact_json(
            {"token_ids": ids, "tokens": ids, "count": len(ids), "max_model_len": max_model_len}
        ).encode()

    def detokenize(self, raw: bytes, limits: PromptLimits) -> bytes:
        """Returns the response of /detokenize, which is vLLM's."""
        body = _parse(DetokenizeRequest, raw)
        if len(body.tokens) > MAX_COUNTED_TOKENS:
            message = f"tokens has {len(body.tokens)} ids; this route decodes at most {MAX_COUNTED_TOKENS}"
            raise invalid_params(message, "tokens")
        return compact_json({"prompt": self._tokenizer.decode(body.tokens, skip_special_tokens=False)}).encode()

    def encode(self, raw: bytes, limits: PromptLimits) -> bytes:
        """Returns the response of /tokenizer/encode."""
        body = _parse(EncodeRequest, raw)
        self._check_countable(body.prompt, limits)
        ids, tokens, offsets = self._tokenizer.encode_with_offsets(body.prompt)
        response = {"token_ids": ids, "tokens": tokens, "error": ""}
        return compact_json(response | ({"offset_mapping": offsets} if body.return_offsets_mapping else {})).encode()

    def encode_input(self, item: str | list[int], limits: PromptLimits, truncate: int | None = None) -> list[int]:
        """Returns the token ids of an input to an embedding model, a text or token ids.

        truncate: None, or how many of its tokens to keep at most, special ones included; -1: as many as fit.
        """
        if truncate is None or not item:
            return self._encode_prompt(item, limits) if isinstance(item, str) else _checked(item, limits)
        longest = limits.max_seq_len - 1
        max_tokens = longest if truncate == -1 else min(truncate, longest)
        if isinstance(item, list):
            return _checked(item[:max_tokens], limits)
        _check_unicode(item)
        return _checked(encode_truncated(self._tokenizer, item, max_tokens), limits)

    def _native(self, body: NativeRequest, config: GenerateConfig, limits: PromptLimits) -> Prepared[NativeRequest]:
        grammar, constraint = content_grammar(self._tokenizer, config)
        packed = [array.array("i", prompt).tobytes() for prompt in self._native_prompts(body, limits)]
        is_batch = body.prompt_batch is not None or len(packed) > 1
        generate_config = config.model_dump(exclude_unset=True, exclude=set(StructuredOutputFields.model_fields))
        small = NativeRequest(generate_config=generate_config, yield_generator=body.yield_generator, stream=body.stream)
        return Prepared(small, packed, is_batch=is_batch, grammar=grammar, constraint=constraint)

    def _native_prompts(self, body: NativeRequest, limits: PromptLimits) -> list[list[int]]:
        name = next((n for n in ("prompt_batch", "prompt", "text") if getattr(body, n) is not None), "messages")
        limits = replace(limits, prompt_field=name)
        if name == "messages" and body.messages:
            return [self._encode_chat(self._render(body.messages, PromptOptions()), limits)]
        if name == "messages":
            message = "no prompt: send prompt, text, prompt_batch or messages"
            raise RequestError(400, 509, "NO_PROMPT_ERROR", message, param="prompt")
        texts: str | list[str] = getattr(body, name)
        if not texts:
            raise empty_prompt(f"{name} is empty: send at least one prompt", name)
        texts = [texts] if isinstance(texts, str) else texts
        limits.check_count(len(texts))
        return [self._encode_prompt(text, limits) for text in texts]

    def _report_unread(self, messages: Sequence[ChatMessage]) -> None:
        """Reports fields of messages and their content parts that the chat template does not read."""
        names: set[str] = set().union(*(m.model_extra or () for m in messages))
        fields.ignore("messages.", (n for n in sorted(names - fields.MESSAGE_HINTS) if not self._template.reads(n)))
        parts = itertools.chain.from_iterable(m.content for m in messages if isinstance(m.content, list))
        names = set().union(*(part.model_extra or () for part in parts))
        unread = (n for n in sorted(names - fields.MESSAGE_HINTS) if not self._template.reads(n))
        fields.ignore("messages.content.", unread)

    def _chat_prompt(self, body: ChatRequest) -> Prompt:
        return self._render(body.messages, body, rendered_tools(body))

    def _render(
        self, messages: Sequence[ChatMessage], options: PromptOptions, tools: Sequence[dict[str, Any]] | None = None
    ) -> Prompt:
        self._report_unread(messages)
        kwargs = template_kwargs(options)
        if reserved := _RESERVED_KWARGS & kwargs.keys():
            message = f"chat_template_kwargs: {min(reserved)!r} is reserved; use the request field of that name"
            raise invalid_params(message, "chat_template_kwargs")
        if options.continue_final_message and options.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other: send one of them as true"
            raise invalid_params(message, "continue_final_message")
        if options.documents:
            kwargs["documents"] = options.documents
        begins_answer = options.add_generation_prompt is not False and not options.continue_final_message
        try:
            return self._template.render(
                [m.model_dump(exclude_unset=True) for m in messages],
                tools=tools or None,
                add_generation_prompt=begins_answer,
                continue_final_message=bool(options.continue_final_message),
                allow_special_tokens=bool(options.allow_special_tokens),
                **kwargs,
            )
        except TemplateError as error:
            raise invalid_params(str(error), "messages") from None

    def _bad_words(self, body: OpenAIRequest) -> tuple[tuple[int, ...], ...]:
        """Returns the token ids of each word that must not occur, at the start of a text and after a space."""
        found: list[tuple[int, ...]] = []
        for word in body.bad_words or ():
            _check_unicode(word)
            bare = word.lstrip() or word
            alone, later = (
                tuple(self._tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}")
            )
            # Where the second ends with the first, the first excludes both.
            found += [alone] if later[-len(alone) :] == alone else [alone, later]
        return tuple(found)

    def _encode_chat(self, prompt: Prompt, limits: PromptLimits, last: int | None = None) -> list[int]:
        self._check_prompt(prompt.text, limits, last)
        return _checked(_tail(self._template.encode(prompt), last), limits)

    def _encode_prompt(self, text: str, limits: PromptLimits, last: int | None = None) -> list[int]:
        self._check_prompt(text, limits, last)
        return _checked(_tail(self._tokenizer.encode_prompt(text), last), limits)

    def _check_prompt(self, text: str, limits: PromptLimits, last: int | None) -> None:
        """Raises RequestError 400 if a text is empty, not Unicode or certainly too long.

        last: as many of its tokens are read; None: all.
        """
        if not text:
            raise empty_prompt(param=limits.prompt_field)
        if last is not None:
            return self._check_countable(text, limits)
        _check_unicode(text)
        limits.check_length(self._tokenizer.min_tokens(text, limits.max_seq_len), prefix="at least ")

    def _check_countable(self, text: str, limits: PromptLimits) -> None:
        _check_unicode(text)
        limit = max(MAX_COUNTED_TOKENS, limits.max_seq_len)
        num_tokens = self._tokenizer.min_tokens(text, limit)
        if num_tokens > limit:
            raise long_prompt(f"the text has at least {num_tokens} tokens; this route encodes at most {limit}")


def merged_config(body: NativeRequest) -> GenerateConfig:
    """Merges generate_config, generation_config and top-level fields; later ones win. Raises RequestError 400."""
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


def _check_prompt_logprobs(body: OpenAIRequest) -> None:
    if body.stream and body.prompt_logprobs is not None:
        raise invalid_params("prompt_logprobs is not available in a stream: leave out stream", "prompt_logprobs")


@contextmanager
def _renamed(name: str, sent_name: str) -> Iterator[None]:
    """Makes RequestErrors name a field as the client of a dialect has sent it."""
    try:
        yield
    except RequestError as error:
        if error.param == name:
            error.param, error.message = sent_name, error.message.replace(name, sent_name)
        raise


def _parse(model: type[Model], raw: bytes) -> Model:
    return validate(model, parse_object(raw))


def _prepared(body: Model, prompts: list[list[int]], used: Sequence[str], text: str = "") -> Prepared[Model]:
    small = body.model_copy(update=dict.fromkeys((*used, *StructuredOutputFields.model_fields)))
    return Prepared(small, [array.array("i", prompt).tobytes() for prompt in prompts], text)


def _prefill(body: ChatRequest) -> str | None:
    """Returns the assistant's text that the answer continues, None if it begins a new turn."""
    if not body.continue_final_message:
        return None
    content = body.messages[-1].content or ""
    return content if isinstance(content, str) else "".join(part.text or "" for part in content)


def _tail(ids: list[int], last: int | None) -> list[int]:
    return ids if last is None else ids[-last:]


def _checked(prompt: list[int], limits: PromptLimits) -> list[int]:
    """Returns the prompt. Raises RequestError 400 if it is empty, longer than MAX_SEQ_LEN - 1 tokens or has an id
    outside the vocabulary.
    """
    if not prompt:
        raise empty_prompt(param=limits.prompt_field)
    limits.check_length(len(prompt))
    invalid_id = next((t for t in prompt if not 0 <= t < limits.vocab_size), None)
    if invalid_id is not None:
        raise invalid_params(
            f"token id {invalid_id} is outside the vocabulary of {limits.vocab_size}", limits.prompt_field
        )
    return prompt


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the text has an unpaired surrogate at character {error.start}: not valid Unicode"
        raise invalid_format(message) from None
