"""Decides whether a waiting request may start: whether the KV cache will hold it and all running ones to their ends.

A request that starts too early is preempted when the running ones have grown, and all of it is computed again. The ends
are not known; they are estimated from the lengths of the latest answers.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from rtp_llm.contract.request import Request
from rtp_llm.engine.kv_cache_manager import CachedPrefix, KVCacheManager

FIRST_OUTPUT_LENGTH = 512  # tokens; of a plausible answer, before any has ended
NUM_OUTPUT_LENGTHS = 64  # latest answers whose median is the estimate; a higher quantile leaves more blocks idle
MIN_GROWTH = 16  # tokens that a request is expected to get in any case, unless its limit is closer


class AdmissionControl:
    """Predicts the largest number of blocks that requests hold at a time."""

    def __init__(self, kv_cache_manager: KVCacheManager):
        self._kv_cache_manager = kv_cache_manager
        self._output_lengths = deque([FIRST_OUTPUT_LENGTH], maxlen=NUM_OUTPUT_LENGTHS)
        self.typical_length = FIRST_OUTPUT_LENGTH

    def record_output_length(self, num_tokens: int) -> None:
        """Takes the length of an answer that has ended into account."""
        self._output_lengths.append(num_tokens)
        self.typical_length = sorted(self._output_lengths)[len(self._output_lengths) // 2]

    def min_blocks(self, request: Request) -> int:
        """Returns how many blocks the request needs, alone, to get further than it was. Its last token needs none."""
        num_tokens = request.num_tokens + min(MIN_GROWTH, request.params.max_tokens - request.num_output_tokens) - 1
        return int(self._kv_cache_manager.num_blocks_for(np.array([num_tokens]))[0])

    def fits(self, running: Sequence[Request], candidate: Request, prefix: CachedPrefix) -> bool:
        """Returns whether the blocks suffice until `running` and `candidate`, which has this cached prefix, have ended.

        All of them get a token per step; a request that ends frees its blocks. The number of blocks is therefore
        largest just before an end, and is computed for each end.
        """
        requests = [*running, candidate]
        num_tokens = np.array([r.num_tokens for r in requests])
        growth = np.array([self.expected_growth(r) for r in requests])
        pool = self._kv_cache_manager.pool
        num_shared = pool.num_references - pool.num_used + self._kv_cache_manager.num_referenced(prefix)
        if int(self._kv_cache_manager.num_blocks_for(num_tokens + growth).sum()) - num_shared <= pool.num_usable:
            return True  # even if none ended before the others; so only a tight cache costs the square of their number
        ends = np.unique(growth)[:, None]
        is_running = growth >= ends  # [end, request]
        num_blocks = self._kv_cache_manager.num_blocks_for(num_tokens + ends)
        return int((num_blocks * is_running).sum(axis=1).max()) - num_shared <= pool.num_usable

    def expected_growth(self, request: Request) -> int:
        """Returns the number of tokens that the request is expected to get."""
        num_output_tokens = request.num_tokens - request.num_prompt_tokens
        expected = max(self.typical_length - num_output_tokens, MIN_GROWTH)
        return max(0, min(expected, request.params.max_tokens - num_output_tokens))
