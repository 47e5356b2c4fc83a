"""Collectives of the tensor-parallel group.

No communication at TP=1, NCCL on GPUs, gloo on CPU. CPU ranks on one machine use shared memory instead of gloo for the
collectives of a step.
"""

import functools
import logging
import os
import secrets
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rtp_llm.errors import CommunicationError
from rtp_llm.machine.devices import interface_of
from rtp_llm.parallel.plan import TORCH_STORE_PORT_OFFSET, Plan
from rtp_llm.parallel.segment import create_segment, is_supported
from rtp_llm.parallel.shared_memory import ShmCommunicator
from rtp_llm.parallel.wire import listen

P = ParamSpec("P")
R = TypeVar("R")
log = logging.getLogger(__name__)


class Group(Protocol):
    """A process group of `size` ranks; this process is `rank`.

    All ranks must make the same calls in the same order. A call fails after a timeout.
    """

    rank: int
    size: int

    @property
    def wait_seconds(self) -> float | None:
        """Returns how many seconds this rank has waited for others in collectives of steps; None if not measured."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums the tensor over all ranks in place. Returns the same tensor."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Returns the tensors of all ranks in rank order on rank 0, None on the others. All shapes must be equal."""
        ...

    def min(self, value: int) -> int:
        """Returns the minimum of all ranks' values, on all ranks."""
        ...

    def close(self) -> None: ...


class SingleRankGroup:
    """The group of a single rank (TP=1): no communication."""

    rank, size = 0, 1
    wait_seconds: float | None = None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        return [tensor]

    def min(self, value: int) -> int:
        return value

    def close(self) -> None:
        pass


def _raises_communication_error(collective: Callable[P, R]) -> Callable[P, R]:
    """Converts torch's RuntimeError for a lost peer to CommunicationError, which has its own exit code."""

    @functools.wraps(collective)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return collective(*args, **kwargs)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # subclasses of RuntimeError that are not caused by a lost peer
        except RuntimeError as error:
            raise CommunicationError(f"collective {collective.__name__} failed: {error}") from error

    return call


class TorchGroup:
    """The default process group of torch.distributed, over NCCL or gloo."""

    wait_seconds: float | None = None  # not measured: NCCL waits on the device

    def __init__(self, rank: int, size: int, device: torch.device):
        self.rank, self.size, self.device = rank, size, device

    @_raises_communication_error
    def all_reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    @_raises_communication_error
    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        tensor = tensor.contiguous()  # NCCL accepts only contiguous inputs and outputs
        tensors = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(tensor, tensors, dst=0)
        return tensors

    @_raises_communication_error
    def min(self, value: int) -> int:
        tensor = torch.tensor([value], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor.item())

    def close(self) -> None:
        dist.destroy_process_group()


class SharedMemoryGroup(TorchGroup):
    """The group of CPU ranks on one machine: all-reduce and gather use shared memory, other collectives use gloo."""

    def __init__(self, rank: int, size: int, device: torch.device, communicator: ShmCommunicator):
        super().__init__(rank, size, device)
        self._communicator = communicator

    @property
    def wait_seconds(self) -> float | None:  # type: ignore[override]
        return self._communicator.wait_seconds

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._communicator.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        return self._communicator.gather(tensor)


def init_group(
    plan: Plan,
    rank: int,
    epoch: int,
    *,
    host: str,
    address: str,
    timeout: float,
    device: torch.device,
    shm_prefix: str = "",
) -> Group:
    """Returns the process group of all ranks. Every rank must call this.

    `epoch`: number of the gang's start. `host`: of part 0. `address`: of this machine, as other parts reach it.
    `timeout`: seconds for the initialization and for every collective. `shm_prefix`: of file names in /dev/shm; if it
    is empty, all collectives on CPU use gloo. Raises CommunicationError.
    """
    if plan.world_size == 1:
        return SingleRankGroup()
    _set_collective_interface(address)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store = _init_torch_group(plan, rank, epoch, host, timeout, backend, device)
        if shm_prefix and backend == "gloo" and not plan.is_multi_part and is_supported():
            communicator = _open_communicator(store, plan, rank, timeout, shm_prefix)
            return SharedMemoryGroup(rank, plan.world_size, device, communicator)
    except (RuntimeError, OSError) as error:
        port = plan.leader_port(TORCH_STORE_PORT_OFFSET)
        raise CommunicationError(f"{backend} group at {host}:{port} could not be formed: {error}") from error
    return TorchGroup(rank, plan.world_size, device)


def _init_torch_group(
    plan: Plan, rank: int, epoch: int, host: str, timeout: float, backend: str, device: torch.device
) -> dist.Store:
    """Initializes torch.distributed with a TCPStore on part 0. Returns the store.

    The store adds the epoch (number of the gang's start) to all keys.
    """
    duration = timedelta(seconds=timeout)
    port = plan.leader_port(TORCH_STORE_PORT_OFFSET)
    # TCPStore would listen on all interfaces. For a gang of one part, pass it a socket on loopback instead.
    fd = listen("0.0.0.0" if plan.is_multi_part else "127.0.0.1", port).detach() if rank == 0 else None
    tcp_store = dist.TCPStore(host, port, plan.world_size, is_master=rank == 0, timeout=duration, master_listen_fd=fd)
    store = dist.PrefixStore(f"epoch{epoch}", tcp_store)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=plan.world_size,
        timeout=duration,
        device_id=device if device.type == "cuda" else None,
    )
    return store


def _open_communicator(store: dist.Store, plan: Plan, rank: int, timeout: float, prefix: str) -> ShmCommunicator:
    """Returns the communicator of this rank, over a shared-memory segment that rank 0 creates.

    Deletes the file once all ranks have mapped it, so that a killed rank leaves no file in /dev/shm.
    """
    if rank != 0:
        communicator = ShmCommunicator(Path(store.get("segment").decode()), rank, plan.world_size, timeout)
        dist.barrier()
        return communicator
    path, lock_fd = create_segment(prefix, secrets.token_hex(4), plan.world_size)
    try:
        store.set("segment", str(path))
        communicator = ShmCommunicator(path, rank, plan.world_size, timeout)
        dist.barrier()
        path.unlink()
    finally:
        os.close(lock_fd)
    return communicator


def _set_collective_interface(address: str) -> None:
    """Sets the network interface of gloo and NCCL to the one with this address, unless the operator has set one.

    gloo resolves the host name by default, which /etc/hosts often maps to 127.0.1.1.
    """
    interface = interface_of(address)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": exact match; eth1 alone also matches eth10
    log.info("collectives use interface %s (%s)", os.environ.get("GLOO_SOCKET_IFNAME", "?"), address)
