"""Sizes the KV cache from the measured free memory and logs the arithmetic."""

import logging
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rtp_llm.config import Config
from rtp_llm.errors import ConfigError
from rtp_llm.model.spec import ModelSpec

log = logging.getLogger(__name__)

MIB = 1 << 20
UNLIMITED_BYTES = 1 << 62


@dataclass(frozen=True)
class KVCacheConfig:
    """Size of the KV cache of one rank. A block includes the keys and values of all layers."""

    num_blocks: int
    bytes_per_block: int


def size_kv_cache(
    config: Config,
    spec: ModelSpec,
    *,
    local_kv_heads: int,
    block_size: int,
    max_seq_len: int,
    itemsize: int,
    device: torch.device,
    num_ranks_on_host: int,
) -> KVCacheConfig:
    """Returns the KV cache size that fits on this rank; the caller then takes the minimum over all ranks.

    local_kv_heads: KV heads on this rank. block_size, max_seq_len: tokens. itemsize: bytes of one element.
    num_ranks_on_host: ranks that share the memory of this machine (CPU only).
    Raises ConfigError if not even one block fits.
    """
    bytes_per_block = 2 * spec.num_layers * block_size * local_kv_heads * spec.head_dim * itemsize
    if config.test_block_num:
        return KVCacheConfig(config.test_block_num, bytes_per_block)
    if config.kv_cache_mem_mb > 0:
        budget_bytes, source = config.kv_cache_mem_mb * MIB, f"KV_CACHE_MEM_MB={config.kv_cache_mem_mb}"
    else:
        budget_bytes, source = _measure_budget(config, device, num_ranks_on_host)
    # Blocks of max_sequences sequences of max_seq_len tokens; more would never be used.
    max_useful_blocks = config.max_sequences * -(-max_seq_len // block_size)
    num_blocks = min(budget_bytes // bytes_per_block, max_useful_blocks)
    log.info(
        "KV cache: %s; a block is 2 (K, V) x %d layers x %d tokens x %d KV heads x head size %d x %d B = %.1f KiB;"
        " %d blocks fit, the running sequences use at most %d",
        source,
        spec.num_layers,
        block_size,
        local_kv_heads,
        spec.head_dim,
        itemsize,
        bytes_per_block / 1024,
        budget_bytes // bytes_per_block,
        max_useful_blocks,
    )
    if num_blocks < 1:
        raise ConfigError(
            f"not enough memory for the KV cache: {source} is less than one block of {bytes_per_block / MIB:.1f} MiB;"
            " raise KV_CACHE_MEM_MB if it is set; otherwise lower RESERVER_RUNTIME_MEM_MB, raise TP_SIZE or free memory"
        )
    return KVCacheConfig(int(num_blocks), bytes_per_block)


def _measure_budget(config: Config, device: torch.device, num_ranks_on_host: int) -> tuple[int, str]:
    """Returns the bytes available for the KV cache, and a text that shows how they were computed."""
    reserve = config.reserver_runtime_mem_mb * MIB
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # `free` excludes the peak memory of the warm-up step, which torch's caching allocator keeps for later steps.
        return max(0, free - reserve), f"{free / MIB:.0f} MiB free after warm-up - {reserve / MIB:.0f} reserved"
    # The default of RESERVER_RUNTIME_MEM_MB is meant for GPUs, so here the reserve is at most a quarter.
    available = min(psutil.virtual_memory().available, _cgroup_available_memory())
    reserve = min(reserve, available // num_ranks_on_host // 4)
    budget_bytes = (available // num_ranks_on_host - reserve) // 2
    source = f"(({available / MIB:.0f} MiB available) / {num_ranks_on_host} ranks - {reserve / MIB:.0f} reserved) / 2"
    return budget_bytes, source + f" = {budget_bytes / MIB:.0f} MiB"


def _cgroup_available_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes left below the cgroup v2 memory limit, or UNLIMITED_BYTES if there is none.

    Counts page cache (filled by reading the checkpoint) as available, because the kernel reclaims it on demand.
    """
    try:
        text = (root / "memory.max").read_text().strip()
        if text == "max":
            return UNLIMITED_BYTES
        usage = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except OSError:
        return UNLIMITED_BYTES
    reclaimable = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return max(0, int(text) - usage + reclaimable)
