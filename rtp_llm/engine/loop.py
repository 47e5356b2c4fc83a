"""The loops of the ranks. Rank 0: take requests, step, send events. The others: receive a step, compute it."""

import logging
import socket
import time
from typing import Any

from rtp_llm.contract.engine_output import EngineOutput
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.contract.step import Step
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.request_server import ClientConnection, ClientMessage, RequestServer
from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.rank_status import RankStatus
from rtp_llm.parallel.wire import FrameType, pack_frame, recv_frame
from rtp_llm.runner.model_runner import ModelRunner

log = logging.getLogger(__name__)

KEEPALIVE_INTERVAL_SECONDS = 0.5  # an idle rank 0 still says so, to the other ranks and to the API


class FollowerConnections:
    """Rank 0's connections to the other ranks."""

    def __init__(self, peers: dict[int, socket.socket], timeout: float):
        self._peers = peers
        for sock in peers.values():
            sock.settimeout(timeout)

    def broadcast(self, step: Step) -> None:
        self._send(pack_frame(FrameType.STEP, step.to_bytes()))

    def send_keepalive(self) -> None:
        self._send(pack_frame(FrameType.KEEPALIVE))

    def _send(self, frame: bytes) -> None:
        for rank, sock in self._peers.items():
            try:
                sock.sendall(frame)
            except OSError as error:
                raise CommunicationError(f"lost rank {rank}: {error}") from error


class LeaderLoop:
    """Rank 0's loop: between two steps it takes what the API sent, and never waits while there is work."""

    def __init__(
        self,
        engine: Engine,
        request_server: RequestServer,
        followers: FollowerConnections,
        rank_status: RankStatus,
        runner: ModelRunner,
        cache_salt_above: int,
    ):
        """`runner`: the engine's own, for its numbers. `cache_salt_above`: prompts longer than this are computed
        differently by their length (dynamic rope); 0: none are.
        """
        self.engine, self.request_server, self.followers, self.rank_status, self.runner = (
            engine,
            request_server,
            followers,
            rank_status,
            runner,
        )
        self.cache_salt_above = cache_salt_above
        self._client_of_request: dict[str, ClientConnection] = {}

    def run(self) -> None:
        next_tick = 0.0
        while True:
            for message in self.request_server.poll(0 if self.engine.has_work else KEEPALIVE_INTERVAL_SECONDS):
                self._handle_message(message)
            now = time.monotonic()
            if self.engine.has_work:
                self._send_outputs(self.engine.step(), time.monotonic() - now)
                self.rank_status.record_step(self.engine.num_steps, self.runner.group.wait_seconds)
            elif now >= next_tick:
                next_tick = now + KEEPALIVE_INTERVAL_SECONDS
                self.followers.send_keepalive()
                self._send_outputs([], 0.0)
            self.rank_status.open = len(self._client_of_request)
            self.rank_status.mark_progress()

    def _handle_message(self, message: ClientMessage) -> None:
        if message.frame_type == FrameType.SUBMIT:
            self._submit(message.connection, message.body)
        elif message.frame_type == FrameType.ABORT:
            self._abort(str(message.body["id"]))
        elif message.frame_type is None:
            for request_id in [r for r, owner in self._client_of_request.items() if owner is message.connection]:
                self._abort(request_id)
        else:
            raise CommunicationError(f"{message.frame_type.name} on the request socket")

    def _submit(self, connection: ClientConnection, body: dict[str, Any]) -> None:
        params = SamplingParams.from_json(body["params"])
        request = Request(str(body["id"]), list(body["prompt"]), params, list(body["output"]))
        if 0 < self.cache_salt_above < request.num_prompt_tokens:
            request.cache_salt = request.num_prompt_tokens.to_bytes(8, "little")
        self._client_of_request[request.id] = connection
        ended = self.engine.add(request)
        if ended:
            self._send_outputs([ended], 0.0)

    def _abort(self, request_id: str) -> None:
        if self.engine.abort(request_id):
            self._client_of_request.pop(request_id, None)

    def _send_outputs(self, events: list[EngineOutput], step_seconds: float) -> None:
        """One frame to every client: its own events, and the numbers of the step (0 seconds: there was none)."""
        shares: dict[ClientConnection, list[Any]] = {connection: [] for connection in self.request_server.connections}
        for event in events:
            owner = (
                self._client_of_request.pop(event.request_id)
                if event.finish
                else self._client_of_request[event.request_id]
            )
            shares[owner].append(event.to_json())
        stats = self._stats(step_seconds)
        for connection, share in shares.items():
            self.request_server.send(connection, FrameType.EVENTS, {"events": share, "stats": stats})

    def _stats(self, step_seconds: float) -> dict[str, Any]:
        scheduler = self.engine.scheduler
        counters = scheduler.stats
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "kv_used": scheduler.blocks.num_used,
            "preemptions": counters.preemptions,
            "prefix_queries": counters.prefix_queries,
            "prefix_hits": counters.prefix_hits,
            "flops": self.runner.cost.flops,
            "read_bytes": self.runner.cost.read_bytes,
            "write_bytes": self.runner.cost.write_bytes,
            "steps": self.engine.num_steps,
            "step_tokens": self.engine.last_step_tokens if step_seconds else 0,
            "step_seconds": step_seconds,
        }


def follower_loop(runner: ModelRunner, sock: socket.socket, rank_status: RankStatus, epoch: int) -> None:
    """A follower's loop. Raises CommunicationError when rank 0 is gone, or speaks of another epoch."""
    while True:
        try:
            kind, payload = recv_frame(sock)
        except OSError as error:
            raise CommunicationError(f"lost rank 0: {error}") from error
        if rank_status.phase != "serving":  # rank 0 has all connections and serves
            rank_status.set_phase("serving")
        if kind == FrameType.STEP:
            step = Step.from_bytes(payload)
            if step.epoch != epoch:
                raise CommunicationError(f"a step of epoch {step.epoch} reached epoch {epoch}")
            runner.execute(step)
            rank_status.record_step(step.number, runner.group.wait_seconds)
        rank_status.mark_progress()
