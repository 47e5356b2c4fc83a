"""A worker's membership in the gang: gets a rank at the rendezvous, then sends heartbeats and is told of lost ranks.

The lifetime of a gang is divided into numbered epochs. The loss of any rank ends the epoch for all ranks. They leave it
and wait for the next one, in which they keep their ranks.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from rtp_llm.errors import CommunicationError, ExitCode, GangError
from rtp_llm.machine.memory import available_memory
from rtp_llm.machine.process import exit_process
from rtp_llm.parallel.coordinator_connection import (
    CONNECT_RETRY_SECONDS,
    REFUSED_RETRY_SECONDS,
    CoordinatorConnection,
    Heartbeats,
)
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.rank_status import RankStatus
from rtp_llm.parallel.rendezvous import KVCacheSize
from rtp_llm.parallel.wire import FrameType, WireError

log = logging.getLogger(__name__)

ABORT_TIMEOUT_SECONDS = 1.0  # NCCL's abort can hang on a faulty GPU
SPARE_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Assignment:
    """The rank of a worker in one epoch (the life of one communicator), and what it needs to connect to the other
    ranks.

    incarnation: random id of the coordinator process, since epochs count from 1 again if part 0 is recreated.
    address: the address under which other parts reach this machine.
    kv_cache: size of the KV cache that this rank must allocate, because other ranks have it in memory already; zeros if
        the ranks are still to determine it.
    """

    rank: int
    epoch: int
    incarnation: str
    address: str
    kv_cache: KVCacheSize


class GangClient:
    """A worker's connection to the coordinator, the process of part 0 that assigns ranks and notices lost ones."""

    def __init__(self, part_spec: PartSpec, index: int, rank_status: RankStatus):
        """`index`: number of this worker within the part."""
        self.part_spec, self.index, self.rank_status = part_spec, index, rank_status
        self.resident_rank: int | None = None  # whose weights this process has loaded
        self.kv_cache = KVCacheSize()  # that this process has allocated
        # Ends the collectives of the current epoch, given a reason; called from any thread.
        self.abort_epoch: Callable[[str], None] = lambda reason: None
        self._changed = threading.Condition()  # of the following fields
        self._assignment: Assignment | None = None
        self._wants_rank = False  # the main thread waits for an assignment
        self._is_leaving = False  # the epoch has ended, but the main thread is still in it
        self._rejection = ""
        self._gang_status: dict[str, Any] = {"ranks": {}, "in_epoch": False}
        self._connection: CoordinatorConnection | None = None
        self._disconnected_at = time.monotonic()
        self._heartbeats = Heartbeats(rank_status.to_json, rank_status.phase_changed, rank_status.mark_progress)

    def start(self) -> None:
        """Connects to the coordinator and asks for a rank."""
        self._wants_rank = True
        threading.Thread(target=self._stay_connected, name="gang", daemon=True).start()

    def wait_for_work(self) -> None:
        """Blocks until this process has a rank, or until all ranks serve without it: then it is the spare, which
        prepares to replace a lost one. Raises GangError if the coordinator rejects this part or is not reachable for
        GANG_TIMEOUT_MIN.
        """
        with self._changed:
            while not (self._assignment or self._serves()):
                self._check_rejection()
                self._changed.wait(SPARE_POLL_SECONDS)

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Tells the coordinator that this process imports torch and may miss heartbeats meanwhile."""
        self.rank_status.is_importing = True
        self._send(FrameType.HEARTBEAT, self.rank_status.to_json())
        yield
        self.rank_status.is_importing = False

    def epochs(self) -> Iterator[Assignment]:
        """Yields this process's assignment in each epoch, after waiting until all ranks have joined the rendezvous.
        Raises GangError if the coordinator rejects this part or is not reachable for GANG_TIMEOUT_MIN.

        An epoch is the time until a rank is lost. Before the caller asks for the next assignment, it must have closed
        the communicator of the last epoch. The caller keeps the loaded weights.
        """
        while True:
            yield self._wait_for_rank()
            self._leave_epoch()

    def fail_epoch(self, reason: str) -> None:
        """Tells the coordinator that this rank cannot continue. The coordinator then ends the epoch for all ranks and
        holds another rendezvous. With RTP_RECOVERY=restart, also ends this process.
        """
        epoch = self._assignment.epoch if self._assignment else 0
        self._send(FrameType.EPOCH_ENDED, {"epoch": epoch, "reason": reason})
        self._recover_by_restart(reason)

    def check_epoch(self) -> None:
        """Raises CommunicationError if the coordinator has ended the current epoch, because a rank is lost.

        The end of an epoch calls `abort_epoch`. This method also shows an end that came before the caller had set that
        attribute.
        """
        if self._is_leaving:
            raise CommunicationError(
                "the epoch has ended (a rank is lost) before this rank was connected to the others"
            )

    def wait_until_loaded(self) -> None:
        """Blocks until all ranks have loaded their weights. Raises CommunicationError if a rank is lost first.

        Without this wait, a rank with a fast disk would enter the first collective early and exceed its timeout there.
        The wait has no timeout, because the coordinator detects a rank that makes no progress.
        """
        while not self._all_loaded():
            self.check_epoch()
            self.rank_status.mark_progress()
            time.sleep(0.02)

    def _all_loaded(self) -> bool:
        status, assignment = self._gang_status, self._assignment
        phases = [rank["phase"] for rank in status["ranks"].values()]
        is_current = assignment is not None and status.get("epoch") == assignment.epoch
        loaded = sum(phase not in ("rendezvous", "loading") for phase in phases)
        return is_current and loaded >= self.part_spec.plan.world_size

    def available_bytes(self) -> int:
        """Returns the free memory in bytes of the gang's machine with the least, as its ranks last reported."""
        statuses = self._gang_status["ranks"].values()
        reports = [status["available_bytes"] for status in statuses if "available_bytes" in status]
        return min(reports, default=available_memory())

    # The main thread, between two epochs

    def _wait_for_rank(self) -> Assignment:
        with self._changed:
            while self._assignment is None:
                self._check_rejection()
                self._changed.wait(0.5)
            return self._assignment

    def _check_rejection(self) -> None:
        """Raises GangError if the coordinator has rejected this part, or was not reachable for too long."""
        minutes = self.part_spec.config.gang_timeout_min
        if not self._connection and time.monotonic() - self._disconnected_at > minutes * 60:
            part0 = self.part_spec.plan.describe_part(0)
            raise GangError(f"gave up after {minutes:g} minutes (GANG_TIMEOUT_MIN): missing {part0}")
        if self._rejection:
            raise GangError(self._rejection)

    def _leave_epoch(self) -> None:
        self.abort_epoch = lambda reason: None
        self.rank_status.set_phase("rendezvous")
        with self._changed:
            connection = self._connection  # of a later one, the thread that opens it says hello
            self._assignment, self._is_leaving, self._wants_rank = None, False, True
            self._changed.notify_all()
        if connection:
            self._say_hello(connection)

    def _say_hello(self, connection: CoordinatorConnection) -> None:
        with suppress(OSError):  # the thread that receives gets the same error
            connection.say_hello(
                "worker",
                index=self.index,
                pid=self.rank_status.pid,
                resident_rank=self.resident_rank,
                num_blocks=self.kv_cache.num_blocks,
                max_seq_len=self.kv_cache.max_seq_len,
            )

    def _send(self, frame_type: FrameType, message: dict[str, Any]) -> None:
        connection = self._connection
        with suppress(OSError):
            if connection:
                connection.send(frame_type, message)

    # The thread that receives

    def _stay_connected(self) -> None:
        while True:
            with self._changed:  # a rank that is still leaving an epoch has nothing to say
                self._changed.wait_for(lambda: self._wants_rank)
            try:
                connection = CoordinatorConnection(self.part_spec)
            except (OSError, ValueError):  # the guard of the part logs the reason
                time.sleep(CONNECT_RETRY_SECONDS)
                continue
            try:
                self._say_hello(connection)
                self._connection = self._heartbeats.connection = connection
                while True:
                    self._handle_frame(connection, *connection.receive())
            except (OSError, ValueError, KeyError) as error:
                reason = f"lost the coordinator on part 0: {error}"
            self._connection = self._heartbeats.connection = None
            self._disconnected_at = time.monotonic()
            connection.close()
            self._end_epoch(reason)
            time.sleep(CONNECT_RETRY_SECONDS if connection.is_accepted else REFUSED_RETRY_SECONDS)

    def _handle_frame(self, connection: CoordinatorConnection, frame_type: FrameType, message: dict[str, Any]) -> None:
        if frame_type == FrameType.GANG_STATUS:
            with self._changed:
                self._gang_status = message
                self._changed.notify_all()
        elif frame_type == FrameType.WELCOME:
            self._begin_epoch(connection, message)
        elif frame_type == FrameType.EPOCH_ENDED:
            if message["restart"] and self._assignment is None:
                self._exit_for_restart(str(message["reason"]))
            if self._assignment and message["epoch"] == self._assignment.epoch:
                self._end_epoch(str(message["reason"]), restart=bool(message["restart"]))
        elif frame_type == FrameType.REJECTED:
            with self._changed:
                self._rejection = str(message["message"])
                self._changed.notify_all()
        else:
            raise WireError(
                f"the coordinator sent an unexpected {frame_type.name} frame; do all parts run the same release?"
            )

    def _begin_epoch(self, connection: CoordinatorConnection, message: dict[str, Any]) -> None:
        rank, is_part0 = int(message["rank"]), self.part_spec.plan.part == 0
        address = str(message["part0_address"]) if is_part0 else connection.local_address
        kv_cache = KVCacheSize(int(message["num_blocks"]), int(message["max_seq_len"]))
        self.rank_status.begin_epoch(rank)
        with self._changed:
            self._wants_rank = self._is_leaving = False
            self._assignment = Assignment(rank, int(message["epoch"]), str(message["incarnation"]), address, kv_cache)
            self._changed.notify_all()

    def _end_epoch(self, reason: str, *, restart: bool = False) -> None:
        """Aborts the epoch, so that the main thread leaves it."""
        with self._changed:
            assignment = self._assignment
            if assignment is None or self._is_leaving:
                return
            self._is_leaving = True
        abort = threading.Thread(target=self.abort_epoch, args=(reason,), name="abort", daemon=True)
        abort.start()
        abort.join(ABORT_TIMEOUT_SECONDS)
        if restart:
            self._exit_for_restart(reason)
        self._recover_by_restart(reason)
        threading.Thread(target=self._watch_exit_from_epoch, args=(assignment,), daemon=True).start()

    def _exit_for_restart(self, reason: str) -> NoReturn:
        exit_process(f"{reason}; forming the gang again does not help", ExitCode.COMMUNICATION)

    def _recover_by_restart(self, reason: str) -> None:
        if self.part_spec.config.rtp_recovery == "restart":
            exit_process(reason, ExitCode.COMMUNICATION)

    def _watch_exit_from_epoch(self, assignment: Assignment) -> None:
        """Ends the process if its main thread does not leave an aborted epoch: an abort can fail on a GPU."""
        aborted_at = time.monotonic()  # before, the whole machine may have been frozen
        while True:
            time.sleep(0.5)
            if self._assignment is not assignment:
                return
            idle_seconds = min(self.rank_status.idle_seconds, time.monotonic() - aborted_at)
            if idle_seconds > self.part_spec.config.hang_seconds:
                exit_process(f"epoch {assignment.epoch} has ended, but this rank hangs in it", ExitCode.HANG)
            # Again: torch may have opened more connections since, while it forms a group.
            threading.Thread(target=self.abort_epoch, args=("the epoch has ended",), daemon=True).start()

    def _serves(self) -> bool:
        phases = [rank["phase"] for rank in self._gang_status["ranks"].values()]
        return bool(self._gang_status["in_epoch"]) and phases.count("serving") == self.part_spec.plan.world_size
