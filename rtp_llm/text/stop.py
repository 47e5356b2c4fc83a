"""Finds stop strings in streamed text.

A stop string may span chunks, so text that could be the start of one is buffered until more text arrives.
"""

from collections.abc import Sequence


class StopChecker:
    """Truncates the text of one sequence at the first stop string.

    The earliest match wins; among matches with the same start, the longest. The result does not depend on how the
    text is split: with the stop strings "a" and "ab", the text "a" stays buffered until the next `push` or `flush`.

    include_stop  keeps the matched string at the end of the text
    matched       the matched string, None before a match
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False):
        """Raises ValueError if a stop string is empty, since it would match everywhere."""
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        self._stops = sorted(set(stop), key=len, reverse=True)
        self._include_stop = include_stop
        self._buffer = ""
        self._exempt = 0  # characters at the start of the buffer within which no match may end
        self.matched: str | None = None

    def push_exempt(self, text: str) -> str:
        """Takes the text of the tokens before min_tokens, in which stop strings do not end the sequence.

        Returns the part of the text that can be sent. The rest is buffered: it may be the start of a stop string that
        ends in the text of later tokens, and that one counts. Call this before the first `push` only.
        """
        self._buffer += text
        self._exempt = len(self._buffer)
        return self._take(self._partial_match_start())

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns the text that can be sent, and the matched stop string or None. Drops the text after a match."""
        if self.matched is not None:
            return "", self.matched
        self._buffer += text
        start, stop = self._find_match()
        partial_start = self._partial_match_start()
        if stop is not None and start < partial_start:
            return self._end_at_match(start, stop), stop
        return self._take(partial_start), None

    def flush(self) -> str:
        """Returns the buffered text at the end of the stream. If it contains a stop string, which was buffered because
        a longer one might have followed, sets `matched` and drops the text after the match.
        """
        start, stop = self._find_match()
        if stop is not None:
            return self._end_at_match(start, stop)
        return self._take(len(self._buffer))

    def _take(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        self._exempt = max(0, self._exempt - length)
        return text

    def _end_at_match(self, start: int, stop: str) -> str:
        text = self._buffer[:start] + (stop if self._include_stop else "")
        self._buffer, self.matched = "", stop
        return text

    def _find_match(self) -> tuple[int, str | None]:
        """Returns the start of the earliest full match and its stop string, or (-1, None)."""
        matches = ((self._buffer.find(stop, max(0, self._exempt - len(stop) + 1)), stop) for stop in self._stops)
        # The longest of those with the same start: `_stops` is sorted and `min` returns the first.
        return min(((at, stop) for at, stop in matches if at >= 0), key=lambda match: match[0], default=(-1, None))

    def _partial_match_start(self) -> int:
        """Returns the start of the longest suffix of the buffer that is an incomplete stop string."""
        return len(self._buffer) - max((self._overlap(stop) for stop in self._stops), default=0)

    def _overlap(self, stop: str) -> int:
        max_length = min(len(stop) - 1, len(self._buffer))
        return next((n for n in range(max_length, 0, -1) if self._buffer.endswith(stop[:n])), 0)
