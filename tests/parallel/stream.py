"""A streamed completion, read in a background thread of the test."""

import http.client
import json
import threading
from collections.abc import Mapping
from typing import Any, Self

from tests.parallel.parts import DEADLINE, Part


class Stream:
    """Reads /v1/completions in a separate thread. `text` waits for the end."""

    def __init__(self, part: Part, body: Mapping[str, Any]):
        self.part = part
        self.chunks: list[str] = []
        self.finish: str | None = None
        self.done = False  # received `data: [DONE]`: the stream is complete
        self._body = json.dumps({**body, "stream": True})
        self._thread = threading.Thread(target=self._read, name="stream", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        connection = http.client.HTTPConnection(self.part.address, self.part.port, timeout=DEADLINE)
        try:
            connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                for line in response:
                    self._handle_line(line.decode().strip())
        except (OSError, http.client.HTTPException):
            pass  # `done` stays False
        finally:
            connection.close()

    def _handle_line(self, line: str) -> None:
        data = line.removeprefix("data: ")
        if data == line:
            return
        if data == "[DONE]":
            self.done = True
            return
        for choice in json.loads(data).get("choices", ()):
            self.chunks.append(choice["text"])
            self.finish = choice["finish_reason"] or self.finish

    def wait_flowing(self, num_chunks: int = 20) -> Self:
        """Waits until `num_chunks` have arrived. Asserts that the stream has not ended."""
        self.part.until(lambda: len(self.chunks) >= num_chunks or not self._thread.is_alive(), f"{num_chunks} chunks")
        assert self._thread.is_alive(), f"ended after {len(self.chunks)} chunks\n{self.part.log}"
        assert self.finish is None
        return self

    def wait(self) -> Self:
        """Waits until the stream has ended, complete or not."""
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), f"still open after {len(self.chunks)} chunks\n{self.part.log}"
        return self

    def text(self) -> str:
        """Waits for the end of the stream and asserts that it is complete. Returns its text."""
        self.wait()
        assert self.done, f"cut off after {len(self.chunks)} chunks\n{self.part.log}"
        assert self.finish == "length"
        return "".join(self.chunks)
