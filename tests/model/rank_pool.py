"""Sets of rank processes, as the tests see them: started once per TP size, given jobs, and never waited for in vain."""

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
from tests.model.drive import Completion, Outcomes
from tests.ports import free_start_port

ROOT = Path(__file__).parents[2]
START_SECONDS, JOB_SECONDS = 120, 120


@dataclass(frozen=True)
class RankReport:
    """What a gang says about a job: outcomes of all requests, and one reply per rank."""

    outcomes: Outcomes
    replies: list[dict[str, Any]]


class RankPool:
    """`size` processes that form one tensor-parallel group. Close it: that ends them.

    After a failure the next job gets a new set, so that it says something about itself.
    """

    def __init__(self, size: int):
        self.size = size
        self.processes: list[subprocess.Popen[bytes]] = []
        self._controls: list[socket.socket] = []
        self._folder = tempfile.TemporaryDirectory(prefix="gang")

    def _open(self) -> None:
        port = free_start_port()
        for rank in range(self.size):
            self._start(rank, port)
        self._collect(START_SECONDS)

    def _start(self, rank: int, port: int) -> None:
        ours, theirs = socket.socketpair()
        self._controls.append(ours)
        command = [sys.executable, "-m", "tests.model.rank", *map(str, (self.size, rank, port, theirs.fileno()))]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with theirs, self._log(rank).open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[theirs.fileno()],
                )
            )

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank{rank}.log"

    def run(
        self, checkpoint: Path, waves: Sequence[Sequence[Request]], collectives: str = "gloo", **settings: Any
    ) -> RankReport:
        """Loads the checkpoint on all ranks and serves the waves one after the other."""
        if not self.processes:
            self._open()
        out = Path(self._folder.name) / "out.npz"
        job = {
            "checkpoint": str(checkpoint),
            "settings": settings,
            "waves": [[_entry(r) for r in wave] for wave in waves],
            "out": str(out),
            "collectives": collectives,
        }
        for rank, control in enumerate(self._controls):
            try:
                control.sendall(pack_json(FrameType.SUBMIT, job))
            except OSError as error:
                self._fail(f"rank {rank} died: {error}")
        replies = self._collect(JOB_SECONDS)
        return RankReport(_read(out, replies[0].pop("outcomes")), replies)

    def _collect(self, seconds: float) -> list[dict[str, Any]]:
        """One reply of every rank. Raises AssertionError with the ranks' output where one dies or time is up."""
        deadline = time.monotonic() + seconds
        replies: dict[int, dict[str, Any]] = {}
        while len(replies) < self.size:
            waiting = [c for i, c in enumerate(self._controls) if i not in replies]
            ready, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(set(range(self.size)) - replies.keys())} gave no answer in {seconds:.0f} s")
            for control in ready:
                rank = self._controls.index(control)
                replies[rank] = self._reply(rank, max(0.1, deadline - time.monotonic()))
        return [replies[rank] for rank in range(self.size)]

    def _reply(self, rank: int, seconds: float) -> dict[str, Any]:
        control = self._controls[rank]
        control.settimeout(seconds)
        try:
            message: dict[str, Any] = json.loads(recv_frame(control)[1])
        except (WireError, TimeoutError, ConnectionError) as error:
            self._fail(f"rank {rank} died: {error}")
        return message

    def _fail(self, message: str) -> NoReturn:
        self._end(patience=0)
        tails = [f"--- rank {r}\n{self._log(r).read_text(errors='replace')[-3000:]}" for r in range(self.size)]
        raise AssertionError("\n".join([f"TP {self.size}: {message}", *tails]))

    def _end(self, patience: float) -> None:
        """An idle rank ends by itself when its control socket does; after `patience` seconds it is killed."""
        for control in self._controls:
            control.close()
        deadline = time.monotonic() + patience
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
        self._controls, self.processes = [], []

    def close(self) -> None:
        self._end(patience=10)
        self._folder.cleanup()


def _entry(request: Request) -> dict[str, Any]:
    prompt = request.tokens[: request.num_prompt_tokens]
    return {"id": request.id, "prompt": prompt, "params": request.params.to_json(), "output": request.output}


def _read(path: Path, told: dict[str, Any]) -> Outcomes:
    with np.load(path, allow_pickle=False) as arrays:
        return {id: Completion(**{**fields, "logits": list(arrays[id])}) for id, fields in told.items()}
