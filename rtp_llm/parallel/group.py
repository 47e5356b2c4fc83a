"""Collectives of the tensor-parallel group behind one small interface.

Nothing at TP=1, NCCL on GPUs; on CPU gloo forms the group, and ranks of one machine then reduce through shared memory.
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
    """`size` ranks, this one is `rank`. Every call is made by all ranks in the same order, and fails after a
    deadline.
    """

    rank: int
    size: int

    @property
    def wait_seconds(self) -> float | None:
        """Seconds that this rank has waited for others in collectives of steps; None where it cannot be told."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns its argument."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """Rank 0 gets the tensors of all ranks (equal shapes) in order of rank, the others None."""
        ...

    def min(self, value: int) -> int:
        """The smallest of all ranks' values, on all ranks."""
        ...

    def close(self) -> None: ...


class SingleRankGroup:
    """TP=1: there is nobody to talk to."""

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
    """torch reports a lost peer as RuntimeError; here it is the end of the epoch, with its own exit code."""

    @functools.wraps(collective)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return collective(*args, **kwargs)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # RuntimeErrors as well, but nobody was lost
        except RuntimeError as error:
            raise CommunicationError(f"collective {collective.__name__} failed: {error}") from error

    return call


class TorchGroup:
    """torch.distributed over NCCL or gloo."""

    wait_seconds: float | None = None  # the device waits, not the process

    def __init__(self, rank: int, size: int, device: torch.device):
        self.rank, self.size, self.device = rank, size, device

    @_raises_communication_error
    def all_reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    @_raises_communication_error
    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(tensor.contiguous(), parts, dst=0)
        return parts

    @_raises_communication_error
    def min(self, value: int) -> int:
        tensor = torch.tensor([value], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor.item())

    def close(self) -> None:
        dist.destroy_process_group()


class SharedMemoryGroup(TorchGroup):
    """Ranks of one machine on CPU: gloo has formed the group, the steps go through shared memory."""

    def __init__(self, rank: int, size: int, device: torch.device, memory: ShmCommunicator):
        super().__init__(rank, size, device)
        self._memory = memory

    @property
    def wait_seconds(self) -> float | None:  # type: ignore[override]
        return self._memory.wait_seconds

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._memory.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        return self._memory.gather(tensor)


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
    """Forms the group of an epoch. `host`: where part 0 is reached; `address`: this machine as the others see it.

    `timeout` (seconds) bounds forming it and every collective. `shm_prefix`: how files in /dev/shm may be named; empty
    keeps gloo for everything. Raises CommunicationError.
    """
    if plan.world_size == 1:
        return SingleRankGroup()
    _choose_interface(address)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store = _init(plan, rank, epoch, host, timeout, backend, device)
        if shm_prefix and backend == "gloo" and not plan.is_multi_part and is_supported():
            return SharedMemoryGroup(
                rank, plan.world_size, device, _share_memory(store, plan, rank, timeout, shm_prefix)
            )
    except (RuntimeError, OSError) as error:
        port = plan.leader_port(TORCH_STORE_PORT_OFFSET)
        raise CommunicationError(f"{backend} group at {host}:{port} could not be formed: {error}") from error
    return TorchGroup(rank, plan.world_size, device)


def _init(
    plan: Plan, rank: int, epoch: int, host: str, timeout: float, backend: str, device: torch.device
) -> dist.Store:
    """torch.distributed's own rendezvous on part 0; every epoch has its own keys."""
    deadline = timedelta(seconds=timeout)
    port = plan.leader_port(TORCH_STORE_PORT_OFFSET)
    # The store would listen on all interfaces, for a single machine too: it gets a socket that does not.
    listener = listen("0.0.0.0" if plan.is_multi_part else "127.0.0.1", port).detach() if rank == 0 else None
    tcp = dist.TCPStore(host, port, plan.world_size, is_master=rank == 0, timeout=deadline, master_listen_fd=listener)
    store = dist.PrefixStore(f"epoch{epoch}", tcp)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=plan.world_size,
        timeout=deadline,
        device_id=device if device.type == "cuda" else None,
    )
    return store


def _share_memory(store: dist.Store, plan: Plan, rank: int, timeout: float, prefix: str) -> ShmCommunicator:
    """All ranks open the segment, then its name goes: whatever dies later, nothing stays behind in /dev/shm."""
    if rank != 0:
        memory = ShmCommunicator(Path(store.get("segment").decode()), rank, plan.world_size, timeout)
        dist.barrier()
        return memory
    path, lock = create_segment(prefix, secrets.token_hex(4), plan.world_size)
    try:
        store.set("segment", str(path))
        memory = ShmCommunicator(path, rank, plan.world_size, timeout)
        dist.barrier()
        path.unlink()
    finally:
        os.close(lock)
    return memory


def _choose_interface(address: str) -> None:
    """Both libraries would guess the interface from the host name, which /etc/hosts often maps to 127.0.1.1. The
    operator's own choice stands."""
    interface = interface_of(address)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without "=" eth1 would match eth10 too
    log.info("collectives use interface %s (%s)", os.environ.get("GLOO_SOCKET_IFNAME", "?"), address)
