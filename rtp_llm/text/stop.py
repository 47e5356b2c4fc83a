"""Stop strings, found in text that arrives in pieces.

A stop string may span pieces, so text that could still begin one is held back: what has been sent cannot be taken back.
"""

from collections.abc import Sequence


class StopChecker:
    """Cuts the text of one request at the first stop string.

    The match that starts earliest wins; of those that start at the same place, the longest. However the text is split,
    the answer is the same, so with stops "a" and "ab" the text "a" is undecided until more comes or `flush` is called.
    `include_stop` keeps the matched string at the end of the text. `matched` is that string, None before a match.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool = False):
        """Raises ValueError on an empty stop string: it would match everywhere."""
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        self._stops = sorted(set(stop), key=len, reverse=True)
        self._include_stop = include_stop
        self._buffer = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is now safe to send, and the stop string once one has matched; later text is dropped."""
        if self.matched is not None:
            return "", self.matched
        self._buffer += text
        start, stop = self._first_match()
        undecided = self._partial_match_start()
        if stop is not None and start < undecided:
            return self._cut(start, stop), stop
        safe, self._buffer = self._buffer[:undecided], self._buffer[undecided:]
        return safe, None

    def flush(self) -> str:
        """The held text, at the end of the stream. A shorter match that was waiting for a longer one is made now:
        look at `matched` afterwards."""
        start, stop = self._first_match()
        if stop is not None:
            return self._cut(start, stop)
        rest, self._buffer = self._buffer, ""
        return rest

    def _cut(self, start: int, stop: str) -> str:
        text = self._buffer[:start] + (stop if self._include_stop else "")
        self._buffer, self.matched = "", stop
        return text

    def _first_match(self) -> tuple[int, str | None]:
        """Where the earliest whole stop string starts, and which it is (the longest there: `min` keeps the first)."""
        found = ((self._buffer.find(stop), stop) for stop in self._stops)
        return min(((at, stop) for at, stop in found if at >= 0), key=lambda match: match[0], default=(-1, None))

    def _partial_match_start(self) -> int:
        """Where the longest suffix starts that is the beginning, and not the whole, of a stop string."""
        return len(self._buffer) - max((self._overlap(stop) for stop in self._stops), default=0)

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._buffer))
        return next((n for n in range(longest, 0, -1) if self._buffer.endswith(stop[:n])), 0)
