"""One epoch of the gang on one rank: what lives from the rendezvous until a rank is lost."""

import logging
import socket
import threading
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType

import torch

from rtp_llm.contract.engine_info import EngineInfo
from rtp_llm.engine.block_pool import BlockPool
from rtp_llm.engine.engine import Engine, EngineCallbacks
from rtp_llm.engine.kv_cache_manager import KVCacheManager
from rtp_llm.engine.loop import FollowerConnections, LeaderLoop, follower_loop
from rtp_llm.engine.proposer import DraftProposer
from rtp_llm.engine.request_server import RequestServer
from rtp_llm.engine.scheduler import Scheduler, SchedulerConfig
from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.gang_client import GangClient, accept_ranks, leader_host, retry_connect
from rtp_llm.parallel.group import init_group
from rtp_llm.parallel.mesh import Mesh
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import STEP_PORT_OFFSET
from rtp_llm.parallel.wire import FrameType, connect, listen, pack_json
from rtp_llm.runner.model_runner import ModelRunner
from rtp_llm.runner.residency import Residency

log = logging.getLogger(__name__)


class Epoch:
    """Binds the mesh to the communicator of an epoch, and owns the step sockets and the loop.

    A context manager. If another thread calls `abort`, the thread in the context gets a CommunicationError from
    whatever it waits for; leaving the context swallows that error and frees all ports and connections.
    """

    def __init__(self, part_spec: PartSpec, number: int, gang: GangClient, mesh: Mesh, device: torch.device):
        """Forms the communicator. Collective: all ranks must call it. Raises CommunicationError."""
        self.part_spec, self.number, self.gang, self.mesh = part_spec, number, gang, mesh
        self._lock = threading.Lock()  # held while `abort` and `close` change the following fields
        self._sockets: list[socket.socket] = []
        self._is_aborted = self._is_closed = False
        self._communicator = init_group(
            part_spec.plan,
            gang.rank_status.rank,
            number,
            host=leader_host(part_spec.plan),
            address=gang.address,
            timeout=part_spec.config.dist_comm_timeout,
            device=device,
            shm_prefix=part_spec.shm_prefix,
        )
        mesh.tp.bind(self._communicator)

    def __enter__(self) -> "Epoch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is not None:
            # Closing a group regularly waits for the other ranks, which may not know of the error yet.
            self._communicator.abort(f"the epoch has ended: {error}")
        self.close()
        if self._is_aborted and isinstance(error, CommunicationError):
            log.warning("epoch %d has ended: %s", self.number, error)
            return True
        return False

    def abort(self, reason: str) -> None:
        """Ends the epoch from any thread, also in a collective whose other ranks are silent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_aborted = True
            self._communicator.abort(reason)
            for sock in self._sockets:
                with suppress(OSError):  # the peer has closed it
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the epoch from its own thread. The mesh is unbound."""
        with self._lock:
            self._is_closed = True
            self.mesh.tp.unbind()
            self._communicator.close()
            for sock in self._sockets:
                sock.close()

    def serve(self, residency: Residency) -> None:
        """Connects the ranks and runs their loops. Raises CommunicationError when the epoch ends."""
        runner = ModelRunner(residency)
        residency.populate_kv_memory()
        if self.gang.rank_status.rank == 0:
            self._lead(runner)
        else:
            sock = self._connect_to_leader()
            log.info("rank %d is connected to rank 0 and waits for steps", self.gang.rank_status.rank)
            follower_loop(runner, sock, self.gang.rank_status, self.number)

    def _lead(self, runner: ModelRunner) -> None:
        config, residency = self.part_spec.config, runner.residency
        followers = FollowerConnections(self._accept_followers(), config.dist_comm_timeout)
        request_server = RequestServer(
            self.part_spec.engine_sockets[self.mesh.dp.rank], asdict(self._engine_info(residency))
        )
        engine = Engine(
            make_scheduler(residency),
            runner,
            residency.max_seq_len,
            self.number,
            EngineCallbacks(followers.broadcast, request_server.announce_launch),
            config.rtp_pipeline_depth,
        )
        self.gang.rank_status.set_phase("serving")
        rope = residency.spec.rope
        cache_salt_above = rope.original_max if rope.kind == "dynamic" else 0
        log.info(
            "serving in epoch %d of the gang: prompt and output of a request may have %d tokens",
            self.number,
            residency.max_seq_len,
        )
        try:
            LeaderLoop(engine, request_server, followers, self.gang.rank_status, runner, cache_salt_above).run()
        finally:
            request_server.close()
            self._communicator.abort("the epoch has ended")  # or the engine might wait for a step that never ends
            engine.close()

    def _engine_info(self, residency: Residency) -> EngineInfo:
        return EngineInfo(
            epoch=self.number,
            max_seq_len=residency.max_seq_len,
            vocab_size=residency.spec.vocab_size,
            block_size=residency.layout.groups[0].block_size,
            num_blocks=residency.num_blocks,
            prefix_caching=residency.config.reuse_cache,
            family=residency.spec.family,
            dtype=residency.spec.dtype,
        )

    def _accept_followers(self) -> dict[int, socket.socket]:
        plan = self.part_spec.plan
        if plan.world_size == 1:
            return {}
        host = "0.0.0.0" if plan.is_multi_part else "127.0.0.1"
        with listen(host, plan.leader_port(STEP_PORT_OFFSET)) as listener:
            peers = accept_ranks(listener, plan, self.number, self.part_spec.config.dist_comm_timeout)
        self._own(*peers.values())
        return peers

    def _connect_to_leader(self) -> socket.socket:
        plan, timeout = self.part_spec.plan, self.part_spec.config.dist_comm_timeout
        host, port = leader_host(plan), plan.leader_port(STEP_PORT_OFFSET)
        sock = retry_connect(lambda: connect(host, port, timeout), f"{host}:{port}", timeout)
        self._own(sock)
        sock.sendall(pack_json(FrameType.JOIN, {"rank": self.gang.rank_status.rank, "epoch": self.number}))
        return sock

    def _own(self, *sockets: socket.socket) -> None:
        """Closes the sockets with the epoch. Raises CommunicationError if it was aborted before they were known."""
        with self._lock:
            self._sockets += sockets
        self._communicator.check_aborted()


def make_scheduler(residency: Residency, proposer: DraftProposer | None = None) -> Scheduler:
    """Returns a scheduler for the KV cache of a residency. `proposer`: of draft tokens."""
    config = residency.config
    manager = KVCacheManager(BlockPool(residency.num_blocks + 1), residency.layout.groups, config.reuse_cache)
    limits = SchedulerConfig(
        max_num_batched_tokens=residency.max_num_batched_tokens,
        max_num_seqs=config.max_sequences,
        max_num_prefills=config.max_context_batch_size,
        max_seq_len=residency.max_seq_len,
    )
    return Scheduler(manager, limits, proposer)
