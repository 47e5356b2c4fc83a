"""Text from token ids as they arrive, each piece handed out once and only when no later token can change it.

A character may span tokens, and sentencepiece drops a space at the start of a text but not in its middle, so decoding
each step by itself is wrong, and decoding everything at each step is quadratic.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from rtp_llm.text.tokenizer import Tokenizer


class Detokenizer:
    """The text stream of one request.

    All pushes and the flush joined are the text of `prompt_ids` + all ids, less the text of `prompt_ids`. A character
    that the prompt leaves unfinished is given whole, once it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()):
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._token_bytes = tokenizer.token_bytes
        stream = _ByteStream if tokenizer.byte_level else _WindowStream
        # Lazy and from the end: a stream reads only as much of a long prompt as bears on what follows.
        self._stream: _Stream = stream(tokenizer, self._shown(reversed(prompt_ids)))

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that has become certain with these ids; never a part of a character."""
        return self._stream.push(self._shown(token_ids))

    def flush(self) -> str:
        """What is still held, with U+FFFD for what never became a character. Nothing may be pushed afterwards."""
        return self._stream.flush()

    def _shown(self, ids: Iterable[int]) -> Iterator[int]:
        """Leaves out what has no text, padding rows of the embedding included: it would be no context for others."""
        return (token_id for token_id in ids if token_id not in self._hidden and self._token_bytes(token_id))


class _Stream(Protocol):
    def push(self, ids: Iterable[int]) -> str: ...
    def flush(self) -> str: ...


class _ByteStream:
    """Byte-level tokens: their bytes in a row are UTF-8, and an unfinished character waits in the codec."""

    def __init__(self, tokenizer: Tokenizer, backwards: Iterable[int]):
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in backwards:
            tail = tokenizer.token_bytes(token_id) + tail
            if len(tail) >= 4:  # no character is longer
                break
        self._utf8.decode(tail)
        self._begun_by_prompt = bool(self._utf8.getstate()[0])

    def push(self, ids: Iterable[int]) -> str:
        return self._strip_prompt_remainder(self._utf8.decode(b"".join(map(self._token_bytes, ids))))

    def flush(self) -> str:
        return self._strip_prompt_remainder(self._utf8.decode(b"", final=True))

    def _strip_prompt_remainder(self, text: str) -> str:
        if not (self._begun_by_prompt and text):
            return text
        self._begun_by_prompt = False
        # The prompt's bytes came to nothing: their U+FFFD is the prompt's, not ours.
        return text.removeprefix("\ufffd")


class _WindowStream:
    """Any other decoder: decodes what is new behind one token of context, so the work per id is constant.

    Only a run of `<0xNN>` tokens is held: sentencepiece's decoder judges such a run as a whole, and one bad byte turns
    all of it into U+FFFD. Context keeps the decoder from taking new text for the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, backwards: Iterable[int]):
        self._tokenizer = tokenizer
        self._context = _last_run(tokenizer, backwards)
        self._pending: list[int] = []
        self._certain = 0  # how many of `_pending` end before the run of bytes that may go on

    def push(self, ids: Iterable[int]) -> str:
        for token_id in ids:
            self._pending.append(token_id)
            if token_id not in self._tokenizer.byte_ids:
                self._certain = len(self._pending)
        return self._emit_stable(self._certain)

    def flush(self) -> str:
        return self._emit_stable(len(self._pending))

    def _emit_stable(self, count: int) -> str:
        if not count:
            return ""
        before = self._tokenizer.decode(self._context, skip_special_tokens=False)
        after = self._tokenizer.decode(self._context + self._pending[:count], skip_special_tokens=False)
        self._context = self._pending[count - 1 : count]
        del self._pending[:count]
        self._certain = 0
        # New bytes may complete, or spoil, the run of bytes at the prompt's end: what still stands is not repeated.
        while not after.startswith(before):
            before = before[:-1]
        return after[len(before) :]


def _last_run(tokenizer: Tokenizer, backwards: Iterable[int]) -> list[int]:
    """The last token that is no byte token, and the byte tokens behind it."""
    run: list[int] = []
    for token_id in backwards:
        run.append(token_id)
        if token_id not in tokenizer.byte_ids:
            break
    return run[::-1]
