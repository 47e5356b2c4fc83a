"""How many KV blocks fit, from measured memory, with the arithmetic in the log so that nobody has to guess."""

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
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class KVCacheConfig:
    """What one rank can hold."""

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
    """This rank's own count; the gang then takes the smallest. `sharers`: ranks that share this machine's memory.

    Raises ConfigError where not even one block fits.
    """
    per_block = 2 * spec.num_layers * block_size * local_kv_heads * spec.head_dim * itemsize
    if config.test_block_num:
        return KVCacheConfig(config.test_block_num, per_block)
    if config.kv_cache_mem_mb > 0:
        budget, how = config.kv_cache_mem_mb * MIB, f"KV_CACHE_MEM_MB={config.kv_cache_mem_mb}"
    else:
        budget, how = _measured_memory(config, device, num_ranks_on_host)
    # More than every sequence at full length is never used.
    max_useful_blocks = config.max_sequences * -(-max_seq_len // block_size)
    blocks = min(budget // per_block, max_useful_blocks)
    log.info(
        "KV cache: %s; 2 x %d layers x %d tokens x %d heads x %d x %d B = %.1f KiB a block; %d fit, %d are useful",
        how,
        spec.num_layers,
        block_size,
        local_kv_heads,
        spec.head_dim,
        itemsize,
        per_block / 1024,
        budget // per_block,
        max_useful_blocks,
    )
    if blocks < 1:
        raise ConfigError(
            f"no memory for a KV cache: {how} is less than one block of {per_block / MIB:.1f} MiB;"
            " lower RESERVER_RUNTIME_MEM_MB, raise TP_SIZE, or free memory"
        )
    return KVCacheConfig(int(blocks), per_block)


def _measured_memory(config: Config, device: torch.device, num_ranks_on_host: int) -> tuple[int, str]:
    reserve = config.reserver_runtime_mem_mb * MIB
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # The warm-up's peak is not free any more: the allocator keeps it for the steps to come.
        return max(0, free - reserve), f"{free / MIB:.0f} MiB free after warm-up - {reserve / MIB:.0f} reserved"
    # A small machine cannot spare what a GPU can.
    available = min(psutil.virtual_memory().available, _cgroup_available_memory())
    reserve = min(reserve, available // num_ranks_on_host // 4)
    budget = (available // num_ranks_on_host - reserve) // 2
    how = f"(({available / MIB:.0f} MiB available) / {num_ranks_on_host} ranks - {reserve / MIB:.0f} reserved) / 2"
    return budget, how + f" = {budget / MIB:.0f} MiB"


def _cgroup_available_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes left below the cgroup v2 memory limit; unlimited where there is none.

    The page cache counts as usage, and reading a checkpoint fills it, but the kernel gives it up when asked for memory.
    """
    try:
        text = (root / "memory.max").read_text().strip()
        if text == "max":
            return UNLIMITED
        usage = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except OSError:
        return UNLIMITED
    reclaimable = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return max(0, int(text) - usage + reclaimable)
