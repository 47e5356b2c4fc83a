"""Rank 0's side of the request socket, played by a test: what it says, when, and when it dies.

It speaks the real protocol (`rtp_llm.parallel.wire`, READY, SUBMIT, ABORT, EVENTS), so the API in front of it is the
product's own. Only this way can a test say which token comes next, split a character between two steps, or lose the
engine between two tokens.
"""

import json
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rtp_llm.contract.engine_info import EngineInfo
from rtp_llm.contract.engine_output import EngineOutput, Logprob
from rtp_llm.parallel.wire import FrameType, pack_json, recv_frame

TIMEOUT_SECONDS = 20.0  # seconds until a test gives up on what must happen at once
STATS = {
    "running": 0,
    "waiting": 0,
    "kv_used": 0,
    "preemptions": 0,
    "prefix_queries": 0,
    "prefix_hits": 0,
    "flops": 0,
    "read_bytes": 0,
    "write_bytes": 0,
    "steps": 1,
    "step_tokens": 0,
    "step_seconds": 0.0,
}


@dataclass(frozen=True)
class Submission:
    """A sequence as the API has submitted it."""

    id: str
    prompt: list[int]
    output: list[int]
    params: dict[str, Any]


@dataclass(frozen=True)
class ScriptedOutput:
    """One event of a script; which sequence it belongs to is known when one is submitted."""

    tokens: list[int]
    finish: Any = None
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    cached_tokens: int = 0
    error: str = ""

    def for_request(self, request_id: str) -> EngineOutput:
        return EngineOutput(
            request_id,
            tokens=self.tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            finish=self.finish,
            cached_tokens=self.cached_tokens,
            queue_ms=1.0,
            error=self.error,
        )


Script = Callable[[Submission], Sequence[ScriptedOutput]]


class FakeEngine:
    """Listens on `path`. With a `script` every submission is answered by it, one frame per event; without, the test
    takes submissions and emits events itself.
    """

    def __init__(self, path: Path, script: Script | None = None, *, sends_ready: bool = True, **info: Any):
        self.script = script
        self._path, self.sends_ready = path, sends_ready
        numbers = {"epoch": 1, "max_seq_len": 2048, "vocab_size": 258, "block_size": 16, "num_blocks": 64}
        self._info = EngineInfo(**{**numbers, "prefix_caching": True, "family": "fake", "dtype": "fp32", **info})
        self._submitted: queue.Queue[Submission] = queue.Queue()
        self._aborted: queue.Queue[str] = queue.Queue()
        self._connected: queue.Queue[None] = queue.Queue()
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        self._listener.listen()
        self._start_thread(self._accept)

    # What the API did

    def next_submission(self) -> Submission:
        """The next submission."""
        return self._submitted.get(timeout=TIMEOUT_SECONDS)

    def next_abort(self) -> str:
        """The next abort: the id of the sequence."""
        return self._aborted.get(timeout=TIMEOUT_SECONDS)

    def wait_for_connection(self) -> None:
        self._connected.get(timeout=TIMEOUT_SECONDS)

    @property
    def num_pending_submissions(self) -> int:
        """Submissions that nobody has taken."""
        return self._submitted.qsize()

    # What the engine says

    def send_ready(self) -> None:
        self._send(FrameType.READY, asdict(self._info))

    def send_frame(self, *events: EngineOutput, **stats: Any) -> None:
        """One frame."""
        self._send(FrameType.EVENTS, {"events": [e.to_json() for e in events], "stats": {**STATS, **stats}})

    def send_outputs(self, submission: Submission, *said: ScriptedOutput) -> None:
        """Each event in a frame of its own."""
        for one in said:
            self.send_frame(one.for_request(submission.id))

    def close(self) -> None:
        """Closes everything, as the kernel does for a process that was killed."""
        self._path.unlink(missing_ok=True)
        for sock in (self._listener, self._connection):
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(TIMEOUT_SECONDS)

    # Threads

    def _start_thread(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # until the listener is closed
            while True:
                self._connection, _ = self._listener.accept()
                if self.sends_ready:
                    self.send_ready()
                self._connected.put(None)
                self._start_thread(self._read)

    def _read(self) -> None:
        connection = self._connection
        assert connection is not None
        with suppress(OSError):  # the end of the connection, from either side
            while True:
                kind, payload = recv_frame(connection)
                message = json.loads(payload)
                if kind == FrameType.ABORT:
                    self._aborted.put(message["id"])
                    continue
                assert kind == FrameType.SUBMIT, kind
                submission = Submission(**message)
                self._submitted.put(submission)
                if self.script:
                    self.send_outputs(submission, *self.script(submission))

    def _send(self, kind: FrameType, message: Any) -> None:
        assert self._connection is not None, "the API has not connected"
        with self._lock:
            self._connection.sendall(pack_json(kind, message))
