"""The main loops of the ranks. The leader (rank 0) receives requests, runs steps and sends outputs; followers receive
and compute steps.
"""

import logging
import socket
import time
from typing import Any

from rtp_llm.contract.engine_events import EngineStats, pack_events
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

SNAPSHOT_INTERVAL_STEPS = 1000  # between comparisons of all sequences; the digest of a step covers its own only
STALL_SECONDS = 0.05  # between looks at the host's memory while no request can be computed without more of it
KEEPALIVE_INTERVAL_SECONDS = 0.5  # between keepalives that an idle rank 0 sends to followers and API process


class FollowerConnections:
    """Rank 0's connections to the other ranks."""

    def __init__(self, peers: dict[int, socket.socket], timeout: float):
        """`peers`: the connected socket of each other rank. `timeout`: seconds that one send may take."""
        self._peers = peers
        for sock in peers.values():
            sock.settimeout(timeout)

    def broadcast(self, step: Step) -> None:
        """Sends a step to all other ranks. Raises CommunicationError if one of them is lost."""
        self._send(pack_frame(FrameType.STEP, step.to_bytes()))

    def send_snapshot(self, snapshot: bytes) -> None:
        """Sends checksums of rank 0's batch, which all other ranks compare with theirs: see
        `InputBatch.check_snapshot`.
        """
        self._send(pack_frame(FrameType.SNAPSHOT, snapshot))

    def send_keepalive(self) -> None:
        """Sends a KEEPALIVE frame to all other ranks. Called while no step runs, so that a lost connection is noticed
        then, too. Raises CommunicationError if a rank is lost.
        """
        self._send(pack_frame(FrameType.KEEPALIVE))

    def _send(self, frame: bytes) -> None:
        for rank, sock in self._peers.items():
            try:
                sock.sendall(frame)
            except OSError as error:
                raise CommunicationError(f"lost rank {rank} while sending to it: {error}") from error


class LeaderLoop:
    """The main loop of rank 0, which schedules for all ranks. Receives requests between steps, and blocks for them only
    if the engine is idle.
    """

    def __init__(
        self,
        engine: Engine,
        request_server: RequestServer,
        followers: FollowerConnections,
        rank_status: RankStatus,
        runner: ModelRunner,
        cache_salt_above: int,
    ):
        """`runner`: the engine's runner, for the metrics.

        `cache_salt_above`: prompts of more tokens share cached blocks only with prompts of the same length, because
        dynamic rope scaling makes their attention keys depend on the prompt's length. 0: no such limit.
        """
        self.engine, self.request_server, self.followers = engine, request_server, followers
        self.rank_status, self.runner, self.cache_salt_above = rank_status, runner, cache_salt_above
        self._client_of_request: dict[str, ClientConnection] = {}

    def run(self) -> None:
        """Runs until another rank is lost or `Epoch.abort` is called, either of which raises CommunicationError."""
        next_keepalive = 0.0
        while True:
            idle_seconds = STALL_SECONDS if self.engine.has_work else KEEPALIVE_INTERVAL_SECONDS
            is_busy = self.engine.has_work and not self.engine.is_stalled
            for message in self.request_server.poll(0 if is_busy else idle_seconds):
                self._handle_message(message)
            self.rank_status.mark_progress()  # or a wait for requests would count as the longest step
            now = time.monotonic()
            self.runner.residency.mesh.tp.check_aborted()
            if self.engine.has_work or self.engine.is_stalled:  # then it looks whether there is more memory
                outputs = self.engine.step()
                self.runner.residency.mesh.tp.check_aborted()  # the outputs of an aborted step are arbitrary
                if self.engine.num_steps % SNAPSHOT_INTERVAL_STEPS == 0:
                    self.followers.send_snapshot(self.runner.input_batch.snapshot())
                self._send_outputs(outputs, time.monotonic() - now)
                if self.engine.last_step_tokens:
                    self.rank_status.record_step(self.engine.num_steps, self.runner.residency.mesh.tp.wait_seconds)
            if (self.engine.is_stalled or not self.engine.has_work) and now >= next_keepalive:
                next_keepalive = now + KEEPALIVE_INTERVAL_SECONDS
                self.followers.send_keepalive()
                self._send_outputs([], 0.0)
            self.rank_status.open = len(self._client_of_request)
            self.rank_status.record_stall(self.engine.is_stalled)

    def _handle_message(self, message: ClientMessage) -> None:
        """Handles a client's frame. Disconnects a client whose frame is invalid, since it is not an API process."""
        connection = message.connection
        if message.frame_type is None:
            self._abort_requests_of(connection)
        elif connection in self.request_server.connections:  # not dropped for an earlier frame
            try:
                self._handle_frame(connection, message.frame_type, message.body)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                self.request_server.disconnect(connection, f"not a request: {error!r}")
                self._abort_requests_of(connection)

    def _handle_frame(self, connection: ClientConnection, frame_type: FrameType, body: dict[str, Any]) -> None:
        if frame_type == FrameType.SUBMIT:
            self._submit(connection, body)
        elif frame_type == FrameType.ABORT:
            self._abort(str(body["id"]))
        else:
            raise ValueError(f"unexpected {frame_type.name} frame from an API process; allowed: SUBMIT, ABORT")

    def _abort_requests_of(self, connection: ClientConnection) -> None:
        for request_id in [r for r, client in self._client_of_request.items() if client is connection]:
            self._abort(request_id)

    def _submit(self, connection: ClientConnection, body: dict[str, Any]) -> None:
        params = SamplingParams.from_json(body["params"])
        request = Request(str(body["id"]), list(body["prompt"]), params, list(body["output"]))
        if 0 < self.cache_salt_above < request.num_prompt_tokens:
            request.extra_keys = (request.num_prompt_tokens.to_bytes(8, "little"),)
        self._client_of_request[request.id] = connection
        final_output = self.engine.add(request)
        if final_output:
            self._send_outputs([final_output], 0.0)

    def _abort(self, request_id: str) -> None:
        if self.engine.abort(request_id):
            self._client_of_request.pop(request_id, None)

    def _send_outputs(self, outputs: list[EngineOutput], step_seconds: float) -> None:
        """Sends each API connection an EVENTS frame: the outputs of its requests, and the statistics of the engine.

        `step_seconds`: duration of the step; 0 if no step was computed.
        """
        outputs_of_client: dict[ClientConnection, list[EngineOutput]] = {
            connection: [] for connection in self.request_server.connections
        }
        for output in outputs:
            client = (
                self._client_of_request.pop(output.request_id)
                if output.finish
                else self._client_of_request[output.request_id]
            )
            outputs_of_client[client].append(output)
        stats = self._stats(step_seconds)
        for client, client_outputs in outputs_of_client.items():
            self.request_server.send(client, pack_frame(FrameType.EVENTS, pack_events(client_outputs, stats)))

    def _stats(self, step_seconds: float) -> EngineStats:
        scheduler, cost = self.engine.scheduler, self.runner.cost
        return EngineStats(
            running=len(scheduler.running),
            waiting=self.engine.num_waiting,
            kv_used=scheduler.kv_cache_manager.pool.num_used,
            preemptions=scheduler.stats.preemptions,
            prefix_queries=scheduler.stats.prefix_queries,
            prefix_hits=scheduler.stats.prefix_hits,
            drafts=scheduler.stats.drafts,
            draft_tokens=scheduler.stats.draft_tokens,
            accepted_tokens=scheduler.stats.accepted_tokens,
            flops=cost.flops,
            read_bytes=cost.read_bytes,
            write_bytes=cost.write_bytes,
            steps=self.engine.num_steps,
            step_tokens=self.engine.last_step_tokens if step_seconds else 0,
            step_seconds=step_seconds,
        )


def follower_loop(runner: ModelRunner, sock: socket.socket, rank_status: RankStatus, epoch: int) -> None:
    """Main loop of every rank but rank 0: computes the steps that rank 0 sends.

    Raises CommunicationError if rank 0 is lost, if the step belongs to another epoch (rank 0 has formed a new
    communicator without this rank), or if the batch of rank 0 differs from this rank's.
    """
    while True:
        rank_status.is_waiting = True
        try:
            frame_type, payload = recv_frame(sock)
        except OSError as error:
            raise CommunicationError(f"lost rank 0 while waiting for a step: {error}") from error
        finally:
            rank_status.mark_progress()
            rank_status.is_waiting = False
        if rank_status.phase != "serving":  # rank 0 sends its first frame once all ranks are connected
            rank_status.set_phase("serving")
        if frame_type == FrameType.STEP:
            step = Step.from_bytes(payload)
            if step.epoch != epoch:
                raise CommunicationError(
                    f"rank 0 sent a step of epoch {step.epoch}, but this rank joined epoch {epoch} of the gang;"
                    " all ranks must begin the same epoch together"
                )
            inputs = runner.prepare(step)
            inputs.check_digest()
            runner.execute(inputs)
            rank_status.record_step(step.number, runner.residency.mesh.tp.wait_seconds)
        elif frame_type == FrameType.SNAPSHOT:
            runner.input_batch.check_snapshot(payload)
        rank_status.mark_progress()
