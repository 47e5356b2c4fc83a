"""The JSON of OpenAI's answers: whole objects and stream chunks, with their logprobs in both endpoints' shapes."""

import codecs
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.api.generation import Choice, GenerationRequest
from rtp_llm.api.service import OutputChunk
from rtp_llm.api.stream import dumps
from rtp_llm.contract.engine_output import Logprob
from rtp_llm.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # stands for a logprob of minus infinity, which JSON cannot say


@dataclass(frozen=True)
class ResponseHeader:
    """What all objects of one answer have in common."""

    id: str
    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def full(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return self._head(self.kind) | {"choices": choices, "usage": usage}

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, with_usage: bool) -> str:
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        body = self._head(kind) | {"choices": choices} | ({"usage": usage} if with_usage else {})
        return f"data: {dumps(body)}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatFormatter:
    """The choices of a chat stream's events."""

    def __init__(self, tokenizer: Tokenizer, logprobs: bool):
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def first(self, index: int, sequence: Choice) -> list[dict[str, Any]]:
        return [self._choice(index, {"role": "assistant", "content": ""}, None, None)]

    def next(self, index: int, sequence: Choice, chunk: OutputChunk) -> list[dict[str, Any]]:
        choices = []
        logprobs = {"content": chat_logprobs([chunk], self.tokenizer)} if self.logprobs else None
        if chunk.text or (self.logprobs and chunk.tokens):
            choices.append(self._choice(index, {"content": chunk.text}, logprobs, None))
        if chunk.finish:
            choices.append(self._choice(index, {}, None, chunk.finish))
        return choices

    def _choice(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class CompletionFormatter:
    """The choices of a completion, whole or as a stream."""

    def __init__(self, tokenizer: Tokenizer, generation: GenerationRequest, logprobs: bool, echo: bool):
        self.tokenizer, self.logprobs, self.echo, self.prompt_only = tokenizer, logprobs, echo, generation.prompt_only
        self.skip_special_tokens = generation.text.skip_special_tokens
        self._places: defaultdict[int, _TextOffset] = defaultdict(self._start)

    def _start(self) -> "_TextOffset":
        return _TextOffset(self.tokenizer.special_ids if self.skip_special_tokens else frozenset())

    def full(self, index: int, sequence: Choice) -> dict[str, Any]:
        table = _LogprobTable(self.tokenizer, self._start())
        text = ""
        if self.echo:
            text = self._prompt_text(sequence)
            table.add_prompt(sequence)
        if not self.prompt_only:
            text += sequence.text
            for chunk in sequence.chunks:
                table.add(chunk.tokens, chunk.logprobs)
        finish = "length" if self.prompt_only else sequence.finish
        return self._choice(index, text, table if self.logprobs else None, finish)

    def first(self, index: int, sequence: Choice) -> list[dict[str, Any]]:
        # With logprobs the prompt's come with the first token, and the prompt's text with them.
        if not self.echo or self.logprobs:
            return []
        return [self._choice(index, self._prompt_text(sequence), None, None)]

    def next(self, index: int, sequence: Choice, chunk: OutputChunk) -> list[dict[str, Any]]:
        table = _LogprobTable(self.tokenizer, self._places[index])
        text, tokens = ("", 0) if self.prompt_only else (chunk.text, len(chunk.tokens))
        if self.echo and self.logprobs and len(sequence.chunks) == 1:
            text = self._prompt_text(sequence) + text
            table.add_prompt(sequence)
        if tokens:
            table.add(chunk.tokens, chunk.logprobs)
        finish = "length" if self.prompt_only and chunk.finish else chunk.finish
        if not text and not finish and not (self.logprobs and table.tokens):
            return []
        return [self._choice(index, text, table if self.logprobs else None, finish)]

    def _prompt_text(self, sequence: Choice) -> str:
        return self.tokenizer.decode(sequence.prompt, self.skip_special_tokens)

    def _choice(self, index: int, text: str, table: "_LogprobTable | None", finish: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": table.to_json() if table else None,
            "finish_reason": finish,
        }


class _TextOffset:
    """How many characters of a text its tokens so far make; one that spans tokens counts where it is complete."""

    def __init__(self, hidden: frozenset[int]):
        self.characters = 0
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def move(self, token: int, spelled: bytes) -> None:
        if token not in self._hidden:
            self.characters += len(self._utf8.decode(spelled))


@dataclass
class _LogprobTable:
    """Completions' parallel lists; `place` is where in the text the next token begins."""

    tokenizer: Tokenizer
    place: _TextOffset
    tokens: list[str] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    tops: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add_prompt(self, sequence: Choice) -> None:
        """The first token has no logprob: nothing comes before it."""
        self._append(sequence.prompt[0], None)
        records = sequence.chunks[0].prompt_logprobs if sequence.chunks else []
        self.add(sequence.prompt[1:], records)

    def add(self, tokens: Sequence[int], records: Sequence[Logprob]) -> None:
        for token, record in zip(tokens, records, strict=False):
            self._append(token, record)

    def _append(self, token: int, record: Logprob | None) -> None:
        text = self.tokenizer.token_text(token)
        self.tokens.append(text)
        self.values.append(max(record[0], MIN_LOGPROB) if record else None)
        self.tops.append(self._likeliest(token, record) if record else None)
        self.offsets.append(self.place.characters)
        self.place.move(token, self.tokenizer.token_bytes(token))

    def _likeliest(self, token: int, record: Logprob) -> dict[str, float]:
        """By text, which several tokens may share (all parts of characters do): the first one then keeps its place."""
        found: dict[str, float] = {}
        for other, value in ((token, record[0]), *record[2]):
            found.setdefault(self.tokenizer.token_text(int(other)), max(value, MIN_LOGPROB))
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.values,
            "top_logprobs": self.tops,
            "text_offset": self.offsets,
        }


def chat_logprobs(chunks: Sequence[OutputChunk], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def entry(token: int, value: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token),
            "logprob": max(value, MIN_LOGPROB),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    return [
        entry(token, record[0]) | {"top_logprobs": [entry(int(t), v) for t, v in record[2]]}
        for chunk in chunks
        for token, record in zip(chunk.tokens, chunk.logprobs, strict=False)
    ]
