"""A fake engine: rank 0's side of the socket between the API process and rank 0, controlled by a test.

It uses the real protocol (`rtp_llm.parallel.wire`: READY, SUBMIT, ABORT, LAUNCH, EVENTS) with the API process of the
product. A test can choose the next token, split a character between two steps, or lose the engine between two tokens.
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

from rtp_llm.contract.engine_events import EngineStats, pack_events
from rtp_llm.contract.engine_info import EngineInfo
from rtp_llm.contract.engine_output import EngineOutput, Logprob
from rtp_llm.parallel.wire import FrameType, pack_frame, pack_json, recv_frame

TIMEOUT_SECONDS = 20.0  # for events that should happen at once
STATS = {
    "running": 0,
    "waiting": 0,
    "kv_used": 0,
    "preemptions": 0,
    "prefix_queries": 0,
    "prefix_hits": 0,
    "drafts": 0,
    "draft_tokens": 0,
    "accepted_tokens": 0,
    "flops": 0,
    "read_bytes": 0,
    "write_bytes": 0,
    "steps": 1,
    "step_tokens": 0,
    "step_seconds": 0.0,
}


@dataclass(frozen=True)
class Submission:
    """A sequence that the API submitted."""

    id: str
    prompt: list[int]
    output: list[int]
    params: dict[str, Any]


@dataclass(frozen=True)
class ScriptedOutput:
    """One output in a fake engine's script. It has no request id, because the id is known only when a sequence is
    submitted."""

    tokens: list[int]
    finish: Any = None
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    cached_tokens: int = 0
    error: str = ""
    hidden_state: bytes = b""

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
            hidden_state=self.hidden_state,
        )


Script = Callable[[Submission], Sequence[ScriptedOutput]]


class FakeEngine:
    """Listens on `path`. `script`: returns the outputs for a submitted sequence, which are sent one per frame (message
    on the socket); without a script, the test reads submissions and sends frames itself."""

    def __init__(self, path: Path, script: Script | None = None, *, sends_ready: bool = True, **info: Any):
        self.script = script
        self._path, self.sends_ready = path, sends_ready
        defaults = {"epoch": 1, "max_seq_len": 2048, "max_seq_len_reason": "MAX_SEQ_LEN=2048"}
        defaults |= {"vocab_size": 258, "block_size": 16, "num_blocks": 64}
        self._info = EngineInfo(**{**defaults, "prefix_caching": True, "family": "fake", "dtype": "fp32", **info})
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

    # Messages of the API

    def next_submission(self) -> Submission:
        """Waits for the next submission."""
        return self._submitted.get(timeout=TIMEOUT_SECONDS)

    def next_abort(self) -> str:
        """Waits for the next abort and returns the id of its sequence."""
        return self._aborted.get(timeout=TIMEOUT_SECONDS)

    def wait_for_connection(self) -> None:
        self._connected.get(timeout=TIMEOUT_SECONDS)

    @property
    def num_pending_submissions(self) -> int:
        """Submissions that the test has not read."""
        return self._submitted.qsize()

    @property
    def num_pending_aborts(self) -> int:
        """Aborts that the test has not read."""
        return self._aborted.qsize()

    # Messages of the engine

    def send_ready(self) -> None:
        self._send(pack_json(FrameType.READY, asdict(self._info)))

    def send_frame(self, *outputs: EngineOutput, **stats: Any) -> None:
        """Sends the outputs in one frame."""
        payload = pack_events(outputs, EngineStats(**{**STATS, **stats}))
        self._send(pack_frame(FrameType.EVENTS, payload))

    def send_launch(self, *submissions: Submission) -> None:
        """Announces a step that computes these sequences."""
        self._send(pack_json(FrameType.LAUNCH, {"ids": [submission.id for submission in submissions]}))

    def send_outputs(self, submission: Submission, *outputs: ScriptedOutput) -> None:
        """Sends each output in its own frame."""
        for output in outputs:
            self.send_frame(output.for_request(submission.id))

    def close(self) -> None:
        """Closes all sockets, as the kernel does if a process is killed."""
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
        with suppress(OSError):  # until either side closes the connection
            while True:
                frame_type, payload = recv_frame(connection)
                message = json.loads(payload)
                if frame_type == FrameType.ABORT:
                    self._aborted.put(message["id"])
                    continue
                assert frame_type == FrameType.SUBMIT, frame_type
                submission = Submission(**message)
                self._submitted.put(submission)
                if self.script:
                    self.send_outputs(submission, *self.script(submission))

    def _send(self, frame: bytes) -> None:
        assert self._connection is not None, "the API has not connected"
        with self._lock:
            self._connection.sendall(frame)
