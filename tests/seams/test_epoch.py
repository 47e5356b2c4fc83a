"""An epoch is aborted in the middle of a step, while the other rank is alive and silent; a second one on the same
residency continues the request. The checkpoint's weights are deleted in between, so nothing can be read again.
"""

import json
import os
import platform
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from rtp_llm.config import Config
from rtp_llm.contract.engine_events import unpack_events
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.parallel.part_spec import ModelInfo, PartSpec
from rtp_llm.parallel.wire import FrameType, WireError, pack_json, recv_frame
from tests import random_model
from tests.model import drive
from tests.model.rank import local_plan
from tests.ports import free_start_port

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 60  # for events that should happen at once; less than DIST_COMM_TIMEOUT, so only an abort ends waits
PROMPT = [5, 80, 300, 7, 41, 900, 12]
MAX_TOKENS = 240  # so many that the request is still running when the rank falls silent


class RankProcess:
    """A process of `tests.seams.epoch_rank`, controlled by lines."""

    def __init__(self, run_dir: Path, rank: int, collectives: str):
        self._control, inherited = socket.socketpair()
        self._control.settimeout(TIMEOUT_SECONDS)
        self._lines = self._control.makefile()
        self._log_path = run_dir / f"rank{rank}.log"
        arguments = (run_dir, rank, inherited.fileno(), collectives)
        command = [sys.executable, "-m", "tests.seams.epoch_rank", *map(str, arguments)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with inherited, self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=log, pass_fds=[inherited.fileno()]
            )

    def send(self, *commands: str) -> None:
        self._control.sendall("".join(f"{command}\n" for command in commands).encode())

    def expect(self, line: str) -> None:
        try:
            received = self._lines.readline().strip()
        except TimeoutError:
            received = ""
        assert received == line, f"expected {line!r}, not {received!r}\n{self._log_path.read_text()}"

    def has_replied(self) -> bool:
        return bool(select.select([self._control], [], [], 0)[0])

    def end(self) -> int:
        """Ends the process after its epoch. Returns its exit code."""
        self._control.shutdown(socket.SHUT_WR)
        return self.process.wait(TIMEOUT_SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._lines.close()
        self._control.close()


class ApiConnection:
    """A connection to rank 0 as the API process has one. `launches`: the ids of every LAUNCH frame received."""

    def __init__(self, path: Path, epoch: int):
        """Connects, and expects the READY frame of this epoch."""
        self.launches: list[list[str]] = []
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(TIMEOUT_SECONDS)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self._sock.connect_ex(str(path)):
            assert time.monotonic() < deadline, "rank 0 does not listen"
            time.sleep(0.05)
        frame_type, payload = recv_frame(self._sock)
        assert (frame_type, json.loads(payload)["epoch"]) == (FrameType.READY, epoch)

    def submit(self, request_id: str, output: Sequence[int]) -> None:
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0).to_json()
        body = {"id": request_id, "prompt": PROMPT, "output": output, "params": params}
        self._sock.sendall(pack_json(FrameType.SUBMIT, body))

    def receive(self, limit: int = MAX_TOKENS) -> list[int]:
        """Returns the next tokens: until the request ends, until there are `limit`, or until rank 0 hangs up."""
        tokens: list[int] = []
        while len(tokens) < limit:
            try:
                frame_type, payload = recv_frame(self._sock)
            except (WireError, ConnectionError):
                return tokens
            if frame_type == FrameType.LAUNCH:
                self.launches.append(json.loads(payload)["ids"])
                continue
            for output in unpack_events(payload)[0]:
                assert self.launches, "rank 0 did not announce its first step"
                tokens += output.tokens
                if output.finish:
                    return tokens
        return tokens

    def close(self) -> None:
        self._sock.close()


def make_part_spec(run_dir: Path, checkpoint: Path) -> PartSpec:
    settings = {"checkpoint_path": str(checkpoint), "dist_comm_timeout": 10 * TIMEOUT_SECONDS, "rtp_threads": 1}
    plan = local_plan(2, free_start_port(2))
    config = Config.model_validate({**settings, **drive.DEFAULT_SETTINGS, "start_port": plan.start_port})
    return PartSpec(run_dir, config, plan, ModelInfo("random", "qwen3", "fp32", 2048), {}, tty=False)


@pytest.mark.slow
@pytest.mark.parametrize("collectives", ["shm", "gloo"])
def test_a_second_epoch_continues_on_the_same_residency(collectives: str, tmp_path: Path) -> None:
    if collectives == "shm" and platform.machine() != "x86_64":
        pytest.skip("needs x86's order of stores")
    checkpoint = tmp_path / "model"
    random_model.write(checkpoint)
    engine = drive.make_single_rank_engine(checkpoint)
    expected = drive.run(engine, [drive.greedy_request(PROMPT, MAX_TOKENS)])["0"].tokens
    assert len(expected) == MAX_TOKENS
    part_spec = make_part_spec(tmp_path, checkpoint)
    part_spec.save()
    path = part_spec.engine_sockets[0]
    with ExitStack() as stack:
        first, second = [RankProcess(tmp_path, rank, collectives) for rank in range(2)]
        ranks = first, second
        for rank in ranks:
            stack.callback(rank.close)
            rank.send("epoch")
        with closing(ApiConnection(path, epoch=1)) as api:
            api.submit("a", [])
            tokens = api.receive(limit=5)
            second.send("silent")
            second.expect("is silent")
            first.send("abort")
            first.expect("left epoch 1")
            tokens += api.receive()
        assert 5 <= len(tokens) < MAX_TOKENS
        assert not second.has_replied(), "it is still silent"
        second.send("abort", "resume")
        second.expect("left epoch 1")
        (checkpoint / "model.safetensors").unlink()
        for rank in ranks:
            rank.send("epoch")
        with closing(ApiConnection(path, epoch=2)) as api:
            api.submit("a", tokens)
            assert tokens + api.receive() == expected
            api.submit("b", [])
            assert api.receive() == expected
            assert api.launches == [["a"], ["b"]], "only changes are announced"
            second.send("abort")  # while it waits for a step
            second.expect("left epoch 2")
            first.expect("failed by itself")  # nobody has aborted the epoch of this rank: it reports the lost one
            first.expect("left epoch 2")
        assert [rank.end() for rank in ranks] == [0, 0]
