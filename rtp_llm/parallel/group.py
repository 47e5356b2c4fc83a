"""Communicators of the tensor-parallel group, one per epoch (from a rendezvous to the loss of a rank).

TP=1 needs no communication. GPUs use NCCL; CPU ranks use shared memory on one machine, gloo across machines.
"""

import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rtp_llm.errors import CommunicationError
from rtp_llm.machine.devices import interface_of
from rtp_llm.parallel.abort import AbortFlag
from rtp_llm.parallel.plan import TORCH_STORE_PORT_OFFSET, Plan
from rtp_llm.parallel.ports import gang_host
from rtp_llm.parallel.segment import create_segment, is_supported
from rtp_llm.parallel.shared_memory import SharedMemoryGroup
from rtp_llm.parallel.wire import connect, listen

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


class Group(Protocol):
    """The collectives of a process group of `size` ranks; this process is `rank`.

    All ranks must make the same calls in the same order. A call fails after a timeout.
    """

    rank: int
    size: int

    @property
    def wait_seconds(self) -> float | None:
        """Returns the seconds that this rank has waited for others in collectives of steps; None if not measured."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums the tensor over all ranks in place. Returns the same tensor."""

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Returns the tensors of all ranks in rank order on rank 0, None on the others. All shapes must be equal."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Copies rank 0's tensor into the tensors of the others, in place. Returns the same tensor."""

    def min(self, value: int) -> int:
        """Returns the minimum of all ranks' values, on all ranks."""

    def check_aborted(self) -> None:
        """Raises CommunicationError if another thread has aborted the group, because a rank is lost.

        On GPUs an aborted collective ends without an error, and its result is arbitrary. So call this before a rank
        sends the results of a step.
        """


class Communicator(Group, Protocol):
    """The process group of all ranks from one rendezvous to the loss of a rank (an epoch), with the connections between
    them.

    is_waiting: True while this rank calls a collective; on GPUs only for a moment, as it waits for the result later.
    """

    is_waiting: bool

    def abort(self, reason: str) -> None:
        """Makes the pending and all later collectives of this rank raise CommunicationError. Thread-safe."""

    def close(self) -> None:
        """Closes the connections, so that these processes can form a new group."""


class SingleRankGroup:
    """The group of a single rank (TP=1): no communication."""

    rank, size = 0, 1
    wait_seconds: float | None = None
    is_waiting = False

    def __init__(self) -> None:
        self._abort_flag = AbortFlag()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        return [tensor]

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor

    def min(self, value: int) -> int:
        return value

    def check_aborted(self) -> None:
        self._abort_flag.check()

    def abort(self, reason: str) -> None:
        self._abort_flag.set(reason)

    def close(self) -> None:
        pass


class Formation(SingleRankGroup):
    """Lets another thread abort `init_group`, while the ranks still wait for each other to form their communicator.

    torch waits for the peers in C++. Shutting down the sockets that it has opened is the only way to end these waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sockets_before = _socket_descriptors()

    def abort(self, reason: str) -> None:
        super().abort(reason)
        for sock in _connected_sockets(_socket_descriptors() - self._sockets_before):
            with suppress(OSError), sock:
                sock.shutdown(socket.SHUT_RDWR)


def _raises_communication_error(
    collective: Callable[Concatenate["TorchGroup", P], R],
) -> Callable[Concatenate["TorchGroup", P], R]:
    """Converts torch's RuntimeError for a lost peer to CommunicationError, which has its own exit code."""

    def call(self: "TorchGroup", /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.check_aborted()
        self.is_waiting = True
        try:
            return collective(self, *args, **kwargs)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # subclasses of RuntimeError that are not caused by a lost peer
        except RuntimeError as error:
            self.check_aborted()
            raise CommunicationError(f"collective {collective.__name__} failed: {_first_line(error)}") from error
        finally:
            self.is_waiting = False

    return call


def _first_line(error: Exception) -> str:
    """Returns the message without the C++ stack trace that torch appends."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class TorchGroup:
    """A process group of torch, over NCCL or gloo.

    It is not torch.distributed's default group, of which a process can have only one.
    """

    wait_seconds: float | None = None  # not measured: NCCL waits on the device

    def __init__(self, process_group: Any, device: torch.device, sockets: Sequence[socket.socket] = ()):
        """`process_group`: a ProcessGroupNCCL or ProcessGroupGloo; torch declares no types for their methods.

        `sockets`: connections to the peers, which `abort` shuts down; see `_connected_sockets`.
        """
        self.rank, self.size, self.device = process_group.rank(), process_group.size(), device
        self._process_group, self._sockets = process_group, sockets
        self.is_waiting = False
        self._abort_flag = AbortFlag()
        self._abort_thread = threading.Thread(target=self._abort_process_group, name="abort", daemon=True)
        self._abort_lock = threading.Lock()

    @_raises_communication_error
    def all_reduce(self, tensor: Tensor) -> Tensor:
        _wait(self._process_group.allreduce([tensor], _synchronous(dist.AllreduceOptions())))
        return tensor

    @_raises_communication_error
    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        tensor = tensor.contiguous()  # NCCL accepts only contiguous inputs and outputs
        outputs = [[torch.empty_like(tensor) for _ in range(self.size)]] if self.rank == 0 else []
        _wait(self._process_group.gather(outputs, [tensor], _synchronous(dist.GatherOptions())))
        return outputs[0] if outputs else None

    @_raises_communication_error
    def broadcast(self, tensor: Tensor) -> Tensor:
        _wait(self._process_group.broadcast([tensor], _synchronous(dist.BroadcastOptions())))
        return tensor

    @_raises_communication_error
    def min(self, value: int) -> int:
        tensor = torch.tensor([value], device=self.device)
        _wait(self._process_group.allreduce(tensor, dist.ReduceOp.MIN))
        result = int(tensor.item())
        self.check_aborted()  # or the number may be arbitrary
        return result

    def check_aborted(self) -> None:
        self._abort_flag.check()

    def abort(self, reason: str) -> None:
        self._abort_flag.set(reason)
        with self._abort_lock:
            if self._abort_thread.ident is None:
                self._abort_thread.start()
        for sock in self._sockets:
            with suppress(OSError):  # the peer has closed it
                sock.shutdown(socket.SHUT_RDWR)

    def _abort_process_group(self) -> None:
        """Ends the collectives of NCCL; those of gloo go on. NCCL then waits until the last CUDA graph with one of them
        is dropped, which the caller of `abort` may have to do: hence the thread.
        """
        try:
            self._process_group.abort()
        except RuntimeError as error:
            log.warning("NCCL did not abort its communicator: %s", _first_line(error))

    def close(self) -> None:
        if not self._abort_flag.reason:
            self._process_group.shutdown()
        elif self._abort_thread.ident is not None:
            self._abort_thread.join()
        for sock in self._sockets:
            sock.close()
        del self._process_group  # closes its connections, and the store on rank 0 frees its port


Options = TypeVar("Options", dist.AllreduceOptions, dist.GatherOptions, dist.BroadcastOptions)


def _synchronous(options: Options) -> Options:
    """Makes NCCL use the current stream, as the functions of torch.distributed do. Rank 0 is the default root."""
    options.asyncOp = False
    return options


def _wait(work: Any) -> None:
    """Waits for a collective. NCCL returns None for one that runs on the current stream."""
    if work is not None:
        work.wait()


def init_group(
    plan: Plan,
    rank: int,
    epoch: str,
    *,
    host: str,
    address: str,
    timeout: float,
    device: torch.device,
    shm_prefix: str = "",
    formation: Formation | None = None,
) -> Communicator:
    """Returns the communicator of all ranks. Every rank must call this, after closing its previous communicator.

    `epoch`: unique name of this communicator, equal on all ranks; prefix of keys in torch's TCPStore. `host`: address
    of part 0, where the store listens.
    `address`: this machine's address for other parts; collectives use the network interface that has it.
    `timeout`: seconds for the initialization and for every collective. `shm_prefix`: prefix of file names in /dev/shm;
    if empty, all collectives on CPU use gloo. `formation`: lets another thread abort this call. Raises
    CommunicationError.
    """
    formation = formation or Formation()
    if plan.world_size == 1:
        return SingleRankGroup()
    uses_shared_memory = bool(shm_prefix) and device.type == "cpu" and not plan.is_multi_part and is_supported()
    try:
        store = _open_store(plan, rank, epoch, host, timeout, formation)
        if uses_shared_memory:
            log.info("collectives use shared memory")
            return _open_shared_memory_group(store, plan, rank, timeout, shm_prefix)
        _set_collective_interface(address)
        return open_torch_group(store, rank, plan.world_size, timeout, device)
    except (RuntimeError, OSError) as error:
        formation.check_aborted()
        port = plan.leader_port(TORCH_STORE_PORT_OFFSET)
        kind = "shared-memory" if uses_shared_memory else "nccl" if device.type == "cuda" else "gloo"
        raise CommunicationError(
            f"the ranks could not form their {kind} process group (TCPStore at {host}:{port}): {_first_line(error)}"
        ) from error


def _open_store(plan: Plan, rank: int, epoch: str, host: str, timeout: float, formation: Formation) -> dist.Store:
    """Returns a TCPStore on part 0. It adds the epoch to all keys."""
    port = plan.leader_port(TORCH_STORE_PORT_OFFSET)
    # TCPStore would listen on all interfaces.
    fd = listen(gang_host(plan), port).detach() if rank == 0 else None
    if rank != 0:
        _wait_for_store(host, port, timeout, formation)
    tcp_store = dist.TCPStore(
        host,
        port,
        plan.world_size,
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,  # a wait that could not be aborted
        master_listen_fd=fd,
    )
    return dist.PrefixStore(f"epoch{epoch}", tcp_store)


def _wait_for_store(host: str, port: int, timeout: float, formation: Formation) -> None:
    """Waits until rank 0 listens: TCPStore would retry in C++, where it cannot be aborted."""
    deadline = time.monotonic() + timeout
    while True:
        formation.check_aborted()
        try:
            connect(host, port, min(timeout, 3.0)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def open_torch_group(store: dist.Store, rank: int, size: int, timeout: float, device: torch.device) -> TorchGroup:
    """Forms a process group with the other ranks, which find each other through `store`: over NCCL for a GPU, over gloo
    for a CPU. `timeout`: seconds per collective.
    """
    duration = timedelta(seconds=timeout)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = duration
        nccl = dist.ProcessGroupNCCL(store, rank, size, options)
        nccl.eager_connect_single_device(device)  # otherwise the first collective would connect
        return TorchGroup(nccl, device)
    others = _socket_descriptors()
    gloo = dist.ProcessGroupGloo(store, rank, size, duration)
    return TorchGroup(gloo, device, _connected_sockets(_socket_descriptors() - others))


def _socket_descriptors() -> set[int]:
    """Returns the file descriptors of this process that are sockets."""
    descriptors = set()
    for entry in os.scandir("/proc/self/fd"):
        with suppress(OSError):  # closed again, for example the one of this scan
            if stat.S_ISSOCK(entry.stat().st_mode):
                descriptors.add(int(entry.name))
    return descriptors


def _connected_sockets(descriptors: set[int]) -> list[socket.socket]:
    """Returns duplicates of those sockets that are connected. A duplicate stays valid if gloo closes its own."""
    duplicates = []
    for descriptor in descriptors:
        with suppress(OSError):  # of another thread, which has closed it
            duplicates.append(socket.socket(fileno=os.dup(descriptor)))
    connected = [sock for sock in duplicates if _is_connected(sock)]
    for sock in set(duplicates) - set(connected):
        sock.close()
    return connected


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _open_shared_memory_group(
    store: dist.Store, plan: Plan, rank: int, timeout: float, prefix: str
) -> SharedMemoryGroup:
    """Returns the group of this rank, over a shared-memory segment that rank 0 creates.

    Deletes the file once all ranks have mapped it, or if they do not, so that /dev/shm keeps no file.
    """
    if rank != 0:
        group = SharedMemoryGroup(Path(store.get("segment").decode()), rank, plan.world_size, timeout)
        store.set(f"opened{rank}", "")
        return group
    path, lock_fd = create_segment(prefix, secrets.token_hex(4), plan.world_size)
    try:
        store.set("segment", str(path))
        group = SharedMemoryGroup(path, rank, plan.world_size, timeout)
        store.wait([f"opened{other}" for other in range(1, plan.world_size)])
    finally:
        path.unlink(missing_ok=True)
        os.close(lock_fd)
    return group


def _set_collective_interface(address: str) -> None:
    """Sets the network interface of gloo and NCCL to the one with this address, unless the operator has set one.

    gloo resolves the host name by default, which /etc/hosts often maps to 127.0.1.1.
    """
    interface = interface_of(address)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": exact match; eth1 alone also matches eth10
    log.info("collectives use network interface %s with address %s", os.environ.get("GLOO_SOCKET_IFNAME", "?"), address)
