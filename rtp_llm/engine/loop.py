"""The loops of the ranks. Rank 0: take requests, step, send events. The others: receive a step, compute it."""

import logging
import socket
import time
from typing import Any

from rtp_llm.engine.engine import Engine
from rtp_llm.engine.intake import Connection, Intake, Message
from rtp_llm.engine.request import Event, Request, SamplingParams
from rtp_llm.engine.step import Step
from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.pulse import Pulse
from rtp_llm.parallel.wire import Kind, pack, receive
from rtp_llm.runner.runner import Runner

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5  # an idle rank 0 still says so, to the other ranks and to the API


class Followers:
    """Rank 0's connections to the other ranks."""

    def __init__(self, peers: dict[int, socket.socket], timeout: float):
        self._peers = peers
        for sock in peers.values():
            sock.settimeout(timeout)

    def publish(self, step: Step) -> None:
        self._send(pack(Kind.STEP, step.to_bytes()))

    def tick(self) -> None:
        self._send(pack(Kind.TICK))

    def _send(self, frame: bytes) -> None:
        for rank, sock in self._peers.items():
            try:
                sock.sendall(frame)
            except OSError as error:
                raise CommunicationError(f"lost rank {rank}: {error}") from error


class Leader:
    """Rank 0's loop: between two steps it takes what the API sent, and never waits while there is work."""

    def __init__(
        self, engine: Engine, intake: Intake, followers: Followers, pulse: Pulse, runner: Runner, cache_salt_above: int
    ):
        """`runner`: the engine's own, for its numbers. `cache_salt_above`: prompts longer than this are computed
        differently by their length (dynamic rope); 0: none are.
        """
        self.engine, self.intake, self.followers, self.pulse, self.runner = engine, intake, followers, pulse, runner
        self.cache_salt_above = cache_salt_above
        self._owners: dict[str, Connection] = {}

    def run(self) -> None:
        next_tick = 0.0
        while True:
            for message in self.intake.poll(0 if self.engine.has_work else TICK_SECONDS):
                self._take(message)
            now = time.monotonic()
            if self.engine.has_work:
                self._emit(self.engine.step(), time.monotonic() - now)
                self.pulse.step(self.engine.num_steps, self.runner.group.waited)
            elif now >= next_tick:
                next_tick = now + TICK_SECONDS
                self.followers.tick()
                self._emit([], 0.0)
            self.pulse.open = len(self._owners)
            self.pulse.touch()

    def _take(self, message: Message) -> None:
        if message.kind == Kind.SUBMIT:
            self._submit(message.connection, message.body)
        elif message.kind == Kind.ABORT:
            self._abort(str(message.body["id"]))
        elif message.kind is None:
            for request_id in [r for r, owner in self._owners.items() if owner is message.connection]:
                self._abort(request_id)
        else:
            raise CommunicationError(f"{message.kind.name} on the request socket")

    def _submit(self, connection: Connection, body: dict[str, Any]) -> None:
        params = SamplingParams.from_json(body["params"])
        request = Request(str(body["id"]), list(body["prompt"]), params, list(body["output"]))
        if 0 < self.cache_salt_above < request.num_prompt:
            request.cache_salt = request.num_prompt.to_bytes(8, "little")
        self._owners[request.id] = connection
        ended = self.engine.add(request)
        if ended:
            self._emit([ended], 0.0)

    def _abort(self, request_id: str) -> None:
        if self.engine.abort(request_id):
            self._owners.pop(request_id, None)

    def _emit(self, events: list[Event], step_seconds: float) -> None:
        """One frame to every client: its own events, and the numbers of the step (0 seconds: there was none)."""
        shares: dict[Connection, list[Any]] = {connection: [] for connection in self.intake.connections}
        for event in events:
            owner = self._owners.pop(event.request_id) if event.finish else self._owners[event.request_id]
            shares[owner].append(event.to_json())
        stats = self._stats(step_seconds)
        for connection, share in shares.items():
            self.intake.send(connection, Kind.EVENTS, {"events": share, "stats": stats})

    def _stats(self, step_seconds: float) -> dict[str, Any]:
        scheduler = self.engine.scheduler
        counters = scheduler.counters
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "kv_used": scheduler.blocks.num_used,
            "preemptions": counters.preemptions,
            "prefix_queries": counters.prefix_queries,
            "prefix_hits": counters.prefix_hits,
            "flops": self.runner.work.flops,
            "read_bytes": self.runner.work.read_bytes,
            "write_bytes": self.runner.work.write_bytes,
            "steps": self.engine.num_steps,
            "step_tokens": self.engine.last_step_tokens if step_seconds else 0,
            "step_seconds": step_seconds,
        }


def follow(runner: Runner, sock: socket.socket, pulse: Pulse, epoch: int) -> None:
    """A follower's loop. Raises CommunicationError when rank 0 is gone, or speaks of another epoch."""
    while True:
        try:
            kind, payload = receive(sock)
        except OSError as error:
            raise CommunicationError(f"lost rank 0: {error}") from error
        if pulse.phase != "serving":  # rank 0 has all connections and serves
            pulse.enter("serving")
        if kind == Kind.STEP:
            step = Step.from_bytes(payload)
            if step.epoch != epoch:
                raise CommunicationError(f"a step of epoch {step.epoch} reached epoch {epoch}")
            runner.follow(step)
            pulse.step(step.number, runner.group.waited)
        pulse.touch()
