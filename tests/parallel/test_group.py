"""Communicators of two real processes: collectives, an abort while the other rank is silent, and groups after that."""

import multiprocessing
import os
import threading
from multiprocessing.synchronize import Barrier, Event

import pytest
import torch

from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.group import Communicator, SingleRankGroup, TorchGroup, init_group
from rtp_llm.parallel.mesh import Mesh, MeshAxis
from rtp_llm.parallel.segment import is_supported
from rtp_llm.parallel.shared_memory import SharedMemoryGroup
from tests.model.rank import HOST, local_plan
from tests.ports import free_start_port

ABORTED_EPOCHS = 3
TIMEOUT_SECONDS = 400.0  # longer than the test may take: only an abort ends a collective
CLASSES = {"gloo": TorchGroup, "shm": SharedMemoryGroup}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_abort_releases_a_rank_whose_peer_is_silent(kind: str) -> None:
    if kind == "shm" and not is_supported():
        pytest.skip("needs the kernels, or x86's order of stores")
    spawn = multiprocessing.get_context("spawn")
    barrier, released = spawn.Barrier(2), spawn.Event()
    port = free_start_port()
    ranks = [spawn.Process(target=run_rank, args=(kind, rank, port, barrier, released)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def run_rank(kind: str, rank: int, port: int, barrier: Barrier, released: Event) -> None:
    """Forms a group, in which rank 1 is silent until rank 0 was released; then again, and at last one to the end."""
    torch.set_num_threads(1)
    num_descriptors = []
    for epoch in range(1, ABORTED_EPOCHS + 1):
        group = open_group(kind, rank, port, epoch)
        assert isinstance(group, CLASSES[kind])
        check_collectives(group)
        if rank == 0:
            threading.Timer(0.3, group.abort, ["rank 1 is silent"]).start()
            with pytest.raises(CommunicationError, match="aborted: rank 1 is silent"):
                group.all_reduce(torch.ones(8))
            released.set()
        else:
            assert released.wait(30), "rank 0 was not released"
            group.abort("rank 0 has gone")
        with pytest.raises(CommunicationError, match="aborted"):
            group.gather(torch.ones(8))
        with pytest.raises(CommunicationError, match="aborted"):
            group.check_aborted()
        barrier.wait(30)
        released.clear()
        group.close()
        del group
        num_descriptors.append(len(os.listdir("/proc/self/fd")))
        barrier.wait(30)
    group = open_group(kind, rank, port, ABORTED_EPOCHS + 1)
    check_collectives(group)
    group.close()
    assert num_descriptors[0] == num_descriptors[-1], "an epoch leaves open files"


def open_group(kind: str, rank: int, port: int, epoch: int) -> Communicator:
    prefix = f"rtp-test-{port}-" if kind == "shm" else ""
    cpu, plan = torch.device("cpu"), local_plan(2, port)
    return init_group(
        plan, rank, f"test-{epoch}", host=HOST, address=HOST, timeout=TIMEOUT_SECONDS, device=cpu, shm_prefix=prefix
    )


def check_collectives(group: Communicator) -> None:
    """Compares with plain sums, through a mesh."""
    tp = MeshAxis(group.rank, 2)
    tp.bind(group)
    mine, other = torch.arange(6.0) + 10 * tp.rank, torch.arange(6.0) + 10 * (1 - tp.rank)
    assert torch.equal(tp.all_reduce(mine.clone()), mine + other)
    gathered = tp.gather(mine.view(2, 3).T)  # not contiguous
    if tp.rank == 0:
        assert gathered is not None
        assert torch.equal(torch.stack(gathered), torch.stack([mine.view(2, 3).T, other.view(2, 3).T]))
    else:
        assert gathered is None
    assert tp.broadcast(mine).tolist() == [0, 1, 2, 3, 4, 5]
    assert tp.min(12345678901 + tp.rank) == 12345678901


def test_an_unbound_axis_has_no_peers() -> None:
    mesh = Mesh.of(local_plan(4, 20000), 3)
    assert [(axis.rank, axis.size) for axis in (mesh.tp, mesh.ep, mesh.pp, mesh.dp)] == [(3, 4), (0, 1), (0, 1), (0, 1)]
    with pytest.raises(CommunicationError, match="rank 3 of 4 has no communicator"):
        mesh.tp.all_reduce(torch.ones(1))
    assert mesh.dp.min(7) == 7
    single = MeshAxis()
    single.bind(SingleRankGroup())
    single.unbind()
    assert single.all_reduce(torch.ones(2)).tolist() == [1, 1]


class WaitingProcessGroup:
    """Its `abort` waits, like that of NCCL, until the last CUDA graph with a collective has been dropped."""

    def __init__(self) -> None:
        self.dropped, self.aborts = threading.Event(), 0

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def abort(self) -> None:
        self.aborts += 1
        assert self.dropped.wait(30)


def test_caller_of_abort_can_drop_what_the_abort_waits_for() -> None:
    process_group = WaitingProcessGroup()
    group = TorchGroup(process_group, torch.device("cpu"))
    group.abort("rank 1 is lost")
    group.abort("the epoch has ended")
    with pytest.raises(CommunicationError, match="aborted: rank 1 is lost"):
        group.check_aborted()
    process_group.dropped.set()
    group.close()
    assert process_group.aborts == 1
