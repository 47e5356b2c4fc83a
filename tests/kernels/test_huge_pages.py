from pathlib import Path

import torch

from rtp_llm.kernels.huge_pages import ALIGNMENT, CHUNK_BYTES, HugePageArena


def _is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(end, 16) for first, end in ranges)


def test_tensors_are_aligned_and_apart() -> None:
    arena = HugePageArena()
    tensors = [arena.allocate(size) for size in (1, 4096, 5 << 20, CHUNK_BYTES + 1, 70_000)]
    for value, tensor in enumerate(tensors):
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert tensor.dtype == torch.uint8
        assert not tensor.any()
        tensor.fill_(value + 1)
    assert all((tensor == value + 1).all() for value, tensor in enumerate(tensors))


def test_small_tensors_share_a_mapping_beside_a_large_one() -> None:
    arena = HugePageArena()
    first, _, second = arena.allocate(4096), arena.allocate(CHUNK_BYTES), arena.allocate(4096)
    assert 0 < second.data_ptr() - first.data_ptr() < CHUNK_BYTES


def test_memory_is_returned_when_its_tensors_are_gone() -> None:
    arena = HugePageArena()
    first, second = arena.allocate(CHUNK_BYTES // 2), arena.allocate(CHUNK_BYTES // 2)  # two chunks
    addresses = first.data_ptr(), second.data_ptr()
    del first
    assert not _is_mapped(addresses[0])
    assert _is_mapped(addresses[1])
    del second, arena
    assert not _is_mapped(addresses[1])
