"""Decides what the next step computes: one token budget, running requests first, no prefill and decode phases.

Each request has `num_computed` tokens that must catch up with `num_tokens`; a decode is the case where one is missing,
a prompt the case where many are, a chunk of a prompt the case where the budget ends first. Pure Python over ints;
knows neither torch nor sockets.
"""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from rtp_llm.engine.blocks import BlockPool, hash_block
from rtp_llm.engine.request import Request

PROMPT_LOGPROB_CHUNK = 256


@dataclass(frozen=True)
class Limits:
    """Bounds of one step: tokens, sequences, prompts; and tokens one prompt may take while others decode."""

    tokens: int
    sequences: int
    prompts: int = 0  # 0: any
    chunk: int = 0  # 0: half of the tokens

    @property
    def chunk_beside_decode(self) -> int:
        return self.chunk or max(1, self.tokens // 2)


@dataclass(frozen=True)
class Slice:
    """`count` tokens of one request, from `start` on, that this step computes."""

    request: Request
    start: int
    count: int

    @property
    def completes(self) -> bool:
        """Whether the request has caught up after this step, so that its next token can be sampled."""
        return self.start + self.count == self.request.num_tokens


@dataclass
class Counters:
    """Totals since the start, read by the metrics."""

    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found


@dataclass
class Scheduler:
    """Holds the waiting and the running requests and hands out the tokens of each step."""

    blocks: BlockPool
    limits: Limits
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    _preempted: bool = False  # in this step: then nobody new is let in

    def add(self, request: Request) -> None:
        request.arrived = time.monotonic()
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

    def schedule(self) -> list[Slice]:
        """The slices of the next step, in order; empty where there is nothing to do."""
        slices = self._continue_running()
        if not self._preempted:
            slices += self._admit_waiting(slices)
        return slices

    def advance(self, slices: Iterable[Slice]) -> None:
        """After the step: its tokens are computed, and blocks that became full may be shared."""
        for piece in slices:
            piece.request.num_computed = piece.start + piece.count
            self._publish(piece)

    def discard(self, request: Request) -> None:
        """Ends a request whose keys and values are not to be trusted: nobody may find them in the cache."""
        self.blocks.forget(request.block_ids)
        self.finish(request)

    def finish(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)

    # Running requests

    def _continue_running(self) -> list[Slice]:
        self._preempted = False
        slices: list[Slice] = []
        budget = self.limits.tokens
        decodes = sum(1 for r in self.running if r.num_missing == 1)
        chunk = self.limits.chunk_beside_decode if decodes else self.limits.tokens
        index = 0
        while index < len(self.running) and budget:
            request = self.running[index]
            missing = request.num_missing
            if missing == 1:
                decodes -= 1
            # What is left of `decodes` comes later in the list and keeps its one token each.
            count = 1 if missing == 1 else min(missing, chunk, budget - decodes, self._most(request))
            if count > 0:
                if not self._make_room(request, count):
                    break  # it was the last one left to preempt
                slices.append(Slice(request, request.num_computed, count))
                budget -= count
            index += 1
        return slices

    def _most(self, request: Request) -> int:
        """Tokens one step may compute for it: with prompt logprobs each costs a row of logits as wide as the
        vocabulary.
        """
        return PROMPT_LOGPROB_CHUNK if request.wants_prompt_logprobs else self.limits.tokens

    def _make_room(self, request: Request, count: int) -> bool:
        """Blocks for `count` more tokens, by preempting the youngest requests where needed. False: it preempted
        itself.
        """
        need = self.blocks.blocks_for(request.num_computed + count) - len(request.block_ids)
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
        request.num_computed = 0
        request.prompt_logprobs.clear()
        self.waiting.appendleft(request)
        self.counters.preemptions += 1
        self._preempted = True

    # Waiting requests

    def _admit_waiting(self, slices: list[Slice]) -> list[Slice]:
        admitted: list[Slice] = []
        budget = self.limits.tokens - sum(s.count for s in slices)
        chunk = self.limits.chunk_beside_decode if any(s.completes for s in slices) else self.limits.tokens
        prompts = sum(1 for s in slices if s.count > 1)
        while self.waiting and budget > 0 and self._may_admit(prompts + len(admitted)):
            request = self.waiting[0]
            hits = self._lookup(request)
            start = len(hits) * self.blocks.block_size
            count = min(request.num_tokens - start, budget, chunk, self._most(request))
            need = self.blocks.blocks_for(start + count) - len(hits)
            if need + self.blocks.num_idle(hits) > self.blocks.num_free:
                break  # first come, first served: nobody overtakes
            self.waiting.popleft()
            self._start(request, hits, need)
            admitted.append(Slice(request, start, count))
            budget -= count
        return admitted

    def _may_admit(self, prompts: int) -> bool:
        if self.limits.prompts and prompts >= self.limits.prompts:
            return False
        return len(self.running) < self.limits.sequences

    def _lookup(self, request: Request) -> list[int]:
        """Cached blocks of the request's prefix; at least one token is left to compute, for its logits."""
        if request.wants_prompt_logprobs:
            return []
        size = self.blocks.block_size
        full = (request.num_tokens - 1) // size
        self._hash_up_to(request, full)
        return self.blocks.match(request.block_hashes[:full])

    def _start(self, request: Request, hits: list[int], need: int) -> None:
        self.blocks.take(hits)
        request.block_ids = hits + self.blocks.allocate(need)
        request.num_computed = len(hits) * self.blocks.block_size
        if not request.queue_ms:  # the first time, not when it comes back from a preemption
            request.queue_ms = (time.monotonic() - request.arrived) * 1000 or 0.001
            request.cached_tokens = request.num_computed
            self.counters.prefix_queries += request.num_tokens
            self.counters.prefix_hits += request.num_computed
        self.running.append(request)

    # Blocks

    def _hash_up_to(self, request: Request, full: int) -> None:
        size, hashes = self.blocks.block_size, request.block_hashes
        while len(hashes) < full:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, request.tokens[start : start + size], request.cache_salt))

    def _publish(self, piece: Slice) -> None:
        if not self.blocks.caching:
            return
        request, size = piece.request, self.blocks.block_size
        full = request.num_computed // size
        self._hash_up_to(request, full)
        for index in range(piece.start // size, full):
            self.blocks.publish(request.block_ids[index], request.block_hashes[index])

    def _release(self, request: Request) -> None:
        self.blocks.release(request.block_ids)
        request.block_ids = []
