"""Pools of rank processes for tests: one pool per TP size, started once, with a timeout on every job."""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rtp_llm.contract.request import Request
from rtp_llm.parallel.wire import FrameType, WireError, pack_json, recv_frame
from tests.model.drive import Completion, Completions
from tests.ports import free_start_port

ROOT = Path(__file__).parents[2]
START_TIMEOUT_SECONDS, JOB_TIMEOUT_SECONDS = 120, 120


@dataclass(frozen=True)
class RankReport:
    """Result of a job: completions by request id, and one reply per rank."""

    completions: Completions
    replies: list[dict[str, Any]]


class RankPool:
    """`size` processes that form one tensor-parallel group. `close` stops them.

    A failure stops them too, and the next job starts new ones, so that failures do not affect later jobs.
    """

    def __init__(self, size: int):
        self.size = size
        self.processes: list[subprocess.Popen[bytes]] = []
        self._control_sockets: list[socket.socket] = []
        self._directory = tempfile.TemporaryDirectory(prefix="gang")

    def _start_processes(self) -> None:
        port = free_start_port()
        for rank in range(self.size):
            self._start_process(rank, port)
        self._collect_replies(START_TIMEOUT_SECONDS)

    def _start_process(self, rank: int, port: int) -> None:
        control, rank_control = socket.socketpair()
        self._control_sockets.append(control)
        command = [sys.executable, "-m", "tests.model.rank", *map(str, (self.size, rank, port, rank_control.fileno()))]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with rank_control, self._log_path(rank).open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[rank_control.fileno()],
                )
            )

    def _log_path(self, rank: int) -> Path:
        return Path(self._directory.name) / f"rank{rank}.log"

    def run(
        self, checkpoint: Path, waves: Sequence[Sequence[Request]], collectives: str = "gloo", **settings: Any
    ) -> RankReport:
        """Loads the checkpoint on all ranks and runs the waves of requests one after the other.

        `collectives`: "local" or "gloo", see `tests.model.rank.open_groups`.
        """
        if not self.processes:
            self._start_processes()
        logits_path = Path(self._directory.name) / "logits.npz"
        job = {
            "checkpoint": str(checkpoint),
            "settings": settings,
            "waves": [[_request_to_json(r) for r in wave] for wave in waves],
            "out": str(logits_path),
            "collectives": collectives,
        }
        for rank, control in enumerate(self._control_sockets):
            try:
                control.sendall(pack_json(FrameType.SUBMIT, job))
            except OSError as error:
                self._fail(f"rank {rank} died: {error}")
        replies = self._collect_replies(JOB_TIMEOUT_SECONDS)
        return RankReport(_read_completions(logits_path, replies[0].pop("completions")), replies)

    def _collect_replies(self, timeout: float) -> list[dict[str, Any]]:
        """Returns the replies by rank. Raises AssertionError with the ranks' logs if a rank exits or at the timeout."""
        deadline = time.monotonic() + timeout
        replies: dict[int, dict[str, Any]] = {}
        while len(replies) < self.size:
            waiting = [c for i, c in enumerate(self._control_sockets) if i not in replies]
            ready, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = sorted(set(range(self.size)) - replies.keys())
                self._fail(f"no reply from ranks {missing} within {timeout:.0f} s")
            for control in ready:
                rank = self._control_sockets.index(control)
                replies[rank] = self._read_reply(rank, max(0.1, deadline - time.monotonic()))
        return [replies[rank] for rank in range(self.size)]

    def _read_reply(self, rank: int, timeout: float) -> dict[str, Any]:
        control = self._control_sockets[rank]
        control.settimeout(timeout)
        try:
            message: dict[str, Any] = json.loads(recv_frame(control)[1])
        except (WireError, TimeoutError, ConnectionError) as error:
            self._fail(f"rank {rank} died: {error}")
        return message

    def _fail(self, message: str) -> NoReturn:
        self._stop_processes(grace_seconds=0)
        tails = [f"--- rank {r}\n{self._log_path(r).read_text(errors='replace')[-3000:]}" for r in range(self.size)]
        raise AssertionError("\n".join([f"TP {self.size}: {message}", *tails]))

    def _stop_processes(self, grace_seconds: float) -> None:
        """Closes the control sockets, at which idle ranks exit; kills the others after `grace_seconds`."""
        for control in self._control_sockets:
            control.close()
        deadline = time.monotonic() + grace_seconds
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        self._control_sockets, self.processes = [], []

    def close(self) -> None:
        self._stop_processes(grace_seconds=10)
        self._directory.cleanup()


def _request_to_json(request: Request) -> dict[str, Any]:
    prompt = request.tokens[: request.num_prompt_tokens]
    return {"id": request.id, "prompt": prompt, "params": request.params.to_json(), "output": request.output}


def _read_completions(logits_path: Path, completions: dict[str, Any]) -> Completions:
    with np.load(logits_path, allow_pickle=False) as arrays:
        return {id: Completion(**{**fields, "logits": list(arrays[id])}) for id, fields in completions.items()}
