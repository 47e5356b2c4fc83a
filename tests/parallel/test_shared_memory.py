"""Collectives over a shared memory segment, compared with plain sums. Ranks are threads, each with its own mapping of
the segment."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rtp_llm.errors import CommunicationError
from rtp_llm.native.library import select_kernels
from rtp_llm.parallel.segment import (
    DIRECTORY,
    SLOT_BYTES,
    create_segment,
    is_orphaned,
    is_supported,
    segment_bytes,
)
from rtp_llm.parallel.shared_memory import SharedMemoryGroup
from tests.kernel_levels import LEVELS
from tests.quick import slow_except

pytestmark = pytest.mark.skipif(not is_supported(), reason="needs the kernels, or x86's order of stores")

PREFIX = f"rtp-llm-test-{os.getpid()}-"


@pytest.fixture
def segment(request: pytest.FixtureRequest) -> Iterator[Path]:
    path, lock = create_segment(PREFIX, "a", request.param)
    yield path
    os.close(lock)
    path.unlink(missing_ok=True)


@pytest.fixture(params=[*LEVELS, "off"], autouse=True)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Selects the implementation of the collectives."""
    select_kernels(request.param)
    yield
    select_kernels("auto")


def run_ranks(path: Path, size: int, run: Callable[[SharedMemoryGroup], object], timeout: float = 30) -> list[object]:
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, SharedMemoryGroup(path, rank, size, timeout)) for rank in range(size)]
        return [future.result(timeout=60) for future in futures]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def tensor(rank: int, step: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(shape, generator=generator).to(dtype)


# Below and above the size from which each rank adds up a part, and more than a slot.
SHAPES = [(0,), (1,), (3, 5), (8191,), (16_385,), (33, 896), (SLOT_BYTES // 4,), (SLOT_BYTES // 2 + 7,)]


@pytest.mark.parametrize("segment", slow_except([2, 3, 4], 3), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_reduce_is_the_sum_and_bitwise_equal_on_all_ranks(
    segment: Path, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    size = request.node.callspec.params["segment"]

    def run(communicator: SharedMemoryGroup) -> list[Tensor]:
        return [
            communicator.all_reduce(tensor(communicator.rank, step, shape, dtype))
            for step, shape in enumerate(SHAPES * 3)
        ]

    results = run_ranks(segment, size, run)
    for step, shape in enumerate(SHAPES * 3):
        expected = sum((tensor(rank, step, shape, dtype).float() for rank in range(size)), torch.tensor(0.0))
        for result in results:
            assert torch.equal(result[step], expected.to(dtype))  # type: ignore[index, union-attr]


@pytest.mark.parametrize("segment", [3], indirect=True)
def test_gather_keeps_the_rank_order_between_reductions(segment: Path) -> None:
    def run(communicator: SharedMemoryGroup) -> list[list[Tensor] | None]:
        gathered = []
        for step in range(40):
            gathered.append(communicator.gather(tensor(communicator.rank, step, (4, 33), torch.float32)))
            if step % 3 == 0:
                communicator.all_reduce(torch.ones(7))
        return gathered

    leader, *followers = run_ranks(segment, 3, run)
    assert all(tensors is None for gathered in followers for tensors in gathered)  # type: ignore[attr-defined]
    for step, tensors in enumerate(leader):  # type: ignore[arg-type, var-annotated]
        for rank, result in enumerate(tensors):
            assert torch.equal(result, tensor(rank, step, (4, 33), torch.float32))


@pytest.mark.parametrize("segment", [3], indirect=True)
def test_all_ranks_get_the_leaders_tensor_and_the_minimum(segment: Path) -> None:
    def run(communicator: SharedMemoryGroup) -> list[tuple[Tensor, int]]:
        return [
            (communicator.broadcast(tensor(communicator.rank, step, shape, torch.float32)), communicator.min(value))
            for step, (shape, value) in enumerate(
                zip(SHAPES, (communicator.rank - step for step in range(99)), strict=False)
            )
        ]

    for results in run_ranks(segment, 3, run):
        for step, (shape, (received, minimum)) in enumerate(zip(SHAPES, results, strict=True)):  # type: ignore[call-overload]
            assert torch.equal(received, tensor(0, step, shape, torch.float32))
            assert minimum == -step


@pytest.mark.parametrize("segment", [2], indirect=True)
def test_bits_of_a_sum_do_not_depend_on_the_other_elements(segment: Path) -> None:
    def run(communicator: SharedMemoryGroup) -> bool:
        whole = tensor(communicator.rank, 0, (40, 896), torch.bfloat16)
        rows = [communicator.all_reduce(row.clone()) for row in whole]
        return torch.equal(communicator.all_reduce(whole), torch.stack(rows))

    assert run_ranks(segment, 2, run) == [True, True]


@pytest.mark.parametrize("segment", [2], indirect=True)
def test_aborting_ends_a_wait_which_is_seen_and_counted(segment: Path) -> None:
    communicator, other = (SharedMemoryGroup(segment, rank, 2, timeout=60) for rank in range(2))
    assert not communicator.is_waiting

    def abort() -> None:
        wait_until(lambda: communicator.is_waiting)
        time.sleep(0.05)
        other.all_reduce(torch.ones(1))
        wait_until(lambda: not communicator.is_waiting)
        wait_until(lambda: communicator.is_waiting)
        communicator.abort("a test")

    thread = threading.Thread(target=abort)
    thread.start()
    communicator.all_reduce(torch.ones(1))
    assert 0.02 < communicator.wait_seconds < 50
    time.sleep(0.05)
    with pytest.raises(CommunicationError, match="aborted: a test"):
        communicator.all_reduce(torch.ones(1))
    thread.join()


@pytest.mark.parametrize("segment", [2], indirect=True)
def test_missing_rank_is_named_after_the_timeout(segment: Path) -> None:
    with pytest.raises(CommunicationError, match=r"ranks \[1\] did not join a collective"):
        SharedMemoryGroup(segment, 0, 2, timeout=0.05).all_reduce(torch.ones(1))


def test_creating_a_segment_removes_stale_ones() -> None:
    stale, stale_lock = create_segment(PREFIX, "stale", 2)
    fresh, fresh_lock = create_segment(PREFIX, "fresh", 2)
    assert not stale.exists()
    assert fresh.stat().st_blocks * 512 >= fresh.stat().st_size == segment_bytes(2)
    for lock in (stale_lock, fresh_lock):
        os.close(lock)
    fresh.unlink()


def test_segment_is_orphaned_without_a_lock() -> None:
    path, lock = create_segment(PREFIX, "owned", 2)
    assert not is_orphaned(path)
    os.close(lock)
    assert is_orphaned(path)
    path.unlink()
    assert not is_orphaned(path), "a missing file is not orphaned"


def test_full_dev_shm_is_an_error_and_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CommunicationError, match="cannot reserve 4 MiB: No space left on device; enlarge /dev/shm"):
        create_segment(PREFIX, "b", 2)
    assert not list(DIRECTORY.glob(f"{PREFIX}*"))
