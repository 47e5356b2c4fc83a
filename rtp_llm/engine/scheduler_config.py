"""The scheduler's limits: tokens and requests of one step, and tokens of one request."""

from dataclasses import dataclass

CHUNK_TILE = 16  # tokens; chunks of a prompt end at multiples, so that a recomputed prompt has the same chunks


@dataclass(frozen=True)
class SchedulerConfig:
    """The scheduler's limits.

    max_num_batched_tokens: tokens of one step. max_num_seqs: running requests.
    max_num_prefills: requests that compute more than one token in a step; 0: no limit.
    max_mixed_chunk: prompt tokens of one request in a step that also has decodes; 0: limited by `itl_budget_seconds`.
    itl_budget_seconds: duration of a step that has decodes; 0: chosen automatically from the load.
    max_seq_len: tokens of one request, prompt and output.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_num_prefills: int = 0
    max_mixed_chunk: int = 0
    itl_budget_seconds: float = 0.0
    max_seq_len: int = 2**31 - 1

    @property
    def mixed_prefill_chunk(self) -> int:
        """Returns the maximum number of prompt tokens of one request in a step that also has decodes."""
        return self.max_mixed_chunk or max(1, self.max_num_batched_tokens // 2)

    @property
    def chunk_tile(self) -> int:
        """Returns the tile: chunks of a prompt, except its last one, should end at multiples of this number of tokens.
        It is CHUNK_TILE (16), or 1 if a step or a chunk is limited to fewer tokens than that.
        """
        return CHUNK_TILE if min(self.mixed_prefill_chunk, self.max_num_batched_tokens) >= CHUNK_TILE else 1
