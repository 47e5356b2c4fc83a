"""A coordinator in a thread of the test, and peers that talk to it in raw frames, as an implementation of their own."""

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rtp_llm.config import Config
from rtp_llm.parallel.coordinator import Coordinator
from rtp_llm.parallel.part_spec import ModelInfo, PartSpec
from rtp_llm.parallel.plan import RENDEZVOUS_PORT_OFFSET, make_plan
from rtp_llm.parallel.wire import FrameType, WireError, connect, listen, pack_json, recv_frame
from tests.parallel.parts import DEADLINE, POLL
from tests.ports import free_start_port

FINGERPRINT = {"version": "1", "model": "a", "model.dtype": "fp32", "config.MAX_SEQ_LEN": 0}


def part_specs(run_dir: Path, num_parts: int = 2, **settings: Any) -> list[PartSpec]:
    """Returns the specs of all parts of a gang of two ranks, on this machine with different ports."""
    port = free_start_port(2)
    members = {f"x_part{n}": {"ip": "127.0.0.1", "port": port + 100 * n} for n in range(num_parts)}
    common = {"tp_size": 2, "local_world_size": 2 // num_parts, "rtp_device": "cpu", **settings}
    if num_parts > 1:
        common["json_gang_parts"] = json.dumps(members)
    specs = []
    for part in range(num_parts):
        config = Config.model_validate({**common, "start_port": port + 100 * part, "world_rank": part})
        model = ModelInfo("m", "qwen3", "fp32", 2048)
        specs.append(PartSpec(run_dir, config, make_plan(config, 0), model, FINGERPRINT, tty=False))
    return specs


class CoordinatorThread:
    """Serves the rendezvous port of part 0 until it is closed."""

    def __init__(self, part_spec: PartSpec, secret: bytes = b""):
        self.port = part_spec.plan.leader_port(RENDEZVOUS_PORT_OFFSET)
        self.coordinator = Coordinator(part_spec, listen("127.0.0.1", self.port), secret)
        self._is_stopping, self._may_serve = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="coordinator")
        self._thread.start()

    def _serve(self) -> None:
        while not self._is_stopping.is_set():
            with self._may_serve:
                self.coordinator.serve_once()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Makes the coordinator see all frames that are sent meanwhile at once."""
        with self._may_serve:
            yield

    def close(self) -> None:
        """Asserts that the coordinator still runs."""
        assert self._thread.is_alive(), "the coordinator has failed"
        self._is_stopping.set()
        connect("127.0.0.1", self.port, DEADLINE).close()  # wakes it
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        self.coordinator.close()


class Peer:
    """One connection to the rendezvous port."""

    def __init__(self, port: int):
        self.sock = connect("127.0.0.1", port, DEADLINE)
        self.challenge = self.receive(FrameType.CHALLENGE)

    def send(self, frame_type: FrameType, message: Any) -> None:
        self.sock.sendall(pack_json(frame_type, message))

    def hello(self, kind: str = "worker", part: int = 0, secret: bytes = b"", **message: Any) -> None:
        """Sends HELLO. message: fields other than those of worker 0 that has loaded nothing."""
        hello = {"kind": kind, "part": part, "fingerprint": FINGERPRINT, "index": 0, "pid": 1000 + part}
        hello |= {"resident_rank": None, "num_blocks": 0, "max_seq_len": 0, **message}
        hello |= {"nonce": "of the peer", "secret": bool(secret)}
        text = json.dumps([self.challenge["nonce"], hello], sort_keys=True, separators=(",", ":"))
        mac = hmac.HMAC(secret, text.encode(), hashlib.sha256).hexdigest() if secret else ""
        self.send(FrameType.HELLO, hello | {"mac": mac})

    def join(self, **message: Any) -> "Peer":
        """Says hello, and waits until it is accepted."""
        self.hello(**message)
        self.receive(FrameType.ACCEPTED)
        return self

    def beat(self, phase: str = "serving", **rank_status: Any) -> None:
        defaults = {"part": 0, "pid": 1, "phase": phase, "progress": 0.0, "idle_s": 0.0}
        self.send(
            FrameType.HEARTBEAT,
            {**defaults, "longest_s": 0.0, "progress_count": 0, "in_collective": False, **rank_status},
        )

    def receive(self, frame_type: FrameType) -> dict[str, Any]:
        """Returns the next message of this type. Raises WireError if the connection ends before."""
        while True:
            received_type, payload = recv_frame(self.sock)
            if received_type == frame_type:
                message: dict[str, Any] = json.loads(payload)
                return message

    def receive_until(self, frame_type: FrameType, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Returns the next message of this type that fulfils the condition."""
        while True:
            message = self.receive(frame_type)
            if condition(message):
                return message

    def rest(self) -> list[FrameType]:
        """Returns the types of all frames until the coordinator closes the connection."""
        types = []
        try:
            while True:
                types.append(recv_frame(self.sock)[0])
        except (WireError, ConnectionError):
            return types

    def pending(self) -> list[tuple[FrameType, dict[str, Any]]]:
        """Returns the frames that have arrived, up to a status that the coordinator sends from now on."""
        frames: list[tuple[FrameType, dict[str, Any]]] = []
        deadline = time.monotonic() + 4 * POLL
        while not frames or frames[-1][0] != FrameType.GANG_STATUS or time.monotonic() < deadline:
            frame_type, payload = recv_frame(self.sock)
            frames.append((frame_type, json.loads(payload)))
        return frames

    def close(self) -> None:
        self.sock.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(POLL)
