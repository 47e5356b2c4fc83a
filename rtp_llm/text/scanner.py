"""Reads a text while it arrives, for parsers that are written as if the whole text were there.

A method that needs more text than has arrived yields, and continues when its generator is resumed. So a parser is a
generator, and its result cannot depend on how the text is split into chunks.
"""

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]  # yields while it waits for text
Sink = Callable[[str], None]

SPACE = re.compile(r"\s*")


class Malformed(Exception):
    """The text does not match the format that the parser reads."""


class Scanner:
    """A reader of a model's output for parsers. Holds the text that has arrived, the read position and, if set, a mark
    at an earlier position. Keeps the text from the mark on, or from the read position on if there is no mark.
    """

    def __init__(self) -> None:
        self._text, self._at = "", 0
        self._mark: int | None = None
        self._ended = False

    def feed(self, text: str) -> None:
        start = self._at if self._mark is None else self._mark
        self._text = self._text[start:] + text
        self._at -= start
        self._mark = None if self._mark is None else 0

    def end(self) -> None:
        """Signals that no more text follows."""
        self._ended = True

    def mark(self) -> None:
        """Remembers the current position; `unmark` returns the text that was read since then."""
        self._mark = self._at

    def unmark(self) -> str:
        """Removes the mark and returns the text that was read since it; "" without a mark."""
        text = "" if self._mark is None else self._text[self._mark : self._at]
        self._mark = None
        return text

    # Each of these waits for as much text as it needs to decide.

    def peek(self) -> Reading[str]:
        """Returns the next character without reading it, "" at the end."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def char(self) -> Reading[str]:
        """Reads one character and returns it; "" at the end."""
        char = yield from self.peek()
        self._at += len(char)
        return char

    def is_next(self, literal: str) -> Reading[bool]:
        """Returns whether `literal` follows, without reading it."""
        while not self._text.startswith(literal, self._at):
            if self._ended or not literal.startswith(self._text[self._at : self._at + len(literal)]):
                return False
            yield
        return True

    def skip(self, literal: str) -> Reading[bool]:
        """Reads `literal` if it follows. Returns whether it does."""
        found = yield from self.is_next(literal)
        if found:
            self._at += len(literal)
        return found

    def is_cut_off(self, *literals: str) -> Reading[bool]:
        """Returns whether the whole text ends at the read position, or in the middle of one of `literals` that begins
        there. If so, reads the incomplete literal.
        """
        while any(literal.startswith(self._text[self._at :]) for literal in literals):
            if self._ended:
                self.rest()
                return True
            yield
        return False

    def rest(self) -> str:
        """Reads all text that has arrived and returns it. Does not wait for more."""
        text, self._at = self._text[self._at :], len(self._text)
        return text

    def expect(self, literal: str) -> Reading[None]:
        """Reads whitespace and `literal`. Raises Malformed if other text follows."""
        yield from self.skip_space()
        if not (yield from self.skip(literal)):
            raise Malformed

    def skip_space(self) -> Reading[None]:
        yield from self.run(SPACE, _ignore)

    def run(self, pattern: re.Pattern[str], sink: Sink) -> Reading[None]:
        """Reads the longest run that matches `pattern`, such as `[a-z]*`. Passes it to `sink` as it arrives."""
        while True:
            match = pattern.match(self._text, self._at)
            if match and match.group():
                self._at = match.end()
                sink(match.group())
            if self._at < len(self._text) or self._ended:
                return
            yield

    def word(self, pattern: re.Pattern[str], max_length: int = 256) -> Reading[str]:
        """Returns the text that matches `pattern`. Raises Malformed if it is empty or longer than `max_length`."""
        text = ""

        def add(piece: str) -> None:
            nonlocal text
            text += piece
            if len(text) > max_length:
                raise Malformed

        yield from self.run(pattern, add)
        if not text:
            raise Malformed
        return text

    def until(self, markers: Sequence[str], sink: Sink) -> Reading[str]:
        """Passes the text up to the first of the markers to `sink`, as it arrives. Returns that marker, which is not
        read yet; "" if there is none up to the end.

        No marker may be a prefix of another one.
        """
        pattern = re.compile("|".join(map(re.escape, markers)))
        while True:
            match = pattern.search(self._text, self._at)
            stop = match.start() if match else len(self._text) - (0 if self._ended else self._overlap(markers))
            text, self._at = self._text[self._at : stop], stop
            if text:
                sink(text)
            if match or self._ended:
                return match.group() if match else ""
            yield

    def _overlap(self, markers: Sequence[str]) -> int:
        """Returns the length of the longest end of the text with which a marker may begin."""
        longest = min(len(self._text) - self._at, max(map(len, markers)) - 1)
        tails = (self._text[len(self._text) - length :] for length in range(longest, 0, -1))
        return next((len(tail) for tail in tails if any(marker.startswith(tail) for marker in markers)), 0)


def _ignore(text: str) -> None:
    pass
