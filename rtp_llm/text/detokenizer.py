"""Incremental detokenization: converts token ids to text as they arrive, and returns text that later tokens cannot
change.

Decoding each step separately is wrong, since a character may span tokens and sentencepiece drops a space at the start
of a text only. Decoding all tokens at each step takes quadratic time.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from rtp_llm.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns the token ids of one sequence into text as they arrive.

    The results of all `push` calls and of `flush` together are the text that the pushed ids add to the text of
    `prompt_ids`. A character that starts in the prompt is returned whole when it is complete.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        visible_ids: frozenset[int] = frozenset(),
    ):
        """`visible_ids`: special tokens that are not skipped."""
        self._skipped_ids = tokenizer.special_ids - visible_ids if skip_special_tokens else frozenset[int]()
        self._token_bytes = tokenizer.token_bytes
        stream = _ByteStream if tokenizer.byte_level else _WindowStream
        # An iterator from the end, since only the last tokens of a long prompt are needed as context.
        self._stream: _Stream = stream(tokenizer, self._ids_with_text(reversed(prompt_ids)))

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns the text that is complete after these new ids. It contains no incomplete character."""
        return self._stream.push(self._ids_with_text(token_ids))

    def flush(self) -> str:
        """Returns the remaining text, with U+FFFD for incomplete characters. Call it once, after the last push."""
        return self._stream.flush()

    def _ids_with_text(self, ids: Iterable[int]) -> Iterator[int]:
        """Yields the ids that add text. Leaves out skipped special tokens and padding ids, which have none."""
        return (token_id for token_id in ids if token_id not in self._skipped_ids and self._token_bytes(token_id))


class _Stream(Protocol):
    """Decodes ids for one kind of tokenizer, with the methods of `Detokenizer`. Every id must have text."""

    def push(self, ids: Iterable[int]) -> str: ...
    def flush(self) -> str: ...


class _ByteStream:
    """Decodes byte-level tokens, whose bytes are UTF-8. Python's UTF-8 decoder buffers an incomplete character."""

    def __init__(self, tokenizer: Tokenizer, reversed_prompt: Iterable[int]):
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed_prompt:
            tail = tokenizer.token_bytes(token_id) + tail
            if len(tail) >= 4:  # the longest character in UTF-8
                break
        self._utf8.decode(tail)
        self._prompt_ends_in_character = bool(self._utf8.getstate()[0])

    def push(self, ids: Iterable[int]) -> str:
        return self._strip_prompt_remainder(self._utf8.decode(b"".join(map(self._token_bytes, ids))))

    def flush(self) -> str:
        return self._strip_prompt_remainder(self._utf8.decode(b"", final=True))

    def _strip_prompt_remainder(self, text: str) -> str:
        """Returns `text`. If the prompt ended within a character, the first text loses a leading U+FFFD.

        That U+FFFD would stand for bytes of the prompt.
        """
        if not (self._prompt_ends_in_character and text):
            return text
        self._prompt_ends_in_character = False
        # If the prompt's last bytes are invalid, their U+FFFD belongs to the prompt's text.
        return text.removeprefix("\ufffd")


class _WindowStream:
    """Decodes tokens that are not byte-level: the new tokens and one token before them, in constant time per id.

    The token before them is the context: without it the decoder would treat the new text as the start of a text, and
    drop a space. Buffers only a run of `<0xNN>` tokens: sentencepiece decodes such a run as a unit, and one invalid
    byte turns all of it into U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, reversed_prompt: Iterable[int]):
        self._tokenizer = tokenizer
        self._context = _context_from_prompt(tokenizer, reversed_prompt)
        self._pending: list[int] = []
        self._num_stable = 0  # tokens of `_pending` before its last run of byte tokens, which may continue

    def push(self, ids: Iterable[int]) -> str:
        for token_id in ids:
            self._pending.append(token_id)
            if token_id not in self._tokenizer.byte_ids:
                self._num_stable = len(self._pending)
        return self._emit_stable(self._num_stable)

    def flush(self) -> str:
        return self._emit_stable(len(self._pending))

    def _emit_stable(self, count: int) -> str:
        """Removes the first `count` pending tokens. Returns the text that they add to the text before them."""
        if not count:
            return ""
        before = self._tokenizer.decode(self._context, skip_special_tokens=False)
        after = self._tokenizer.decode(self._context + self._pending[:count], skip_special_tokens=False)
        self._context = self._pending[count - 1 : count]
        del self._pending[:count]
        self._num_stable = 0
        # New bytes may complete or invalidate the prompt's last run of byte tokens. Skip the text that is unchanged.
        while not after.startswith(before):
            before = before[:-1]
        return after[len(before) :]


def _context_from_prompt(tokenizer: Tokenizer, reversed_prompt: Iterable[int]) -> list[int]:
    """Returns the prompt's last token that is not a byte token (`<0xNN>`), and the byte tokens after it."""
    reversed_context: list[int] = []
    for token_id in reversed_prompt:
        reversed_context.append(token_id)
        if token_id not in tokenizer.byte_ids:
            break
    return reversed_context[::-1]
