"""The memory that one rank keeps across epochs: its slices of the weights, and the KV cache."""

import logging
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rtp_llm.config import Config
from rtp_llm.contract.kv_cache import make_layout
from rtp_llm.errors import ConfigError, FatalError
from rtp_llm.kernels.attention_backends import select_backend
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.kv_cache import LayerKVCache, carve
from rtp_llm.machine.memory import available_memory
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.decoder import Decoder
from rtp_llm.model.forward_context import ForwardContext
from rtp_llm.model.kv_cache_specs import kv_cache_specs
from rtp_llm.model.spec import ModelSpec
from rtp_llm.model.weights import LoadStats, load_weights
from rtp_llm.native.library import library
from rtp_llm.parallel.mesh import Mesh
from rtp_llm.runner.cuda_graphs import MAX_DECODES, CudaGraphs
from rtp_llm.runner.kv_cache_size import plan_num_blocks, size_reason
from rtp_llm.runner.kv_memory import KVMemory
from rtp_llm.runner.recorded_steps import RecordedSteps

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_BLOCK_SIZE = 16  # tokens
MIN_LOGITS_ROWS = 64
CPU_WARM_UP_TOKENS = 16


class Residency:
    """Weights and KV cache of one tensor-parallel rank. They stay in memory when another rank is lost and the ranks
    form a new communicator (the next epoch).

    Call `load`, then `allocate_kv_cache`. The weights are slices for one (tp_rank, tp_size), so a gang with another TP
    size cannot use them.
    """

    def __init__(self, config: Config, spec: ModelSpec, mesh: Mesh, device: torch.device, max_seq_len: int):
        """`max_seq_len`: maximum tokens of a sequence by the settings; the KV cache may lower it."""
        self.config, self.spec, self.mesh, self.device, self.max_seq_len = config, spec, mesh, device, max_seq_len
        self.dtype = DTYPES[spec.dtype]
        self.layout = make_layout(
            kv_cache_specs(spec, mesh.tp.size, mesh.tp.rank), config.seq_size_per_block or DEFAULT_BLOCK_SIZE
        )
        self.max_num_batched_tokens = config.max_batch_tokens_size or (8192 if device.type == "cuda" else 512)
        self.max_logits_rows = max(MIN_LOGITS_ROWS, config.max_sequences)  # whose logits are in memory at a time
        self.num_blocks = 0  # that sequences can have; the null block comes on top
        self.kv_memory: KVMemory | None = None
        self.kv_caches: list[LayerKVCache] = []
        self._recorded_steps: RecordedSteps | None = None  # of the newest KV cache, on CPU
        self._cuda_graphs: CudaGraphs | None = None  # on a GPU, from the first epoch on
        self._has_served = False  # in an epoch
        self.on_layer: Callable[[], None] = lambda: None  # called after each layer; on a GPU, which may be still busy
        self._backend = select_backend(device, [group.spec for group in self.layout.groups])
        self.model = self._build_model()

    @property
    def kv_bytes(self) -> int:
        """Returns the size of this rank's KV cache in bytes."""
        return (self.num_blocks + 1) * self.layout.block_bytes

    @property
    def max_seq_len_reason(self) -> str:
        """Returns what limits the number of tokens per sequence: MAX_SEQ_LEN if it is set, the checkpoint or the KV
        cache.
        """
        if self.config.max_seq_len:
            return f"MAX_SEQ_LEN={self.max_seq_len}"
        if self.max_seq_len == self.spec.max_positions:
            return "the checkpoint's maximum, because MAX_SEQ_LEN is not set"
        return size_reason(self.config)

    def _build_model(self) -> Decoder:
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return Decoder(self.spec, self.mesh.tp, self._backend).eval()
        finally:
            torch.set_default_dtype(default_dtype)

    def load(self, checkpoint: Checkpoint, on_progress: Callable[[float], None]) -> LoadStats:
        """Loads this rank's weights. Returns the number of bytes read and the seconds that it took. Raises
        CheckpointError.

        `on_progress` is called with the fraction loaded, 0 … 1.
        """
        stats = load_weights(self.model, checkpoint, self.spec, on_progress)
        mb_per_second = stats.bytes / max(stats.seconds, 1e-6) / 1e6
        log.info("read %.1f MB of weights in %.2f s (%.0f MB/s)", stats.bytes / 1e6, stats.seconds, mb_per_second)
        return stats

    def allocate_kv_cache(self, num_ranks_on_host: int) -> None:
        """Runs a warm-up step if WARM_UP is set, then allocates as many KV blocks as fit on every rank.

        Collective: all ranks must call it. `num_ranks_on_host`: ranks that share the memory of this machine.

        Raises ConfigError if MAX_SEQ_LEN is set and one sequence of that length does not fit.
        """
        if self.config.warm_up:
            self._warm_up()
        num_blocks = plan_num_blocks(
            self.config,
            self.mesh.tp,
            block_bytes=self.layout.block_bytes,
            blocks_per_sequence=self._blocks_per_sequence,
            max_seq_len=self.max_seq_len,
            device=self.device,
            num_local_ranks=num_ranks_on_host,
            workspace_bytes=self._workspace_bytes(self.max_num_batched_tokens) + self._graph_bytes,
        )
        self.kv_memory = self._reserve(num_blocks)
        self.num_blocks = num_blocks
        num_tokens = self._max_tokens()
        log.info(
            "KV cache: %d blocks, %.1f MiB on this rank; a sequence (prompt and output) can have up to %d tokens",
            self.num_blocks,
            self.kv_bytes / 2**20,
            num_tokens,
        )
        if self.config.max_seq_len and num_tokens < self.max_seq_len:
            raise ConfigError(
                f"MAX_SEQ_LEN={self.max_seq_len}: the KV cache holds {num_tokens} tokens because of"
                f" {size_reason(self.config)}; allowed: at most {num_tokens}"
            )
        self.max_seq_len = min(self.max_seq_len, num_tokens)

    @property
    def step_bytes(self) -> int:
        """Returns an estimate of the memory that a step allocates and frees: attention, activations and logits."""
        num_tokens, logits_bytes = self.max_num_batched_tokens, 3 * 4 * self.max_logits_rows * self.spec.vocab_size
        return self._workspace_bytes(num_tokens) + self._activation_bytes(num_tokens) + logits_bytes

    def restore_kv_cache(self, num_blocks: int, max_seq_len: int) -> None:
        """Allocates a KV cache of the same size as that of the other ranks, on a rank that replaces a lost one while
        the others have kept their KV caches. Not collective.

        Raises FatalError if this machine has too little memory left.
        """
        num_bytes = (num_blocks + 1) * self.layout.block_bytes
        if self.device.type == "cpu" and num_bytes > available_memory():
            raise FatalError(
                f"the KV cache of the other ranks has {num_blocks} blocks, {num_bytes >> 20} MiB on each rank, but this"
                f" machine has only {available_memory() >> 20} MiB left: free memory, or restart all parts"
            )
        try:
            self.kv_memory = self._reserve(num_blocks)
        except ConfigError as error:
            raise FatalError(
                f"this rank cannot allocate a KV cache of {num_blocks} blocks, as the other ranks have: {error}; free"
                " memory, or restart all parts"
            ) from None
        self.num_blocks, self.max_seq_len = num_blocks, max_seq_len
        log.info("KV cache: %d blocks, as on the other ranks; %.1f MiB on this rank", num_blocks, self.kv_bytes / 2**20)

    def _workspace_bytes(self, num_tokens: int) -> int:
        """Returns an upper bound of the memory that attention needs besides the KV cache, in one layer at a time, in a
        step of this many tokens.
        """
        attentions = self.model.attentions
        return max(
            attentions[group.layers[0]].workspace_bytes(group, num_tokens, self.max_seq_len)
            for group in self.layout.groups
        )

    def _activation_bytes(self, num_tokens: int) -> int:
        return num_tokens * 4 * (8 * self.spec.hidden_size + 4 * self.spec.intermediate_size)

    @property
    def _captures_graphs(self) -> bool:
        """Whether steps of decodes are captured in CUDA graphs."""
        is_enabled = self.device.type == "cuda" and self.config.enable_cuda_graph
        return is_enabled and all(attention.is_capturable for attention in self.model.attentions)

    @property
    def _graph_bytes(self) -> int:
        """Returns an estimate of the memory that CUDA graphs need: what they compute lies apart from other steps."""
        if not self._captures_graphs:
            return 0
        return self._workspace_bytes(MAX_DECODES) + self._activation_bytes(MAX_DECODES)

    def _blocks_per_sequence(self, num_tokens: int) -> int:
        """Returns the most blocks that a sequence holds, with those outside a window that steps in flight still use."""
        return self.layout.num_blocks(num_tokens, self.max_num_batched_tokens * (1 + self.config.rtp_pipeline_depth))

    def _max_tokens(self) -> int:
        """Returns the tokens of the longest sequence, up to the limit of the settings, that the KV cache holds."""
        lengths = range(1, self.max_seq_len + 1)
        return bisect_right(lengths, self.num_blocks, key=self._blocks_per_sequence)

    def _reserve(self, num_blocks: int) -> KVMemory:
        """Reserves memory for `num_blocks` blocks and the null block, and puts the caches of all layers there."""
        memory = KVMemory(num_blocks + 1, self.layout.block_bytes, self.device)
        self.kv_caches = carve(memory.blocks, self.layout)
        kernels = library()
        if kernels and self.device.type == "cpu":
            self._recorded_steps = RecordedSteps(self.model, kernels, self.mesh.tp)
        return memory

    def halve_steps(self) -> None:
        """Halves the maximum number of tokens per step, because a step ran out of memory. Takes effect once the ranks
        have formed their next communicator.
        """
        self.max_num_batched_tokens = max(1, self.max_num_batched_tokens // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def begin_epoch(self) -> None:
        """Prepares for the steps of a new epoch: agrees with the other ranks on the maximum number of tokens per step
        and on CUDA graphs, and starts a thread that pre-faults the KV cache (`KVMemory.begin_epoch`). Collective.
        """
        assert self.kv_memory, "allocate_kv_cache comes first"
        self.max_num_batched_tokens = self.mesh.tp.min(self.max_num_batched_tokens)
        self.kv_memory.begin_epoch()
        uses_graphs = self.mesh.tp.min(int(self._captures_graphs)) == 1
        self._cuda_graphs = self._cuda_graphs or self._make_cuda_graphs() if uses_graphs else None
        if self._cuda_graphs:
            self._cuda_graphs.begin_epoch(captures=self.config.warm_up and not self._has_served)
        self._has_served = True

    def _make_cuda_graphs(self) -> CudaGraphs:
        return CudaGraphs(
            self._compute,
            self.layout.groups,
            self.config.max_sequences,
            self.max_seq_len,
            self.device,
            self.mesh.tp.min,
        )

    def end_epoch(self) -> None:
        """Drops the CUDA graphs, which contain the collectives of the epoch's communicator. Call it before that is
        closed, which waits for them.
        """
        if self._cuda_graphs:
            self._cuda_graphs.clear()

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Returns the hidden states [T, hidden_size] after the last norm, equal on all ranks."""
        if self._recorded_steps and self._recorded_steps.covers(batch):
            return self._recorded_steps.run(self._prepare(batch))
        if self._cuda_graphs and self._cuda_graphs.covers(batch):
            return self._cuda_graphs.run(batch)
        return self._compute(batch)

    def _compute(self, batch: ForwardBatch) -> Tensor:
        hidden: Tensor = self.model(self._prepare(batch))
        return hidden

    def _prepare(self, batch: ForwardBatch) -> ForwardContext:
        return ForwardContext.prepare(batch, self.kv_caches, self.layout, self.model.attentions, self.on_layer)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Computes steps on a temporary KV cache, so that errors appear at startup. Collective.

        On a GPU the first step has the maximum size: the allocator then holds the peak memory of a step when the KV
        cache is sized. Two decodes follow, with a long and a short context, so that their kernels are compiled. On CPU
        the allocator frees the memory again, so a few tokens are enough.
        """
        limit = CPU_WARM_UP_TOKENS if self.device.type == "cpu" else self.max_num_batched_tokens
        num_tokens = min(limit, self.max_num_batched_tokens, self.max_seq_len)
        self._reserve(sum(group.num_blocks(num_tokens) for group in self.layout.groups))
        hidden = self.forward(self._make_step(num_tokens, num_tokens))
        self.model.logits(hidden[-self.max_logits_rows :])
        if self.device.type == "cuda":
            for seq_len in (num_tokens, 1):
                self._compute(self._make_step(1, seq_len))
        self.kv_caches = []

    def _make_step(self, num_tokens: int, seq_len: int) -> ForwardBatch:
        """Returns a step that computes the last `num_tokens` tokens of one sequence, which has the first blocks."""
        num_blocks = [group.num_blocks(seq_len) for group in self.layout.groups]
        block_ids = np.split(np.arange(1, sum(num_blocks) + 1), np.cumsum(num_blocks)[:-1])
        return ForwardBatch.build(
            token_ids=np.zeros(num_tokens, np.int32),
            query_start_loc=np.array([0, num_tokens]),
            seq_lens=np.array([seq_len]),
            prompt_lens=np.array([seq_len]),
            block_tables=[ids[None] for ids in block_ids],
            block_sizes=[group.block_size for group in self.layout.groups],
            device=self.device,
        )
