"""Decides what the next step computes: one token budget, running requests first, no prefill and decode phases.

Each request has `num_computed` tokens that must catch up with `num_tokens`; a decode is the case where one is missing,
a prompt the case where many are, a chunk of a prompt the case where the budget ends first. Pure Python over ints;
knows neither torch nor sockets.
"""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from rtp_llm.contract.request import Request
from rtp_llm.engine.blocks import BlockPool, hash_block

PROMPT_LOGPROB_CHUNK = 256


@dataclass(frozen=True)
class SchedulerConfig:
    """Bounds of one step: tokens, sequences, prompts; and tokens one prompt may take while others decode."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_num_prefills: int = 0  # 0: any
    max_mixed_chunk: int = 0  # 0: half of the tokens

    @property
    def mixed_prefill_chunk(self) -> int:
        return self.max_mixed_chunk or max(1, self.max_num_batched_tokens // 2)


@dataclass(frozen=True)
class ScheduledChunk:
    """`count` tokens of one request, from `start` on, that this step computes."""

    request: Request
    start: int
    num_tokens: int

    @property
    def is_last_chunk(self) -> bool:
        """Whether the request has caught up after this step, so that its next token can be sampled."""
        return self.start + self.num_tokens == self.request.num_tokens


@dataclass
class SchedulerStats:
    """Totals since the start, read by the metrics."""

    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found


@dataclass
class Scheduler:
    """Holds the waiting and the running requests and hands out the tokens of each step."""

    blocks: BlockPool
    config: SchedulerConfig
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    stats: SchedulerStats = field(default_factory=SchedulerStats)
    _preempted: bool = False  # in this step: then nobody new is let in

    def add(self, request: Request) -> None:
        request.arrival_time = time.monotonic()
        self.waiting.append(request)

    def remove(self, request_id: str) -> Request | None:
        """Forgets a request and frees its blocks; None where it is not known (any more)."""
        for queue in (self.running, self.waiting):
            for request in queue:
                if request.id == request_id:
                    queue.remove(request)
                    self._release(request)
                    return request
        return None

    def schedule(self) -> list[ScheduledChunk]:
        """The slices of the next step, in order; empty where there is nothing to do."""
        slices = self._continue_running()
        if not self._preempted:
            slices += self._admit_waiting(slices)
        return slices

    def update_after_step(self, slices: Iterable[ScheduledChunk]) -> None:
        """After the step: its tokens are computed, and blocks that became full may be shared."""
        for piece in slices:
            piece.request.num_computed_tokens = piece.start + piece.num_tokens
            self._cache_full_blocks(piece)

    def finish_invalid(self, request: Request) -> None:
        """Ends a request whose keys and values are not to be trusted: nobody may find them in the cache."""
        self.blocks.evict(request.block_ids)
        self.finish(request)

    def finish(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)

    # Running requests

    def _continue_running(self) -> list[ScheduledChunk]:
        self._preempted = False
        slices: list[ScheduledChunk] = []
        budget = self.config.max_num_batched_tokens
        decodes = sum(1 for r in self.running if r.num_uncomputed_tokens == 1)
        chunk = self.config.mixed_prefill_chunk if decodes else self.config.max_num_batched_tokens
        index = 0
        while index < len(self.running) and budget:
            request = self.running[index]
            missing = request.num_uncomputed_tokens
            if missing == 1:
                decodes -= 1
            # What is left of `decodes` comes later in the list and keeps its one token each.
            count = 1 if missing == 1 else min(missing, chunk, budget - decodes, self._max_chunk(request))
            if count > 0:
                if not self._allocate_slots(request, count):
                    break  # it was the last one left to preempt
                slices.append(ScheduledChunk(request, request.num_computed_tokens, count))
                budget -= count
            index += 1
        return slices

    def _max_chunk(self, request: Request) -> int:
        """Tokens one step may compute for it: with prompt logprobs each costs a row of logits as wide as the
        vocabulary.
        """
        return PROMPT_LOGPROB_CHUNK if request.wants_prompt_logprobs else self.config.max_num_batched_tokens

    def _allocate_slots(self, request: Request, count: int) -> bool:
        """Blocks for `count` more tokens, by preempting the youngest requests where needed. False: it preempted
        itself.
        """
        need = self.blocks.num_blocks_for(request.num_computed_tokens + count) - len(request.block_ids)
        while need > self.blocks.num_free:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        request.block_ids += self.blocks.allocate(max(0, need))
        return True

    def _preempt(self, request: Request) -> None:
        """Gives its blocks away; it will recompute prompt and output later, from the prefix cache where that still
        holds.
        """
        self._release(request)
        request.num_computed_tokens = 0
        request.prompt_logprobs.clear()
        self.waiting.appendleft(request)
        self.stats.preemptions += 1
        self._preempted = True

    # Waiting requests

    def _admit_waiting(self, slices: list[ScheduledChunk]) -> list[ScheduledChunk]:
        admitted: list[ScheduledChunk] = []
        budget = self.config.max_num_batched_tokens - sum(s.num_tokens for s in slices)
        chunk = (
            self.config.mixed_prefill_chunk
            if any(s.is_last_chunk for s in slices)
            else self.config.max_num_batched_tokens
        )
        prompts = sum(1 for s in slices if s.num_tokens > 1)
        while self.waiting and budget > 0 and self._can_admit(prompts + len(admitted)):
            request = self.waiting[0]
            hits = self._cached_prefix(request)
            start = len(hits) * self.blocks.block_size
            count = min(request.num_tokens - start, budget, chunk, self._max_chunk(request))
            need = self.blocks.num_blocks_for(start + count) - len(hits)
            if need + self.blocks.num_unreferenced(hits) > self.blocks.num_free:
                break  # first come, first served: nobody overtakes
            self.waiting.popleft()
            self._start(request, hits, need)
            admitted.append(ScheduledChunk(request, start, count))
            budget -= count
        return admitted

    def _can_admit(self, prompts: int) -> bool:
        if self.config.max_num_prefills and prompts >= self.config.max_num_prefills:
            return False
        return len(self.running) < self.config.max_num_seqs

    def _cached_prefix(self, request: Request) -> list[int]:
        """Cached blocks of the request's prefix; at least one token is left to compute, for its logits."""
        if request.wants_prompt_logprobs:
            return []
        size = self.blocks.block_size
        full = (request.num_tokens - 1) // size
        self._hash_up_to(request, full)
        return self.blocks.find_cached_prefix(request.block_hashes[:full])

    def _start(self, request: Request, hits: list[int], need: int) -> None:
        self.blocks.acquire(hits)
        request.block_ids = hits + self.blocks.allocate(need)
        request.num_computed_tokens = len(hits) * self.blocks.block_size
        if not request.queue_ms:  # the first time, not when it comes back from a preemption
            request.queue_ms = (time.monotonic() - request.arrival_time) * 1000 or 0.001
            request.cached_tokens = request.num_computed_tokens
            self.stats.prefix_queries += request.num_tokens
            self.stats.prefix_hits += request.num_computed_tokens
        self.running.append(request)

    # Blocks

    def _hash_up_to(self, request: Request, full: int) -> None:
        size, hashes = self.blocks.block_size, request.block_hashes
        while len(hashes) < full:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, request.tokens[start : start + size], request.cache_salt))

    def _cache_full_blocks(self, piece: ScheduledChunk) -> None:
        if not self.blocks.caching:
            return
        request, size = piece.request, self.blocks.block_size
        full = request.num_computed_tokens // size
        self._hash_up_to(request, full)
        for index in range(piece.start // size, full):
            self.blocks.cache_block(request.block_ids[index], request.block_hashes[index])

    def _release(self, request: Request) -> None:
        self.blocks.release(request.block_ids)
        request.block_ids = []
