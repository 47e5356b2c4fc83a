"""The number of KV blocks, with given measurements of the free memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rtp_llm.config import Config
from rtp_llm.errors import ConfigError
from rtp_llm.parallel.group import SingleRankGroup
from rtp_llm.runner import kv_cache_size
from rtp_llm.runner.kv_cache_size import plan_num_blocks, size_reason

MIB, GIB = 1 << 20, 1 << 30
BLOCK_SIZE = 16
SetAvailable = Callable[[int], None]


class GroupOfTwo(SingleRankGroup):
    """A group in which the values of the other rank are given."""

    def __init__(self, *others: int):
        super().__init__()
        self.others = list(others)

    def min(self, value: int) -> int:
        return min(value, self.others.pop(0))


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> SetAvailable:
    def set_available(num_bytes: int) -> None:
        monkeypatch.setattr(kv_cache_size, "available_memory", lambda: num_bytes)

    return set_available


def plan(group: SingleRankGroup | None = None, *, num_local_ranks: int = 1, workspace: int = 0, **settings: Any) -> int:
    max_seq_len = settings.pop("longest", 32768)
    return plan_num_blocks(
        Config.model_validate({"checkpoint_path": "/model", **settings}),
        group or SingleRankGroup(),
        block_bytes=MIB,
        blocks_per_sequence=lambda num_tokens: -(-num_tokens // BLOCK_SIZE),
        max_seq_len=max_seq_len,
        device=torch.device("cpu"),
        num_local_ranks=num_local_ranks,
        workspace_bytes=workspace,
    )


def test_the_default_on_cpu_holds_one_longest_and_otherwise_plausible_sequences(available: SetAvailable) -> None:
    available(1000 * GIB)
    assert plan(concurrency_limit=8) == 32768 // 16 + 7 * 4096 // 16
    assert plan(concurrency_limit=8, max_batch_size=2) == 32768 // 16 + 4096 // 16
    assert plan(concurrency_limit=1) == 32768 // 16
    assert plan(concurrency_limit=8, longest=1000) == 8 * 63


@pytest.mark.parametrize(
    ("free", "reserved", "expected"),
    [
        (8 * GIB, 1024, (8192 - 1024) // 2),
        (8 * GIB, 0, 4096),
        (2 * GIB, 1024, (2048 - 512) // 2),  # the reserve is at most a quarter
    ],
)
def test_the_default_on_cpu_leaves_half_of_the_memory(
    free: int, reserved: int, expected: int, available: SetAvailable
) -> None:
    available(free)
    assert plan(concurrency_limit=1000, reserver_runtime_mem_mb=reserved) == expected
    assert plan(concurrency_limit=1000, reserver_runtime_mem_mb=reserved, workspace=100 * MIB) == expected - 50
    available(3 * free)
    assert plan(concurrency_limit=1000, reserver_runtime_mem_mb=reserved, num_local_ranks=3) == expected


def test_all_ranks_continue_with_the_smallest_measurement(available: SetAvailable) -> None:
    available(8 * GIB)
    sizes = {"concurrency_limit": 1000, "reserver_runtime_mem_mb": 0}
    assert plan(GroupOfTwo(6 * GIB, 1 << 40), **sizes) == 3072
    assert plan(GroupOfTwo(9 * GIB, 1 << 40), **sizes) == 4096
    assert plan(GroupOfTwo(9 * GIB, 4000), **sizes) == 4000  # the other rank's blocks are larger


def test_kv_cache_mem_mb_is_neither_halved_nor_limited_to_plausible_sequences(available: SetAvailable) -> None:
    available(GIB)
    assert plan(kv_cache_mem_mb=5000) == 5000
    assert plan(kv_cache_mem_mb=1 << 30, concurrency_limit=3) == 3 * 32768 // 16


def test_test_block_num_is_taken_as_it_is(available: SetAvailable) -> None:
    available(0)
    assert plan(test_block_num=7) == 7


@pytest.mark.parametrize("settings", [{"reserver_runtime_mem_mb": 0}, {"workspace": GIB}])
def test_too_little_memory_is_refused(settings: dict[str, Any], available: SetAvailable) -> None:
    available(2 * MIB - 2)
    with pytest.raises(ConfigError, match=r"one block of 1\.0 MiB"):
        plan(**settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"test_block_num": 8, "kv_cache_mem_mb": 5}, "TEST_BLOCK_NUM=8"),
        ({"kv_cache_mem_mb": 5}, "KV_CACHE_MEM_MB=5"),
        ({"kv_cache_mem_mb": -1}, "the memory left for the KV cache"),
    ],
)
def test_names_the_setting_that_decides_on_the_size(
    settings: dict[str, Any], reason: str, available: SetAvailable
) -> None:
    """The first case also shows that TEST_BLOCK_NUM wins in the computation itself."""
    available(GIB)
    assert size_reason(Config.model_validate(settings)) == reason
    blocks = {"TEST_BLOCK_NUM=8": 8, "KV_CACHE_MEM_MB=5": 5}.get(reason)
    assert blocks is None or plan(**settings) == blocks
