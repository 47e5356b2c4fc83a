"""The memory of the KV cache on CPU: which of its pages exist is read from the kernel (mincore)."""

import ctypes
import logging
import mmap
import resource
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rtp_llm.errors import ConfigError
from rtp_llm.runner import kv_memory
from rtp_llm.runner.kv_memory import KVMemory

CPU = torch.device("cpu")
PAGE = mmap.PAGESIZE
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "POPULATE_SHARE", 1.0)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[KVMemory]:
    """Memory of (num_blocks, block_bytes), closed at the end."""
    num_blocks, block_bytes = request.param
    kv = KVMemory(num_blocks, block_bytes, CPU)
    yield kv
    kv.close()


def resident(kv: KVMemory) -> NDArray[np.bool_]:
    """Returns for each page whether it exists."""
    pages = np.zeros(-(-kv.blocks.nbytes // PAGE), dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = ctypes.c_void_p(kv.blocks.data_ptr()), ctypes.c_size_t(kv.blocks.nbytes)
    assert libc.mincore(*arguments, pages.ctypes.data_as(ctypes.c_void_p)) == 0
    return (pages & 1).astype(bool)


def wait(kv: KVMemory) -> None:
    assert kv._thread
    kv._thread.join(30)
    assert not kv._thread.is_alive()


@pytest.mark.parametrize("memory", [(64, MIB)], indirect=True)
def test_reserving_creates_no_page(memory: KVMemory) -> None:
    assert memory.blocks.shape == (64, MIB)
    assert memory.blocks.dtype == torch.uint8
    assert not resident(memory).any()


@pytest.mark.parametrize("memory", [(64, MIB), (5000, 13_000), (3, 7 * MIB + 64)], indirect=True)
def test_populating_creates_all_pages_and_leaves_zeros(memory: KVMemory) -> None:
    memory.populate_in_background()
    memory.populate_in_background()  # a second call does nothing
    wait(memory)
    assert resident(memory).all()
    assert not memory.blocks.any()


@pytest.mark.parametrize("memory", [(4096, 64 << 10)], indirect=True)
def test_writes_beside_the_thread_are_kept(memory: KVMemory) -> None:
    """The writes go backwards through the same pages, so that they meet the thread."""
    words = memory.blocks.view(-1).view(torch.int64).view(-1, 512)
    memory.populate_in_background()
    for page in range(len(words) - 1, -1, -1):
        words[page, 0] = page + 1
    wait(memory)
    assert torch.equal(words[:, 0], torch.arange(1, len(words) + 1))


@pytest.mark.parametrize("memory", [(64, MIB)], indirect=True)
def test_populates_on_a_kernel_before_5_14(memory: KVMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "MADV_POPULATE_WRITE", 999)
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (min(soft, 64 << 10) if soft >= 0 else 64 << 10, hard))
    memory.blocks[7] = 5
    try:
        memory.populate_in_background()
        wait(memory)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    assert resident(memory).all()
    assert int(memory.blocks.sum()) == 5 * MIB


@pytest.mark.parametrize("memory", [(64, MIB)], indirect=True)
def test_a_kernel_that_can_neither_populate_nor_lock(
    memory: KVMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_memory, "MADV_POPULATE_WRITE", 999)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, 0))
    memory.populate_in_background()
    wait(memory)
    assert "cannot populate" in caplog.text
    assert not resident(memory).any()


@pytest.mark.parametrize("memory", [(256, MIB)], indirect=True)
def test_close_ends_the_thread(memory: KVMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "POPULATE_SHARE", 1e-6)
    memory.populate_in_background()
    memory.close()
    assert memory._thread
    assert not memory._thread.is_alive()
    assert not resident(memory).all()


@pytest.mark.parametrize("memory", [(512, MIB)], indirect=True)
def test_stops_when_memory_runs_short(
    memory: KVMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    available = iter([kv_memory.MIN_AVAILABLE_BYTES, kv_memory.MIN_AVAILABLE_BYTES - 1])
    monkeypatch.setattr(kv_memory, "available_memory", lambda: next(available))
    memory.populate_in_background()
    wait(memory)
    populated = int(resident(memory).sum()) * PAGE
    assert populated == kv_memory.CHECK_INTERVAL_BYTES
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert f"{populated >> 20} of 512 MiB" in caplog.text


@pytest.mark.parametrize("memory", [(64, 3 * PAGE // 2)], indirect=True)
def test_retired_blocks_return_their_whole_pages(memory: KVMemory) -> None:
    """Blocks of 1.5 pages: block 2k begins with page 3k, and shares page 3k + 1 with block 2k + 1."""
    memory.blocks.fill_(7)
    memory.retire(np.array([4]))
    assert np.flatnonzero(~resident(memory)).tolist() == [6]
    memory.retire(np.array([5, 9, 10]))
    assert np.flatnonzero(~resident(memory)).tolist() == [6, 7, 8, 14, 15]
    kept = [block for block in range(64) if block not in (4, 5, 9, 10)]
    assert bool((memory.blocks[kept] == 7).all())


@pytest.mark.parametrize("memory", [(64, PAGE)], indirect=True)
def test_a_reused_block_keeps_its_content_when_its_neighbours_are_retired(memory: KVMemory) -> None:
    memory.blocks.fill_(7)
    memory.retire(np.array([4, 5, 6]))
    memory.reuse(np.array([5]))
    memory.blocks[5] = 9
    memory.retire(np.array([3, 7]))
    assert bool((memory.blocks[5] == 9).all())
    assert np.flatnonzero(~resident(memory)).tolist() == [3, 4, 6, 7]


@pytest.mark.parametrize("memory", [(64, MIB)], indirect=True)
def test_retired_blocks_are_not_populated(memory: KVMemory) -> None:
    retired = [0, 1, 2, 17, 40, 41, 63]
    memory.retire(np.array(retired))
    memory.populate_in_background()
    wait(memory)
    per_block = resident(memory).reshape(64, -1)
    assert np.flatnonzero(~per_block.all(1)).tolist() == retired
    assert not per_block[retired].any()


def test_the_memory_is_freed_with_its_last_tensor() -> None:
    kv = KVMemory(256, MIB, CPU)
    kv.blocks.fill_(1)
    before = _resident_bytes()
    view = kv.blocks[3:5]
    del kv
    assert bool((view == 1).all())
    del view
    deadline = time.monotonic() + 10
    while before - _resident_bytes() < 200 * MIB:
        assert time.monotonic() < deadline


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def test_impossible_size_is_a_setting_error() -> None:
    with pytest.raises(ConfigError, match=r"MiB cannot be allocated.*KV_CACHE_MEM_MB"):
        KVMemory(1 << 30, 1 << 20, torch.device("cpu"))
