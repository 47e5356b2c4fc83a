"""Chooses the tokens that the next step computes: continuous batching with chunked prefill.

A step computes up to max_num_batched_tokens tokens. Running requests come first: one token of each request that
decodes, and as many prompt tokens of the others as fit. Waiting requests are admitted if tokens and KV blocks are left.
Plain Python over ints: no torch, no sockets.
"""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from rtp_llm.contract.request import Request
from rtp_llm.engine.blocks import BlockPool, hash_block

PROMPT_LOGPROB_CHUNK = 256  # tokens per step of a request with prompt logprobs, at most


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step."""

    max_num_batched_tokens: int
    max_num_seqs: int  # running requests
    max_num_prefills: int = 0  # requests that compute more than one token; 0: no limit
    max_mixed_chunk: int = 0  # tokens of one prefill in a step with decodes; 0: half of max_num_batched_tokens

    @property
    def mixed_prefill_chunk(self) -> int:
        """Returns how many prompt tokens of one request a step may compute if it also has decodes."""
        return self.max_mixed_chunk or max(1, self.max_num_batched_tokens // 2)


@dataclass(frozen=True)
class ScheduledChunk:
    """The tokens [start, start + num_tokens) of one request, which one step computes."""

    request: Request
    start: int
    num_tokens: int

    @property
    def is_last_chunk(self) -> bool:
        """Returns whether the step computes the last token of the request, so that the next token can be sampled."""
        return self.start + self.num_tokens == self.request.num_tokens


@dataclass
class SchedulerStats:
    """Counters since this process started, for the metrics."""

    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there


@dataclass
class Scheduler:
    """Keeps the waiting and the running requests, each in order of arrival, and chooses the chunks of each step."""

    blocks: BlockPool
    config: SchedulerConfig
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    stats: SchedulerStats = field(default_factory=SchedulerStats)
    _has_preempted: bool = False  # the current step has preempted a request, so it admits no waiting one

    def add(self, request: Request) -> None:
        """Appends a request to the waiting queue."""
        request.arrival_time = time.monotonic()
        self.waiting.append(request)

    def remove(self, request_id: str) -> Request | None:
        """Removes a request and frees its blocks. Returns the request, or None if it has ended."""
        for queue in (self.running, self.waiting):
            for request in queue:
                if request.id == request_id:
                    queue.remove(request)
                    self._release_blocks(request)
                    return request
        return None

    def schedule(self) -> list[ScheduledChunk]:
        """Returns the chunks of the next step, running requests first; empty if there is no request."""
        chunks = self._schedule_running()
        if not self._has_preempted:
            chunks += self._admit_waiting(chunks)
        return chunks

    def update_after_step(self, chunks: Iterable[ScheduledChunk]) -> None:
        """Marks the tokens of a step as computed and adds the blocks that it filled to the prefix cache."""
        for chunk in chunks:
            chunk.request.num_computed_tokens = chunk.start + chunk.num_tokens
            self._cache_full_blocks(chunk)

    def finish_invalid(self, request: Request) -> None:
        """Ends a request whose keys and values are invalid, and evicts its blocks from the prefix cache."""
        self.blocks.evict(request.block_ids)
        self.finish(request)

    def finish(self, request: Request) -> None:
        """Ends a running request and frees its blocks."""
        self.running.remove(request)
        self._release_blocks(request)

    # Running requests

    def _schedule_running(self) -> list[ScheduledChunk]:
        self._has_preempted = False
        chunks: list[ScheduledChunk] = []
        budget = self.config.max_num_batched_tokens
        num_decodes = sum(1 for r in self.running if r.num_uncomputed_tokens == 1)
        chunk_limit = self.config.mixed_prefill_chunk if num_decodes else self.config.max_num_batched_tokens
        index = 0
        while index < len(self.running) and budget:
            request = self.running[index]
            num_uncomputed = request.num_uncomputed_tokens
            if num_uncomputed == 1:
                num_decodes -= 1
                num_tokens = 1
            else:
                # Reserves one token for each decode that comes later in the list.
                num_tokens = min(num_uncomputed, chunk_limit, budget - num_decodes, self._max_chunk(request))
            if num_tokens > 0:
                if not self._allocate_slots(request, num_tokens):
                    break  # the request itself was preempted; it was the last in the list
                chunks.append(ScheduledChunk(request, request.num_computed_tokens, num_tokens))
                budget -= num_tokens
            index += 1
        return chunks

    def _max_chunk(self, request: Request) -> int:
        """Returns how many tokens of a request one step may compute.

        Prompt logprobs lower this limit, because the logits of each token then need memory.
        """
        return PROMPT_LOGPROB_CHUNK if request.wants_prompt_logprobs else self.config.max_num_batched_tokens

    def _allocate_slots(self, request: Request, num_tokens: int) -> bool:
        """Allocates blocks for `num_tokens` more tokens, preempting the newest requests if too few are free.

        Returns False if `request` itself was preempted.
        """
        num_new_blocks = self.blocks.num_blocks_for(request.num_computed_tokens + num_tokens) - len(request.block_ids)
        while num_new_blocks > self.blocks.num_free:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        request.block_ids += self.blocks.allocate(max(0, num_new_blocks))
        return True

    def _preempt(self, request: Request) -> None:
        """Frees the blocks of a request and puts it at the head of the waiting queue.

        Its prompt and output are recomputed later, except for a prefix that is then still in the prefix cache.
        """
        self._release_blocks(request)
        request.num_computed_tokens = 0
        request.prompt_logprobs.clear()
        self.waiting.appendleft(request)
        self.stats.preemptions += 1
        self._has_preempted = True

    # Waiting requests

    def _admit_waiting(self, scheduled: list[ScheduledChunk]) -> list[ScheduledChunk]:
        admitted: list[ScheduledChunk] = []
        budget = self.config.max_num_batched_tokens - sum(c.num_tokens for c in scheduled)
        chunk_limit = (
            self.config.mixed_prefill_chunk
            if any(c.is_last_chunk for c in scheduled)
            else self.config.max_num_batched_tokens
        )
        num_prefills = sum(1 for c in scheduled if c.num_tokens > 1)
        while self.waiting and budget > 0 and self._can_admit(num_prefills + len(admitted)):
            request = self.waiting[0]
            cached_blocks = self._find_cached_prefix(request)
            start = len(cached_blocks) * self.blocks.block_size
            num_tokens = min(request.num_tokens - start, budget, chunk_limit, self._max_chunk(request))
            num_new_blocks = self.blocks.num_blocks_for(start + num_tokens) - len(cached_blocks)
            if num_new_blocks + self.blocks.num_unreferenced(cached_blocks) > self.blocks.num_free:
                break  # first come, first served: smaller requests further back wait too
            self.waiting.popleft()
            self._start_request(request, cached_blocks, num_new_blocks)
            admitted.append(ScheduledChunk(request, start, num_tokens))
            budget -= num_tokens
        return admitted

    def _can_admit(self, num_prefills: int) -> bool:
        if self.config.max_num_prefills and num_prefills >= self.config.max_num_prefills:
            return False
        return len(self.running) < self.config.max_num_seqs

    def _find_cached_prefix(self, request: Request) -> list[int]:
        """Returns the cached blocks of the request's longest cached prefix.

        The last token is never part of it, because it must be computed for its logits.
        """
        if request.wants_prompt_logprobs:
            return []
        num_full_blocks = (request.num_tokens - 1) // self.blocks.block_size
        self._hash_full_blocks(request, num_full_blocks)
        return self.blocks.find_cached_prefix(request.block_hashes[:num_full_blocks])

    def _start_request(self, request: Request, cached_blocks: list[int], num_new_blocks: int) -> None:
        self.blocks.acquire(cached_blocks)
        request.block_ids = cached_blocks + self.blocks.allocate(num_new_blocks)
        request.num_computed_tokens = len(cached_blocks) * self.blocks.block_size
        if not request.queue_ms:  # only at the first start, not after a preemption
            request.queue_ms = (time.monotonic() - request.arrival_time) * 1000 or 0.001
            request.cached_tokens = request.num_computed_tokens
            self.stats.prefix_queries += request.num_tokens
            self.stats.prefix_hits += request.num_computed_tokens
        self.running.append(request)

    # Blocks

    def _hash_full_blocks(self, request: Request, num_blocks: int) -> None:
        """Extends `request.block_hashes` to the first `num_blocks` blocks of the request."""
        block_size, hashes = self.blocks.block_size, request.block_hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, request.tokens[start : start + block_size], request.cache_salt))

    def _cache_full_blocks(self, chunk: ScheduledChunk) -> None:
        if not self.blocks.enable_caching:
            return
        request, block_size = chunk.request, self.blocks.block_size
        num_full_blocks = request.num_computed_tokens // block_size
        self._hash_full_blocks(request, num_full_blocks)
        for index in range(chunk.start // block_size, num_full_blocks):
            self.blocks.cache_block(request.block_ids[index], request.block_hashes[index])

    def _release_blocks(self, request: Request) -> None:
        self.blocks.release(request.block_ids)
        request.block_ids = []
