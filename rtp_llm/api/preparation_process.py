"""A child process that validates and tokenizes large requests, one after another, for one thread of the API process."""

import logging
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from rtp_llm.api.fields import FieldRecord, recording
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.errors import RequestError, execution_failed, timed_out
from rtp_llm.machine.process import die_with_parent
from rtp_llm.text.output_format import AnswerFormats
from rtp_llm.text.template import ChatTemplate
from rtp_llm.text.tokenizer import Tokenizer

T = TypeVar("T")
Work = Callable[[Preparation, bytes, PromptLimits], T]
log = logging.getLogger(__name__)

MAX_SECONDS, MAX_SECONDS_PER_MIB = 60.0, 10.0  # of one preparation: ten times what it takes on a busy machine
START_SECONDS = 60.0
PROCESS_NICENESS = 5  # so that a step of the engine and the event loop come first
OOM_SCORE = 1000  # the kernel kills this process before the ranks if memory runs out


class PreparationProcess:
    """A child process that validates and tokenizes large requests, one at a time, so that they do not block the event
    loop of the API process. It starts at the first `run`, and again at the next `run` after it has died.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, formats: AnswerFormats):
        self._arguments = (tokenizer, template, formats)
        self._process: Any = None
        self._connection: Connection | None = None
        self._is_closed = False

    def run(
        self, work: Work[T], raw: bytes, limits: PromptLimits, max_seconds: float | None = None
    ) -> tuple[T, FieldRecord]:
        """Calls `work`, a method that validates and tokenizes a body, with the body `raw` in the child process. Returns
        its result and a record of the body's ignored fields.

        max_seconds: time limit in seconds (None: MAX_SECONDS), plus MAX_SECONDS_PER_MIB for each MiB of `raw`. At the
        limit the process is killed.

        If the process dies, tries once more in a new one, since another cause than this request may have killed it.

        Raises the RequestError that `work` raises, RequestError 504 at the time limit, 500 if the process dies twice.
        """
        try:
            return self._try(work, raw, limits, max_seconds)
        except (EOFError, OSError):
            if self._is_closed:
                raise
            log.warning(
                "the process that tokenizes large requests died, perhaps out of memory; trying the request in a new one"
            )
            self.end()
        try:
            return self._try(work, raw, limits, max_seconds)
        except (EOFError, OSError):
            log.warning(
                "the process that tokenizes large requests died again; rejecting the request (body of %d bytes)",
                len(raw),
            )
            self.end()
            raise execution_failed(
                "the request could not be tokenized: the process died twice, perhaps because it needs too much memory"
            ) from None

    def end(self) -> None:
        """Kills the process, which frees its memory; the next `run` starts a new one. A `run` that is in progress in
        another thread loses its process: it tries again, or fails after `close`.
        """
        process, self._process = self._process, None
        if process:
            process.kill()
            process.join()

    def close(self) -> None:
        """Kills the process; no `run` may follow."""
        self._is_closed = True
        self.end()

    def _try(self, work: Work[T], raw: bytes, limits: PromptLimits, max_seconds: float | None) -> tuple[T, FieldRecord]:
        """Raises EOFError or OSError if the process dies."""
        if self._process is None or self._connection is None or not self._process.is_alive():
            self.end()
            self._start()
        assert self._connection
        self._connection.send((work, limits))
        self._connection.send_bytes(raw)
        seconds = (max_seconds or MAX_SECONDS) + MAX_SECONDS_PER_MIB * len(raw) / 2**20
        if not self._connection.poll(seconds):
            self.end()
            raise timed_out(f"the request was not validated and tokenized within {seconds:.0f} s")
        result, error = self._connection.recv()
        if error:
            raise error
        return result  # type: ignore[no-any-return]

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_end, *self._arguments), daemon=True)
        self._process.start()
        child_end.close()  # so that the end of the process ends the connection
        if not self._connection.poll(START_SECONDS):
            raise EOFError
        self._connection.recv()  # once it can work, so that its start does not count as work


def prepare_recorded(
    work: Work[T], preparation: Preparation, raw: bytes, limits: PromptLimits
) -> tuple[T, FieldRecord]:
    """Calls `work`, which validates and tokenizes the body `raw`, in this process. Returns its result and a record of
    the body's ignored fields.
    """
    with recording() as record:
        return work(preparation, raw, limits), record


def _serve(connection: Connection, tokenizer: Tokenizer, template: ChatTemplate, formats: AnswerFormats) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # supervisord sends it to this process too, while the API drains
    die_with_parent()
    os.nice(PROCESS_NICENESS)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    preparation = Preparation(tokenizer, template, formats)
    connection.send(None)
    while True:
        work, limits = connection.recv()
        connection.send(_result(work, preparation, connection.recv_bytes(), limits))


def _result(work: Work[Any], preparation: Preparation, raw: bytes, limits: PromptLimits) -> tuple[Any, Any]:
    """Returns the result and None, or None and the error."""
    try:
        return prepare_recorded(work, preparation, raw, limits), None
    except RequestError as error:
        return None, error
    except Exception:
        return None, RuntimeError(traceback.format_exc())
