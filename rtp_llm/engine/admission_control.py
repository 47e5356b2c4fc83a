"""Decides whether a waiting request may start: whether the KV cache can hold it and all running requests until they
end.

A request that starts too early is preempted once the running requests have grown, and must be recomputed. Output
lengths are not known in advance; they are estimated from the latest requests.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from rtp_llm.contract.request import Request
from rtp_llm.engine.kv_cache_manager import CachedPrefix, KVCacheManager

FIRST_OUTPUT_LENGTH = 512  # tokens; plausible output length, used until a request has ended
NUM_OUTPUT_LENGTHS = (
    64  # latest requests whose median output length is the estimate; a higher quantile would leave blocks idle
)
MIN_GROWTH = 16  # tokens that a request is expected to get in any case, unless its limit is closer


class AdmissionControl:
    """Predicts the peak number of KV blocks that a set of requests will use, so that a request is admitted only if it
    need not be preempted later.
    """

    def __init__(self, kv_cache_manager: KVCacheManager):
        self._kv_cache_manager = kv_cache_manager
        self._output_lengths = deque([FIRST_OUTPUT_LENGTH], maxlen=NUM_OUTPUT_LENGTHS)
        self.typical_length = FIRST_OUTPUT_LENGTH

    def record_output_length(self, num_tokens: int) -> None:
        """Adds the output length of a finished request to the statistics."""
        self._output_lengths.append(num_tokens)
        self.typical_length = sorted(self._output_lengths)[len(self._output_lengths) // 2]

    def min_blocks(self, request: Request) -> int:
        """Returns how many KV blocks the request needs to generate MIN_GROWTH (16) more tokens, or up to max_tokens.

        If the host is short of memory, a request that needs more than the usable blocks is not started.
        """
        num_tokens = request.num_tokens + min(MIN_GROWTH, request.params.max_tokens - request.num_output_tokens) - 1
        return int(self._kv_cache_manager.num_blocks_for(np.array([num_tokens]))[0])

    def fits(self, running: Sequence[Request], candidate: Request, prefix: CachedPrefix) -> bool:
        """Returns whether the usable KV blocks suffice for `running` and `candidate` until all of them have ended.

        Assumes that each request gets one token per step and frees its blocks when it ends. So the usage of blocks
        peaks just before a request ends, and is computed for each of these times. `prefix`: the candidate's.
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
        """Returns how many more tokens the request is expected to generate."""
        num_output_tokens = request.num_tokens - request.num_prompt_tokens
        expected = max(self.typical_length - num_output_tokens, MIN_GROWTH)
        return max(0, min(expected, request.params.max_tokens - num_output_tokens))
