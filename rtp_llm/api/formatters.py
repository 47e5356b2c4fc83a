"""JSON of /v1/chat/completions and /v1/completions: whole responses and stream chunks, with logprobs."""

import codecs
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from rtp_llm.api.chat import ChatChoice
from rtp_llm.api.generation import Choice, GenerationRequest
from rtp_llm.api.stream import coalesced, json_parts
from rtp_llm.api.text_stream import OutputChunk
from rtp_llm.contract.engine_output import Logprob
from rtp_llm.text.output import OutputDelta
from rtp_llm.text.tokenizer import Tokenizer

FormattedChoice = TypeVar("FormattedChoice", bound=Choice, contravariant=True)
MIN_LOGPROB = -9999.0  # replaces minus infinity, which JSON cannot represent


@dataclass(frozen=True)
class ResponseHeader:
    """The fields that a response, or each chunk of a streamed response, begins with: id, object, created, model."""

    id: str
    object_type: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def response(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return self._fields(self.object_type) | {"choices": choices, "usage": usage}

    def stream_event(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, with_usage: bool
    ) -> Iterator[str]:
        """Yields one server-sent event, in pieces if it is large. `with_usage`: include "usage" even if it is None."""
        is_chat = self.object_type == "chat.completion"
        object_type = "chat.completion.chunk" if is_chat else self.object_type
        body = self._fields(object_type) | {"choices": choices} | ({"usage": usage} if with_usage else {})
        pieces = itertools.chain(("data: ",), json_parts(body), ("\n\n",))
        yield from coalesced(pieces)

    def _fields(self, object_type: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_type, "created": self.created, "model": self.model}


class ChoiceFormatter(Protocol[FormattedChoice]):
    """Interface of ChatFormatter and CompletionFormatter. The methods return entries of `choices`: of a whole response,
    of the first event of a stream, and of the event for one chunk of output.
    """

    def full_choice(self, index: int, choice: FormattedChoice) -> dict[str, Any]: ...
    def initial_choices(self, index: int, choice: FormattedChoice) -> list[dict[str, Any]]: ...
    def chunk_choices(self, index: int, choice: FormattedChoice, chunk: OutputChunk) -> list[dict[str, Any]]: ...


class ChatFormatter:
    """Formats the choices of a chat completion, whole or streamed."""

    def __init__(self, tokenizer: Tokenizer, logprobs: bool):
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def full_choice(self, index: int, choice: ChatChoice) -> dict[str, Any]:
        answer = choice.answer
        message: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message |= _reasoning(answer.reasoning)
        if answer.calls:
            message |= {"content": answer.content or None, "tool_calls": [call.to_json() for call in answer.calls]}
        logprobs = {"content": chat_logprobs(choice.chunks, self.tokenizer)} if self.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def initial_choices(self, index: int, choice: ChatChoice) -> list[dict[str, Any]]:
        return [self._choice(index, {"role": "assistant", "content": ""}, None, None)]

    def chunk_choices(self, index: int, choice: ChatChoice, chunk: OutputChunk) -> list[dict[str, Any]]:
        deltas = [_delta_json(delta) for delta in choice.new_deltas]
        logprobs = None
        if self.logprobs and chunk.tokens:
            logprobs = {"content": chat_logprobs([chunk], self.tokenizer)}
            deltas = deltas or [{"content": ""}]
        choices = [self._choice(index, delta, None if i else logprobs, None) for i, delta in enumerate(deltas)]
        if choice.finish_reason:
            choices.append(self._choice(index, {}, None, choice.finish_reason))
        return choices

    def _choice(self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _delta_json(delta: OutputDelta) -> dict[str, Any]:
    call = delta.call
    if call is None:
        return _reasoning(delta.reasoning) if delta.reasoning else {"content": delta.content}
    function = ({"name": call.name} if call.name else {}) | {"arguments": call.arguments}
    header = {"id": call.id, "type": "function"} if call.id else {}
    return {"tool_calls": [{"index": call.index, **header, "function": function}]}


def _reasoning(text: str) -> dict[str, str]:
    """Returns the reasoning under the two names that clients read: DeepSeek's and OpenRouter's."""
    return {"reasoning_content": text, "reasoning": text}


class CompletionFormatter:
    """Formats the choices of a completion, whole or streamed."""

    def __init__(self, tokenizer: Tokenizer, generation: GenerationRequest[Choice], logprobs: bool, echo: bool):
        self.tokenizer, self.logprobs, self.echo, self.prompt_only = tokenizer, logprobs, echo, generation.prompt_only
        self.skip_special_tokens = generation.text_params.skip_special_tokens
        self._text_offsets: defaultdict[int, _TextOffset] = defaultdict(self._new_text_offset)

    def _new_text_offset(self) -> "_TextOffset":
        return _TextOffset(self.tokenizer.special_ids if self.skip_special_tokens else frozenset())

    def full_choice(self, index: int, sequence: Choice) -> dict[str, Any]:
        table = _LogprobTable(self.tokenizer, self._new_text_offset())
        text = ""
        if self.echo:
            text = self._prompt_text(sequence)
            table.add_prompt(sequence)
        if not self.prompt_only:
            text += sequence.text
            for chunk in sequence.chunks:
                table.add(chunk.tokens, chunk.logprobs)
        finish_reason = "length" if self.prompt_only else sequence.finish_reason
        return self._choice(index, text, table if self.logprobs else None, finish_reason)

    def initial_choices(self, index: int, sequence: Choice) -> list[dict[str, Any]]:
        # The prompt's logprobs arrive with the first token, so with logprobs its text is sent then too.
        if not self.echo or self.logprobs:
            return []
        return [self._choice(index, self._prompt_text(sequence), None, None)]

    def chunk_choices(self, index: int, sequence: Choice, chunk: OutputChunk) -> list[dict[str, Any]]:
        table = _LogprobTable(self.tokenizer, self._text_offsets[index])
        text, tokens = ("", []) if self.prompt_only else (chunk.text, chunk.tokens)
        if self.echo and self.logprobs and len(sequence.chunks) == 1:
            text = self._prompt_text(sequence) + text
            table.add_prompt(sequence)
        table.add(tokens, chunk.logprobs)
        finish_reason = "length" if self.prompt_only and chunk.finish_reason else chunk.finish_reason
        if not text and not finish_reason and not (self.logprobs and table.spans):
            return []
        return [self._choice(index, text, table if self.logprobs else None, finish_reason)]

    def _prompt_text(self, sequence: Choice) -> str:
        return self.tokenizer.decode(sequence.prompt, self.skip_special_tokens)

    def _choice(
        self, index: int, text: str, table: "_LogprobTable | None", finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": table.to_json() if table else None,
            "finish_reason": finish_reason,
        }


class _TextOffset:
    """Counts the characters of the tokens so far. A character that spans tokens counts with its last token."""

    def __init__(self, skipped_ids: frozenset[int]):
        self.characters = 0
        self._skipped_ids = skipped_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def advance(self, token: int, token_bytes: bytes) -> None:
        if token not in self._skipped_ids:
            self.characters += len(self._utf8.decode(token_bytes))


@dataclass
class _LogprobTable:
    """The lists of a completion's `logprobs` field, with one entry per token each, computed while they are sent.

    `text_offset`: counts the characters of the tokens so far.
    """

    tokenizer: Tokenizer
    text_offset: _TextOffset
    spans: list[tuple[Sequence[int], Sequence[Logprob | None]]] = field(default_factory=list)

    def add_prompt(self, sequence: Choice) -> None:
        """Adds the prompt's tokens to the lists. The first token has no logprob."""
        self.spans.append((sequence.prompt[:1], [None]))
        self.add(sequence.prompt[1:], sequence.chunks[0].prompt_logprobs if sequence.chunks else [])

    def add(self, tokens: Sequence[int], logprobs: Sequence[Logprob]) -> None:
        length = min(len(tokens), len(logprobs))
        if length:
            self.spans.append((tokens[:length], logprobs))

    @property
    def _tokens(self) -> Iterator[int]:
        return itertools.chain.from_iterable(tokens for tokens, _ in self.spans)

    @property
    def _rows(self) -> Iterator[tuple[int, Logprob | None]]:
        return itertools.chain.from_iterable(zip(*span, strict=False) for span in self.spans)

    def _offset(self, token: int) -> int:
        offset = self.text_offset.characters
        self.text_offset.advance(token, self.tokenizer.token_bytes(token))
        return offset

    def _top_logprobs_by_text(self, token: int, logprob: Logprob) -> dict[str, float]:
        """Returns {text: logprob} of `token` and the top tokens. Several tokens may have the same text (U+FFFD
        for any part of a character); the first one is kept, so that `token` keeps its own value.
        """
        values: dict[str, float] = {}
        for token_id, value in ((token, logprob[0]), *logprob[2]):
            values.setdefault(self.tokenizer.token_text(int(token_id)), max(value, MIN_LOGPROB))
        return values

    def to_json(self) -> dict[str, Iterator[Any]]:
        """Returns the `logprobs` object with an iterator in place of each list, for `api.stream.json_parts`: each can
        be read once, and in the order of the keys.
        """
        return {
            "tokens": (self.tokenizer.token_text(token) for token in self._tokens),
            "token_logprobs": (max(logprob[0], MIN_LOGPROB) if logprob else None for _, logprob in self._rows),
            "top_logprobs": (self._top_logprobs_by_text(t, logprob) if logprob else None for t, logprob in self._rows),
            "text_offset": (self._offset(token) for token in self._tokens),
        }


def chat_logprobs(chunks: Sequence[OutputChunk], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Returns an iterator over the entries of `logprobs.content` of a chat choice, one per token. Put the iterator into
    the response in place of a list: `api.stream.json_parts` encodes it as an array, without holding all entries.
    """

    def entry(token: int, value: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token),
            "logprob": max(value, MIN_LOGPROB),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    return (
        entry(token, logprob[0]) | {"top_logprobs": [entry(int(t), v) for t, v in logprob[2]]}
        for chunk in chunks
        for token, logprob in zip(chunk.tokens, chunk.logprobs, strict=False)
    )


def prompt_logprobs(sequence: Choice, tokenizer: Tokenizer) -> Iterator[dict[str, Any] | None]:
    """Returns vLLM's `prompt_logprobs`: for each token of the prompt {token id: {logprob, rank, decoded_token}} of that
    token and the most likely ones; null for the first token. Put the iterator into the response in place of a list:
    `api.stream.json_parts` encodes it as an array.
    """

    def entries(token: int, logprob: Logprob) -> dict[str, Any]:
        value, num_higher, top = logprob
        ranked = [(token, value, num_higher + 1), *((int(t), v, rank) for rank, (t, v) in enumerate(top, 1))]
        return {
            str(t): {"logprob": max(v, MIN_LOGPROB), "rank": rank, "decoded_token": tokenizer.token_text(t)}
            for t, v, rank in reversed(ranked)  # last, so that the token itself keeps its own value
        }

    yield None
    for token, logprob in zip(sequence.prompt[1:], sequence.chunks[0].prompt_logprobs, strict=False):
        yield entries(token, logprob)
