"""Shared-memory collectives against plain sums. Ranks are threads here, each with its own mapping of the segment."""

import errno
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rtp_llm.errors import CommunicationError
from rtp_llm.parallel.segment import DIRECTORY, SLOT_BYTES, create_segment, is_orphaned, segment_bytes
from rtp_llm.parallel.shared_memory import ShmCommunicator

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86's order of stores")

PREFIX = f"rtp-llm-test-{os.getpid()}-"


@pytest.fixture
def segment(request: pytest.FixtureRequest) -> Iterator[Path]:
    path, lock = create_segment(PREFIX, "a", request.param)
    yield path
    os.close(lock)
    path.unlink(missing_ok=True)


def on_all_ranks(path: Path, size: int, work: Callable[[ShmCommunicator], object], timeout: float = 30) -> list[object]:
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, ShmCommunicator(path, rank, size, timeout)) for rank in range(size)]
        return [future.result(timeout=60) for future in futures]


def tensor(rank: int, turn: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    return torch.randn(shape, generator=generator).to(dtype)


SHAPES = [(1,), (3, 5), (SLOT_BYTES // 4,), (SLOT_BYTES // 2 + 7,)]


@pytest.mark.parametrize("segment", [2, 3], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_reduce_is_the_sum_and_the_same_bits_everywhere(
    segment: Path, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    size = request.node.callspec.params["segment"]

    def work(memory: ShmCommunicator) -> list[Tensor]:
        return [memory.all_reduce(tensor(memory.rank, turn, shape, dtype)) for turn, shape in enumerate(SHAPES * 5)]

    results = on_all_ranks(segment, size, work)
    for turn, shape in enumerate(SHAPES * 5):
        expected = sum(tensor(rank, turn, shape, dtype).float() for rank in range(size))
        for result in results:
            assert torch.equal(result[turn], expected.to(dtype))  # type: ignore[index, union-attr]


@pytest.mark.parametrize("segment", [3], indirect=True)
def test_gather_keeps_the_order_of_ranks_between_reductions(segment: Path) -> None:
    def work(memory: ShmCommunicator) -> list[list[Tensor] | None]:
        gathered = []
        for turn in range(40):
            gathered.append(memory.gather(tensor(memory.rank, turn, (4, 33), torch.float32)))
            if turn % 3 == 0:
                memory.all_reduce(torch.ones(7))
        return gathered

    first, *others = on_all_ranks(segment, 3, work)
    assert all(part is None for other in others for part in other)  # type: ignore[attr-defined]
    for turn, parts in enumerate(first):  # type: ignore[arg-type, var-annotated]
        for rank, part in enumerate(parts):
            assert torch.equal(part, tensor(rank, turn, (4, 33), torch.float32))


@pytest.mark.parametrize("segment", [2], indirect=True)
def test_a_rank_that_does_not_come_is_named(segment: Path) -> None:
    with pytest.raises(CommunicationError, match=r"ranks \[1\] did not join a collective"):
        ShmCommunicator(segment, 0, 2, timeout=0.05).all_reduce(torch.ones(1))


def test_a_new_segment_sweeps_what_a_killed_epoch_left() -> None:
    stale, stale_lock = create_segment(PREFIX, "stale", 2)
    fresh, fresh_lock = create_segment(PREFIX, "fresh", 2)
    assert not stale.exists()
    assert fresh.stat().st_blocks * 512 >= fresh.stat().st_size == segment_bytes(2)
    for lock in (stale_lock, fresh_lock):
        os.close(lock)
    fresh.unlink()


def test_a_segment_has_an_owner_while_its_maker_holds_the_lock() -> None:
    path, lock = create_segment(PREFIX, "owned", 2)
    assert not is_orphaned(path)
    os.close(lock)
    assert is_orphaned(path)
    path.unlink()
    assert not is_orphaned(path), "what is not there belongs to nobody, and needs no removal"


def test_a_full_dev_shm_is_an_error_with_the_size_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CommunicationError, match="cannot reserve 4 MiB: No space left on device; enlarge /dev/shm"):
        create_segment(PREFIX, "b", 2)
    assert not list(DIRECTORY.glob(f"{PREFIX}*"))
