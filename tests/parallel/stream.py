"""A streamed completion that is read while the test does something else."""

import http.client
import json
import threading
from collections.abc import Mapping
from typing import Any, Self

from tests.parallel.parts import DEADLINE, Part


class Stream:
    """Reads /v1/completions in a thread of its own. Its text is complete when `text` returns."""

    def __init__(self, part: Part, body: Mapping[str, Any]):
        self.part = part
        self.pieces: list[str] = []
        self.finish: str | None = None
        self.done = False  # `data: [DONE]` has come: the server ended the stream, not the connection
        self._body = json.dumps({**body, "stream": True})
        self._thread = threading.Thread(target=self._read, name="stream", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        connection = http.client.HTTPConnection(self.part.address, self.part.port, timeout=DEADLINE)
        try:
            connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
            with connection.getresponse() as answer:
                for line in answer:
                    self._take(line.decode().strip())
        except (OSError, http.client.HTTPException):
            pass  # the test sees it by what did not come
        finally:
            connection.close()

    def _take(self, line: str) -> None:
        data = line.removeprefix("data: ")
        if data == line:
            return
        if data == "[DONE]":
            self.done = True
            return
        for choice in json.loads(data).get("choices", ()):
            self.pieces.append(choice["text"])
            self.finish = choice["finish_reason"] or self.finish

    def flowing(self, pieces: int = 20) -> Self:
        """Returns once so many pieces have come, and asserts that more are to come."""
        self.part.until(lambda: len(self.pieces) >= pieces or not self._thread.is_alive(), f"{pieces} pieces")
        assert self._thread.is_alive(), f"over after {len(self.pieces)} pieces\n{self.part.log}"
        assert self.finish is None
        return self

    def wait(self) -> Self:
        """Until the stream has ended, in whatever way."""
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), f"still open after {len(self.pieces)} pieces\n{self.part.log}"
        return self

    def text(self) -> str:
        """The whole text of a stream that came to its proper end."""
        self.wait()
        assert self.done, f"cut off after {len(self.pieces)} pieces\n{self.part.log}"
        assert self.finish == "length"
        return "".join(self.pieces)
