"""One epoch of the gang on one rank: the resources that live from the rendezvous until a rank is lost."""

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
from rtp_llm.engine.forced_tokens import ForcedTokens
from rtp_llm.engine.grammar_compiler import GrammarCompiler
from rtp_llm.engine.kv_cache_manager import KVCacheManager
from rtp_llm.engine.loop import FollowerConnections, LeaderLoop, follower_loop
from rtp_llm.engine.memory_budget import MemoryBudget
from rtp_llm.engine.proposer import DraftProposer
from rtp_llm.engine.request_server import RequestServer
from rtp_llm.engine.scheduler import Scheduler
from rtp_llm.engine.scheduler_config import SchedulerConfig
from rtp_llm.engine.vocabulary import open_vocabulary
from rtp_llm.errors import CommunicationError
from rtp_llm.machine.memory import available_memory
from rtp_llm.parallel.gang_client import Assignment, GangClient
from rtp_llm.parallel.group import Communicator, Formation, init_group
from rtp_llm.parallel.mesh import Mesh
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import STEP_PORT_OFFSET
from rtp_llm.parallel.ports import gang_host, leader_host
from rtp_llm.parallel.step_connections import accept_ranks, connect_to_leader, join_leader
from rtp_llm.parallel.wire import listen
from rtp_llm.runner.model_runner import ModelRunner
from rtp_llm.runner.residency import Residency

log = logging.getLogger(__name__)

MEASURE_SECONDS = 0.05  # between measurements of the available memory, which take 0.1 ms
READY_SECONDS = 0.2  # in which the other processes of the part learn that the ranks serve
REPORT_SECONDS = 1.5  # until the heartbeats of all parts and the gang status have brought new measurements
MIN_RESERVE_BYTES = 128 << 20  # of the host, for the other processes of the part


class Epoch:
    """One epoch: the time from a rendezvous of all ranks until one of them is lost and a new communicator is formed.
    Holds the epoch's communicator, its sockets for steps and its main loop, and binds the mesh, with which layers
    sum over ranks, to the communicator.

    A context manager. If another thread calls `abort`, the thread in the context gets a CommunicationError from any
    call that waits. Leaving the context suppresses that error and frees all ports and connections.
    """

    def __init__(self, part_spec: PartSpec, assignment: Assignment, gang: GangClient, mesh: Mesh, device: torch.device):
        """`gang`: calls `abort` if the epoch ends while the context is active."""
        self.part_spec, self.assignment, self.number = part_spec, assignment, assignment.epoch
        self.gang, self.mesh, self.device = gang, mesh, device
        self._lock = threading.Lock()  # held while `abort` and `close` change the following fields
        self._sockets: list[socket.socket] = []
        self._abort_reason = ""
        self._is_closed = False
        self._formation = Formation()
        self._communicator: Communicator = self._formation

    def form(self) -> None:
        """Forms the communicator of all ranks. Collective: all ranks must call it. Raises CommunicationError."""
        self.gang.check_epoch()
        communicator = init_group(
            self.part_spec.plan,
            self.assignment.rank,
            f"{self.assignment.incarnation}-{self.number}",
            host=leader_host(self.part_spec.plan),
            address=self.assignment.address,
            timeout=self.part_spec.config.dist_comm_timeout,
            device=self.device,
            shm_prefix=self.part_spec.shm_prefix,
            formation=self._formation,
        )
        with self._lock:
            self._communicator = communicator
        self.mesh.tp.bind(communicator)
        self.gang.rank_status.is_in_collective = lambda: communicator.is_waiting
        self._check_aborted()

    def __enter__(self) -> "Epoch":
        self.gang.abort_epoch = self.abort
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is not None:
            # Closing a group regularly waits for the other ranks, which may not know of the error yet.
            self._communicator.abort(f"the epoch has ended: {error}")
        self.close()
        if not isinstance(error, CommunicationError):
            return False
        log.warning(
            "epoch %d (one communicator of the ranks) ends: %s; this rank keeps its weights and joins the next one",
            self.number,
            error,
        )
        if not self._abort_reason:
            self.gang.fail_epoch(str(error))
        return True

    def abort(self, reason: str) -> None:
        """Ends the epoch (the life of this communicator); any thread may call it. Interrupts a collective even if the
        other ranks do not respond. `reason` becomes part of the CommunicationError in the thread that runs the epoch.
        """
        with self._lock:
            if self._is_closed:
                return
            self._abort_reason = reason
            self._communicator.abort(reason)
            for sock in self._sockets:
                with suppress(OSError):  # the peer has closed it
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the communicator and the sockets for steps, and unbinds the mesh, which layers use for collectives,
        from the communicator. Call it in the thread that uses them.
        """
        with self._lock:
            self._is_closed = True
            self.mesh.tp.unbind()
            self._communicator.close()
            for sock in self._sockets:
                sock.close()

    def serve(self, residency: Residency) -> None:
        """Connects this rank with the others and computes steps with the weights and KV cache of `residency` until the
        epoch ends. Never returns normally: raises CommunicationError when a rank is lost, `abort` is called, or a step
        runs out of GPU memory.
        """
        try:
            residency.begin_epoch()
            self._serve(ModelRunner(residency))
        except torch.OutOfMemoryError as error:
            # The others wait in a collective of this step. They leave it when the coordinator ends the epoch.
            residency.halve_steps()
            raise CommunicationError(
                f"rank {self.assignment.rank} ran out of memory in a step: {error}; from now on a step computes at most"
                f" {residency.max_num_batched_tokens} tokens"
            ) from error
        finally:
            residency.end_epoch()

    def _serve(self, runner: ModelRunner) -> None:
        if self.assignment.rank == 0:
            self._lead(runner)
        else:
            sock = self._connect_to_leader()
            log.info("rank %d is connected to rank 0 and waits for steps", self.assignment.rank)
            follower_loop(runner, sock, self.gang.rank_status, self.number)

    def _lead(self, runner: ModelRunner) -> None:
        config, residency = self.part_spec.config, runner.residency
        followers = FollowerConnections(self._accept_followers(), config.dist_comm_timeout)
        request_server = RequestServer(
            self.part_spec.engine_sockets[self.mesh.dp.rank], asdict(self._engine_info(residency))
        )
        engine = Engine(
            make_scheduler(residency, ForcedTokens(), self._memory_budget(residency)),
            runner,
            residency.max_seq_len,
            self.number,
            EngineCallbacks(followers.broadcast, request_server.announce_launch),
            config.rtp_pipeline_depth,
            # Read after a delay, so that the first requests do not wait for it, but before the first grammar arrives,
            # since reading delays steps.
            GrammarCompiler(open_vocabulary(config, residency.spec.vocab_size, READY_SECONDS)),
        )
        self.gang.rank_status.set_phase("serving")
        rope = residency.spec.rope
        cache_salt_above = rope.original_max if rope.kind == "dynamic" else 0
        log.info(
            "serving in epoch %d (starts of the gang so far): prompt and output of a sequence may have up to %d tokens",
            self.number,
            residency.max_seq_len,
        )
        try:
            LeaderLoop(engine, request_server, followers, self.gang.rank_status, runner, cache_salt_above).run()
        finally:
            request_server.close()
            self._communicator.abort("the epoch has ended")  # or the engine might wait for a step that never ends
            engine.close()

    def _memory_budget(self, residency: Residency) -> MemoryBudget | None:
        """Returns the memory budget for the gang's machines, whose ranks all have the same blocks; None on a GPU."""
        plan, memory, gang = self.part_spec.plan, residency.kv_memory, self.gang
        num_ranks = plan.local_world_size
        assert memory, "allocate_kv_cache comes first"
        if residency.device.type != "cpu":
            return None
        reserve = min(MIN_RESERVE_BYTES + num_ranks * residency.step_bytes, available_memory() // 4)
        log.info(
            "memory: keeping at least %d MiB of each machine free; if less is free, fewer sequences run at a time",
            reserve >> 20,
        )
        return MemoryBudget(
            gang.available_bytes if plan.is_multi_part else available_memory,
            reserve,
            num_ranks * residency.layout.block_bytes,
            lambda: memory.num_populated,
            REPORT_SECONDS if plan.is_multi_part else MEASURE_SECONDS,
        )

    def _engine_info(self, residency: Residency) -> EngineInfo:
        return EngineInfo(
            epoch=self.number,
            max_seq_len=residency.max_seq_len,
            max_seq_len_reason=residency.max_seq_len_reason,
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
        with listen(gang_host(plan), plan.leader_port(STEP_PORT_OFFSET)) as listener:
            self._own(listener)
            peers = accept_ranks(listener, self.part_spec, self.assignment)
        self._own(*peers.values())
        return peers

    def _connect_to_leader(self) -> socket.socket:
        sock = connect_to_leader(self.part_spec, self._check_aborted)
        self._own(sock)
        join_leader(sock, self.part_spec, self.assignment)
        return sock

    def _own(self, *sockets: socket.socket) -> None:
        """Registers sockets to be closed with the epoch. Raises CommunicationError if the epoch was aborted before."""
        with self._lock:
            self._sockets += sockets
        self._check_aborted()

    def _check_aborted(self) -> None:
        if self._abort_reason:
            raise CommunicationError(f"the communicator was aborted: {self._abort_reason}")


def make_scheduler(
    residency: Residency, proposer: DraftProposer | None = None, memory_budget: MemoryBudget | None = None
) -> Scheduler:
    """Returns a scheduler for the KV cache of `residency` (this rank's weights and KV memory).

    `proposer`: generates draft tokens; None: no speculative decoding. `memory_budget`: limits the KV blocks that
    occupy memory on CPU; None: all blocks occupy memory from the start, as on a GPU.
    """
    config = residency.config
    pool = BlockPool(residency.num_blocks + 1, is_backed=memory_budget is None)
    manager = KVCacheManager(pool, residency.layout.groups, config.reuse_cache)
    limits = SchedulerConfig(
        max_num_batched_tokens=residency.max_num_batched_tokens,
        max_num_seqs=config.max_sequences,
        max_num_prefills=config.max_context_batch_size,
        itl_budget_seconds=config.itl_budget_ms / 1000,
        max_seq_len=residency.max_seq_len,
    )
    return Scheduler(manager, limits, proposer, memory_budget)
