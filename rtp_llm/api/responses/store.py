"""Stored responses: retrieved by id, continued by `previous_response_id`, or generated in the background."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from rtp_llm.api.responses.response import ResponseBuilder
from rtp_llm.errors import RequestError, invalid_params, unsupported

CONTINUED = ("completed", "incomplete")  # statuses of responses that another one can continue


class StoredResponse:
    """One response and the data to continue it. `owner`: name of the API key that may access it.

    conversation  JSON array of the chat messages of its prompt, without `instructions`
    input_items   JSON array of the input as the client sent it
    frames        the server-sent events so far, if the response is generated in the background
    """

    def __init__(self, owner: str, builder: ResponseBuilder, conversation: str, input_items: str):
        self.id, self.owner, self.input_items = builder.id, owner, input_items
        self.frames: list[str] = []
        self._conversation = conversation
        self._builder: ResponseBuilder | None = builder
        self._final, self._status = "", ""
        self._frames_size = 0
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def size(self) -> int:
        """Returns the number of stored characters (messages, input, response, events), roughly the size in bytes. Does
        not count the output of a response that is still being generated, except its events.
        """
        return len(self._conversation) + len(self.input_items) + len(self._final) + self._frames_size

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    def to_json(self) -> str:
        """Returns the response so far, as JSON."""
        return self._builder.to_json() if self._builder else self._final

    def settle(self) -> None:
        """Finishes the storage of a response that has ended: keeps its JSON text instead of the ResponseBuilder, whose
        objects per token take a hundred times as much memory, and adds its message to the conversation.
        """
        if self._builder:
            self._final, self._status = self._builder.to_json(), self._builder.status
            message = json.dumps(self._builder.message(), ensure_ascii=False)
            self._conversation = f"{self._conversation[:-1]}{', ' if self._conversation != '[]' else ''}{message}]"
            self._builder = None

    def run(self, frames: AsyncGenerator[str]) -> None:
        """Starts a task that generates the response in the background, also after the client disconnects. `frames`
        yields the server-sent events of the response.
        """
        self._task = asyncio.create_task(self._collect(frames), name=self.id)

    async def follow(self, start: int) -> AsyncGenerator[str]:
        """Yields the server-sent events from index `start` (0: the first) on, until the response has ended."""
        position = max(0, start)
        while True:
            while position < len(self.frames):
                yield self.frames[position]
                position += 1
            if not self.is_running:
                return
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)  # several followers share the event

    async def cancel(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def conversation(self) -> str:
        """Returns the messages up to and including this response, as a JSON array.

        Raises RequestError 400 unless the response's status is `completed` or `incomplete`.
        """
        if self._status not in CONTINUED:
            status = self._status or "in_progress"
            message = f"previous_response_id: that response is {status}; allowed: one that is completed or incomplete"
            raise invalid_params(message, "previous_response_id")
        return self._conversation

    async def _collect(self, frames: AsyncGenerator[str]) -> None:
        try:
            async with aclosing(frames):
                async for frame in frames:
                    self._append(frame)
        except asyncio.CancelledError:
            for frame in self._builder.cancel() if self._builder else ():
                self._append(frame)
        finally:
            self.settle()
            self._changed.set()

    def _append(self, frame: str) -> None:
        self.frames.append(frame)
        self._frames_size += len(frame)
        self._changed.set()


class ResponseStore:
    """Store of responses in memory, by id. Evicts the oldest ones beyond `max_bytes`, but none that is being generated.
    0 disables the store.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()

    @property
    def is_enabled(self) -> bool:
        return self._max_bytes > 0

    def require(self, param: str) -> None:
        """Raises RequestError 400 if the store is disabled. `param`: the request field that needs it, for the error."""
        if not self.is_enabled:
            raise unsupported(f"{param} needs stored responses: set RESPONSES_STORE_MB", param)

    def add(self, response: StoredResponse) -> None:
        """Stores a response that is finished, or that runs in the background."""
        self._responses[response.id] = response
        self.make_room()

    def make_room(self) -> None:
        """Evicts finished responses, oldest first, until the store is within `max_bytes`."""
        total = sum(response.size for response in self._responses.values())
        for response in [r for r in self._responses.values() if not r.is_running]:
            if total <= self._max_bytes:
                return
            total -= response.size
            del self._responses[response.id]

    def get(self, response_id: str, owner: str) -> StoredResponse:
        """Returns a stored response. Raises RequestError 404 for an unknown id, or if another API key owns it."""
        response = self._responses.get(response_id)
        if response is None or response.owner != owner:
            message = f"response {response_id[:64]!r} is not stored: it is unknown, of another key, or was dropped"
            raise RequestError(404, 507, "RESPONSE_NOT_FOUND", message, param="response_id")
        return response

    async def delete(self, response_id: str, owner: str) -> None:
        response = self.get(response_id, owner)
        del self._responses[response_id]
        await response.cancel()
