"""Prepares requests where they cannot delay other requests: on the event loop, in a thread or in a process.

A body of a few kilobytes is prepared on the event loop, a longer one in a thread. A body for which JSON, validation or
the template could hold the GIL for long, and so block the event loop, is prepared in another process.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from rtp_llm.api.fields import FieldRecord
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.preparation_process import PreparationProcess, T, Work, prepare_recorded
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.errors import engine_gone, overloaded
from rtp_llm.text.output_format import AnswerFormats
from rtp_llm.text.template import ChatTemplate
from rtp_llm.text.tokenizer import Tokenizer

INLINE_BYTES = 4 << 10
THREAD_BYTES = 64 << 10  # JSON and validation of so many bytes hold the GIL for at most 10 ms
MAX_LARGE = 64  # large requests that wait or are prepared
IDLE_SECONDS = 600.0  # after which the process ends and returns its memory


class Preparer:
    """Runs the functions that validate and tokenize requests: for small requests on the event loop, for larger ones in
    a thread, for the largest in another process. The thread and the process handle requests in order of arrival.

    num_large  number of requests that are in the process or wait for it
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, formats: AnswerFormats):
        self._preparation = Preparation(tokenizer, template, formats)
        self._process = PreparationProcess(tokenizer, template, formats)
        # One thread each: all work in threads competes for the GIL, and there is one process.
        self._thread, self._process_thread = (ThreadPoolExecutor(1, name) for name in ("prepare", "prepare-large"))
        self._futures: set[asyncio.Future[Any]] = set()
        self._is_stopping = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self.num_large = 0

    async def prepare(
        self, work: Work[T], raw: bytes, limits: PromptLimits, extra_bytes: int = 0
    ) -> tuple[T, FieldRecord]:
        """Calls `work`, a method that validates and tokenizes a body, with the body `raw`: depending on the size, on
        the event loop, in a thread or in another process. Returns the result and a record of the body's ignored fields.

        `extra_bytes`: size of the data that `work` reads besides the body; counts like bytes of the body.

        If the call is cancelled before its turn, `work` does not run.

        Raises the RequestError that `work` raises; RequestError 429 if MAX_LARGE large requests are waiting, 503 if the
        server is stopping, 504 if the process takes too long, 500 if it dies.
        """
        size = len(raw) + extra_bytes
        if size < INLINE_BYTES:
            return prepare_recorded(work, self._preparation, raw, limits)
        if size < THREAD_BYTES:
            return await self._run(self._thread, prepare_recorded, work, self._preparation, raw, limits)
        return await self._run_in_process(work, raw, limits)

    async def run_in_process(self, work: Work[T], raw: bytes, max_seconds: float) -> T:
        """Calls `work` with `raw` in the process for large requests, whatever the size of `raw`. Returns the result.

        `work` must not use its argument `limits`, which is a placeholder here.

        Raises RequestError 504 if `work` takes longer than `max_seconds`, otherwise as `prepare` does.
        """
        result, _ = await self._run_in_process(work, raw, PromptLimits(0, "", 0, 0, 0, ""), max_seconds)
        return result

    async def _run_in_process(
        self, work: Work[T], raw: bytes, limits: PromptLimits, max_seconds: float | None = None
    ) -> tuple[T, FieldRecord]:
        if self.num_large >= MAX_LARGE:
            raise overloaded(f"{self.num_large} large requests wait to be tokenized, the maximum: try again later")
        self.num_large += 1
        if self._idle_timer:
            self._idle_timer.cancel()
        try:
            return await self._run(self._process_thread, self._process.run, work, raw, limits, max_seconds)
        finally:
            self.num_large -= 1
            if not self.num_large:
                self._idle_timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._process.end)

    def stop(self) -> None:
        """Fails all requests that are being tokenized or wait for that, and all later ones, with 503. Called when the
        server stops, as it would not run them any more.
        """
        self._is_stopping = True
        for future in self._futures:
            future.cancel()

    def close(self) -> None:
        """Stops the threads and the process, without waiting for them."""
        self.stop()
        for executor in (self._thread, self._process_thread):
            executor.shutdown(wait=False, cancel_futures=True)
        self._process.close()

    async def _run(self, executor: Executor, function: Callable[..., T], *arguments: Any) -> T:
        if self._is_stopping:
            raise engine_gone("the server is stopping: retry, or use another server")
        future = asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
        self._futures.add(future)
        try:
            return await future
        except asyncio.CancelledError:
            if self._is_stopping:
                raise engine_gone("the server is stopping: retry, or use another server") from None
            raise
        finally:
            self._futures.discard(future)
