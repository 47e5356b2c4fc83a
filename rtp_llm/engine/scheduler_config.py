"""Limits of one step of the scheduler."""

from dataclasses import dataclass

CHUNK_TILE = 16  # tokens; chunks of a prompt end at multiples, so that a recomputed prompt has the same chunks


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step."""

    max_num_batched_tokens: int
    max_num_seqs: int  # running requests
    max_num_prefills: int = 0  # requests that compute more than one token; 0: no limit
    max_mixed_chunk: int = 0  # tokens of one prefill in a step with decodes; 0: so many that the step is in time
    itl_budget_seconds: float = 0.0  # of a step with decodes; 0: automatic
    max_seq_len: int = 2**31 - 1  # tokens of prompt and output of one request

    @property
    def mixed_prefill_chunk(self) -> int:
        """Returns the maximum number of prompt tokens of one request in a step that also has decodes."""
        return self.max_mixed_chunk or max(1, self.max_num_batched_tokens // 2)

    @property
    def chunk_tile(self) -> int:
        """Returns the tile: chunks of prompts end at its multiples, for which kernels are efficient. 1 if steps are
        smaller than CHUNK_TILE.
        """
        return CHUNK_TILE if min(self.mixed_prefill_chunk, self.max_num_batched_tokens) >= CHUNK_TILE else 1
