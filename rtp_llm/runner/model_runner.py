"""Device work of one rank, the same code on all ranks: loads weights, allocates the KV cache, executes steps."""

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
    """Model, KV cache and process group of one rank.

    Call `load`, then `allocate_kv_cache`, then per step `execute_and_sample` on rank 0 and `execute` on the others.
    """

    def __init__(self, config: Config, spec: ModelSpec, group: Group, device: torch.device, max_seq_len: int):
        self.config, self.spec, self.group, self.device, self.max_seq_len = config, spec, group, device, max_seq_len
        self.dtype = DTYPES[spec.dtype]
        self.block_size = config.seq_size_per_block or DEFAULT_BLOCK_SIZE
        self.max_num_batched_tokens = config.max_batch_tokens_size or (8192 if device.type == "cuda" else 512)
        self.kv_caches: list[LayerKVCache] = []
        self.num_blocks = 0
        self.kv_bytes = 0
        self.cost = CostEstimate(spec, group.size)
        self.model = self._build_model()

    def _build_model(self) -> Decoder:
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return Decoder(self.spec, self.group, reference_attention).eval()
        finally:
            torch.set_default_dtype(default_dtype)

    def load(self, checkpoint: Checkpoint, on_progress: Callable[[float], None]) -> LoadStats:
        """Loads this rank's weights. Returns the bytes read and the time. Raises CheckpointError.

        `on_progress` is called with the fraction loaded, 0 … 1.
        """
        stats = load_weights(self.model, checkpoint, self.spec, on_progress)
        self.model.prepack()
        mb_per_second = stats.bytes / max(stats.seconds, 1e-6) / 1e6
        log.info("read %.1f MB of weights in %.2f s (%.0f MB/s)", stats.bytes / 1e6, stats.seconds, mb_per_second)
        return stats

    def allocate_kv_cache(self, num_ranks_on_host: int) -> None:
        """Runs a warm-up step if WARM_UP is set, then allocates as many KV blocks as fit on every rank.

        Collective: all ranks must call it. `num_ranks_on_host`: see `size_kv_cache`.

        Raises ConfigError if MAX_SEQ_LEN is set and one sequence of that length does not fit.
        """
        if self.config.warm_up:
            self._warm_up()
        kv_cache_config = self._size_kv_cache(num_ranks_on_host)
        self.num_blocks = self.group.min(kv_cache_config.num_blocks)
        self.kv_bytes = self.num_blocks * kv_cache_config.bytes_per_block
        self._allocate_kv_caches(self.num_blocks)
        num_tokens = self.num_blocks * self.block_size
        log.info(
            "KV cache: %d blocks = %d tokens, %.1f MiB on this rank", self.num_blocks, num_tokens, self.kv_bytes / 2**20
        )
        if self.config.max_seq_len and num_tokens < self.max_seq_len:
            raise ConfigError(
                f"MAX_SEQ_LEN={self.max_seq_len}: the KV cache holds {num_tokens} tokens; allowed: at most {num_tokens}"
            )
        self.max_seq_len = min(self.max_seq_len, num_tokens)

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

    def _allocate_kv_caches(self, num_blocks: int) -> None:
        shape = (num_blocks, self.block_size, self.model.local_kv_heads, self.spec.head_dim)
        self.kv_caches = [
            LayerKVCache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))
            for _ in range(self.spec.num_layers)
        ]

    def _warm_up(self) -> None:
        """Executes one step of maximum size on a temporary KV cache.

        The allocator then holds the peak memory of a step when the KV cache is sized, and errors appear at startup.
        """
        num_tokens = min(self.max_num_batched_tokens, self.max_seq_len)
        num_blocks = -(-num_tokens // self.block_size)
        self._allocate_kv_caches(num_blocks)
        positions = np.arange(num_tokens, dtype=np.int32)
        seq_lens = np.array([num_tokens], dtype=np.int32)
        step = Step(
            epoch=0,
            number=0,
            num_decodes=0,
            token_ids=np.zeros_like(positions),
            positions=positions,
            slot_mapping=positions,
            query_start_loc=np.array([0, num_tokens], dtype=np.int32),
            seq_lens=seq_lens,
            prompt_lens=seq_lens,
            block_tables=np.arange(num_blocks, dtype=np.int32)[None],
            logits_indices=positions[-self.config.max_sequences :],
        )
        self._forward(step)
        self.kv_caches = []

    @torch.inference_mode()
    def _forward(self, step: Step) -> Tensor | None:
        """Returns logits [len(step.logits_indices), vocab_size] float32 on rank 0.

        Returns None on the other ranks, and on rank 0 if the step needs no logits.
        """
        batch = ForwardBatch.from_step(step, self.device)
        hidden = self.model(batch, self.kv_caches)
        if not len(step.logits_indices):
            return None
        logits: Tensor | None = self.model.logits(hidden[batch.logits_indices])
        return logits

    def execute_and_sample(
        self, step: Step, sampling_metadata: SamplingMetadata
    ) -> tuple[list[SampledToken], list[Logprob]]:
        """Computes a step on rank 0 and samples its tokens. Returns the sampled tokens and the prompt logprobs."""
        logits = self._forward(step)
        self.cost.add(step)
        if logits is None:
            return [], []
        with torch.inference_mode():
            return sample(logits, sampling_metadata)

    def execute(self, step: Step) -> None:
        """Computes a step on a rank other than 0. A collective sends this rank's shard of the logits to rank 0."""
        self._forward(step)
