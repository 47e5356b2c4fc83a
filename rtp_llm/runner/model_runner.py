"""One rank's device work, the same code on all ranks: load, size the KV cache, and compute the steps that rank 0
decides.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rtp_llm.config import Config
from rtp_llm.contract.engine_output import Logprob
from rtp_llm.contract.sampling_metadata import SampledToken, SamplingMetadata
from rtp_llm.contract.step import Step
from rtp_llm.errors import ConfigError
from rtp_llm.kernels.batch import ForwardBatch, LayerKVCache
from rtp_llm.kernels.reference import reference_attention
from rtp_llm.layers.sampler import sample
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.decoder import Decoder
from rtp_llm.model.spec import ModelSpec
from rtp_llm.model.weights import LoadStats, load_weights
from rtp_llm.parallel.group import Group
from rtp_llm.runner.cost import CostEstimate
from rtp_llm.runner.kv_cache_size import KVCacheConfig, size_kv_cache

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_BLOCK_SIZE = 16  # tokens


class ModelRunner:
    """Model, KV cache and group of one rank. Use `load`, then `allocate`, then `run` on rank 0 and `follow` on the
    others.
    """

    def __init__(self, config: Config, spec: ModelSpec, group: Group, device: torch.device, max_seq_len: int):
        self.config, self.spec, self.group, self.device, self.max_seq_len = config, spec, group, device, max_seq_len
        self.dtype = DTYPES[spec.dtype]
        self.block_size = config.seq_size_per_block or DEFAULT_BLOCK_SIZE
        self.max_tokens = config.max_batch_tokens_size or (8192 if device.type == "cuda" else 512)
        self.caches: list[LayerKVCache] = []
        self.num_blocks = 0
        self.kv_bytes = 0
        self.cost = CostEstimate(spec, group.size)
        self.model = self._build()

    def _build(self) -> Decoder:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return Decoder(self.spec, self.group, reference_attention).eval()
        finally:
            torch.set_default_dtype(before)

    def load(self, checkpoint: Checkpoint, progress: Callable[[float], None]) -> LoadStats:
        """Reads this rank's weights. Raises CheckpointError."""
        report = load_weights(self.model, checkpoint, self.spec, progress)
        self.model.prepack()
        rate = report.bytes / max(report.seconds, 1e-6) / 1e6
        log.info("read %.1f MB of weights in %.2f s (%.0f MB/s)", report.bytes / 1e6, report.seconds, rate)
        return report

    def allocate_kv_cache(self, num_ranks_on_host: int) -> None:
        """Warms up, sizes the KV cache to the smallest rank's room, and allocates it. Collective: all ranks call it.

        Raises ConfigError where the cache cannot hold one sequence of MAX_SEQ_LEN, if that was asked for.
        """
        if self.config.warm_up:
            self._warm_up()
        plan = self._size_kv_cache(num_ranks_on_host)
        self.num_blocks = self.group.min(plan.num_blocks)
        self.kv_bytes = self.num_blocks * plan.bytes_per_block
        self._allocate(self.num_blocks)
        tokens = self.num_blocks * self.block_size
        log.info(
            "KV cache: %d blocks = %d tokens, %.1f MiB on this rank", self.num_blocks, tokens, self.kv_bytes / 2**20
        )
        if self.config.max_seq_len and tokens < self.max_seq_len:
            raise ConfigError(
                f"MAX_SEQ_LEN={self.max_seq_len}: the KV cache holds {tokens} tokens; allowed: at most {tokens}"
            )
        self.max_seq_len = min(self.max_seq_len, tokens)

    def _size_kv_cache(self, num_ranks_on_host: int) -> KVCacheConfig:
        return size_kv_cache(
            self.config,
            self.spec,
            local_kv_heads=self.model.local_kv_heads,
            block_size=self.block_size,
            max_seq_len=self.max_seq_len,
            itemsize=self.dtype.itemsize,
            device=self.device,
            num_ranks_on_host=num_ranks_on_host,
        )

    def _allocate(self, num_blocks: int) -> None:
        shape = (num_blocks, self.block_size, self.model.local_kv_heads, self.spec.head_dim)
        self.caches = [
            LayerKVCache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))
            for _ in range(self.spec.num_layers)
        ]

    def _warm_up(self) -> None:
        """Computes one step of the largest size on a throwaway cache: what fails then would fail the first user."""
        tokens = min(self.max_tokens, self.max_seq_len)
        blocks = -(-tokens // self.block_size)
        self._allocate(blocks)
        place = np.arange(tokens, dtype=np.int32)
        one = np.array([tokens], dtype=np.int32)
        tables = np.arange(blocks, dtype=np.int32)[None]
        ids, starts = np.zeros_like(place), np.array([0, tokens], dtype=np.int32)
        rows = place[-self.config.max_sequences :]
        self._forward(Step(0, 0, 0, ids, place, place, starts, one, one, tables, rows))
        self.caches = []

    @torch.inference_mode()
    def _forward(self, step: Step) -> Tensor | None:
        """Logits of the step's rows, [R, vocab] float32, on rank 0; None on the others, or where no row is wanted."""
        batch = ForwardBatch.from_step(step, self.device)
        hidden = self.model(batch, self.caches)
        if not len(step.logits_indices):
            return None
        logits: Tensor | None = self.model.logits(hidden[batch.logits_indices])
        return logits

    def execute_and_sample(self, step: Step, sampling: SamplingMetadata) -> tuple[list[SampledToken], list[Logprob]]:
        """Rank 0: computes the step and chooses tokens."""
        logits = self._forward(step)
        self.cost.add(step)
        if logits is None:
            return [], []
        with torch.inference_mode():
            return sample(logits, sampling)

    def execute(self, step: Step) -> None:
        """The other ranks: the same computation, whose logits go to rank 0."""
        self._forward(step)
