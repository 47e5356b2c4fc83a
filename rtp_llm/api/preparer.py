"""Runs the preparation of a request where its size can delay nobody else.

A body of a few kilobytes is prepared on the event loop, and a longer one in a thread. One from which JSON, validation
or the template could hold the GIL (the lock that the event loop needs, too) for long goes to a process of its own.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from rtp_llm.api.preparation import Preparation, PromptLimits
from rtp_llm.errors import execution_failed
from rtp_llm.machine.process import die_with_parent
from rtp_llm.text.template import ChatTemplate
from rtp_llm.text.tokenizer import Tokenizer

T = TypeVar("T")
Work = Callable[[Preparation, bytes, PromptLimits], T]
log = logging.getLogger(__name__)

INLINE_BYTES = 4 << 10
THREAD_BYTES = 64 << 10  # JSON and validation of so many bytes hold the GIL for at most 10 ms
IDLE_SECONDS = 60.0  # after which the process ends and returns its memory
PROCESS_NICENESS = 5  # so that a step of the engine and the event loop come first


class Preparer:
    """Prepares requests, each where its size allows it."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self._arguments = (tokenizer, template)
        self._preparation = Preparation(tokenizer, template)
        self._thread = ThreadPoolExecutor(1, "prepare")  # one, since all of them compete for the GIL
        self._process: Executor | None = None
        self._num_running = 0
        self._idle_timer: asyncio.TimerHandle | None = None

    async def prepare(self, work: Work[T], raw: bytes, limits: PromptLimits) -> T:
        """Returns the result of `work`, a method of `Preparation`. Raises RequestError."""
        if len(raw) < INLINE_BYTES:
            return work(self._preparation, raw, limits)
        loop = asyncio.get_running_loop()
        if len(raw) < THREAD_BYTES:
            return await loop.run_in_executor(self._thread, work, self._preparation, raw, limits)
        return await self._in_process(work, raw, limits)

    def close(self) -> None:
        """Ends the thread and the process, without waiting for them."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end_process()

    async def _in_process(self, work: Work[T], raw: bytes, limits: PromptLimits) -> T:
        if self._idle_timer:
            self._idle_timer.cancel()
        if self._process is None:
            self._process = ProcessPoolExecutor(1, get_context("spawn"), _start, self._arguments)
        process = self._process
        self._num_running += 1
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(process, _run, work, raw, limits)
        except BrokenProcessPool:
            if self._process is process:
                self._end_process()
            log.warning("the process that prepares large requests died, perhaps for lack of memory; it starts again")
            raise execution_failed("the request could not be prepared: it may need too much memory") from None
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle_timer = loop.call_later(IDLE_SECONDS, self._end_process)

    def _end_process(self) -> None:
        if self._process:
            self._process.shutdown(wait=False, cancel_futures=True)
            self._process = None


_preparation: Preparation  # of the process that prepares large requests


def _start(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    global _preparation
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # supervisord sends it to this process too, while the API drains
    die_with_parent()
    os.nice(PROCESS_NICENESS)
    _preparation = Preparation(tokenizer, template)


def _run(work: Work[T], raw: bytes, limits: PromptLimits) -> T:
    return work(_preparation, raw, limits)
