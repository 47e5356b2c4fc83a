"""Decides how many blocks the KV cache has, from the measured free memory, and logs the calculation."""

import logging
from collections.abc import Callable

import torch

from rtp_llm.config import Config
from rtp_llm.errors import ConfigError
from rtp_llm.machine.memory import available_memory
from rtp_llm.parallel.group import Group

log = logging.getLogger(__name__)

MIB = 1 << 20
# On CPU, where weights, page cache and other programs share the memory, the cache is sized for CONCURRENCY_LIMIT
# sequences of this length, one of which may be longer. A server with longer ones sets KV_CACHE_MEM_MB.
PLAUSIBLE_SEQ_LEN = 4096


def plan_num_blocks(
    config: Config,
    group: Group,
    *,
    block_bytes: int,
    blocks_per_sequence: Callable[[int], int],
    max_seq_len: int,
    device: torch.device,
    num_local_ranks: int,
    workspace_bytes: int = 0,
) -> int:
    """Returns the number of KV blocks, equal on all ranks: as many as fit on each rank, but no more than can be used.

    Collective: all ranks must call it, after all have loaded their weights and before any allocates its KV cache.

    block_bytes: size of one block on this rank. blocks_per_sequence: function that returns the maximum number of blocks
        of a sequence with the given number of tokens.
    num_local_ranks: ranks that share the memory of this machine (CPU only).
    workspace_bytes: upper bound of the memory that attention allocates in a step, and that is kept free for it: the
        warm-up step does not show it, because its sequence is short.

    Raises ConfigError if not even one block fits.
    """
    # One measurement for all: every rank continues with the smallest.
    free = group.min(_free_memory(device, num_local_ranks))
    if config.test_block_num:
        return config.test_block_num
    longest = blocks_per_sequence(max_seq_len)
    if config.kv_cache_mem_mb > 0:
        budget, source = config.kv_cache_mem_mb * MIB, f"KV_CACHE_MEM_MB={config.kv_cache_mem_mb}"
        useful = config.max_sequences * longest
        if min(budget, useful * block_bytes) > free:
            log.warning(
                "%s exceeds the %d MiB that each rank has free: the server may run out of memory;"
                " lower KV_CACHE_MEM_MB or free memory",
                source,
                free // MIB,
            )
    elif device.type == "cuda":
        reserve = config.reserver_runtime_mem_mb * MIB + workspace_bytes
        # `free` excludes the peak memory of the warm-up step, which torch's caching allocator keeps for later steps.
        budget, source = free - reserve, f"{free / MIB:.0f} MiB free after warm-up - {reserve / MIB:.0f} reserved"
        useful = config.max_sequences * longest
    else:
        # The default of RESERVER_RUNTIME_MEM_MB is meant for GPUs, so here the reserve is at most a quarter.
        reserve = min(config.reserver_runtime_mem_mb * MIB, free // 4) + workspace_bytes
        budget = (free - reserve) // 2
        source = (
            f"({free / MIB:.0f} MiB available per rank - {reserve / MIB:.0f} reserved) / 2 = {budget / MIB:.0f} MiB"
        )
        plausible = blocks_per_sequence(min(max_seq_len, PLAUSIBLE_SEQ_LEN))
        useful = longest + (config.max_sequences - 1) * plausible
    log.info(
        "KV cache of this rank: %s; a block takes %.1f KiB: %d blocks fit, and %d running sequences, the maximum, need"
        " at most %d",
        source,
        block_bytes / 1024,
        max(0, budget // block_bytes),
        config.max_sequences,
        useful,
    )
    if budget < block_bytes:
        raise ConfigError(
            f"not enough memory for the KV cache: {source} is less than one block of {block_bytes / MIB:.1f} MiB per"
            " rank; raise KV_CACHE_MEM_MB if it is set; otherwise lower RESERVER_RUNTIME_MEM_MB, raise TP_SIZE or free"
            " memory"
        )
    return group.min(min(budget // block_bytes, useful))


def size_reason(config: Config) -> str:
    """Returns what limits the number of KV blocks: a setting with its value, or the memory."""
    if config.test_block_num:
        return f"TEST_BLOCK_NUM={config.test_block_num}"
    if config.kv_cache_mem_mb > 0:
        return f"KV_CACHE_MEM_MB={config.kv_cache_mem_mb}"
    return "the memory left for the KV cache"


def _free_memory(device: torch.device, num_local_ranks: int) -> int:
    """Returns the bytes that this rank may use: the GPU's free memory, or its share of the machine's on CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory() // num_local_ranks
