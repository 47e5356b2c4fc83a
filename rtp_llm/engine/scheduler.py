"""Chooses the tokens that the next step computes: continuous batching with chunked prefill.

A step computes up to max_num_batched_tokens tokens. Running requests come first: one token of each request that
decodes, and as many prompt tokens of the others as fit. Waiting requests are admitted if tokens and KV blocks are left.

A step may be scheduled while the previous one is in flight, that is before its result is known. Requests then count
scheduled tokens as computed (see `Request`), and blocks are cached or freed only once the result of the last step that
uses them is known. Plain Python over ints: no torch, no sockets.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import chain, islice

from rtp_llm.contract.engine_output import FinishReason
from rtp_llm.contract.request import Request
from rtp_llm.engine.admission_control import AdmissionControl
from rtp_llm.engine.itl_budget import Demand, ItlBudget
from rtp_llm.engine.kv_cache_manager import KVCacheManager, NewBlocks
from rtp_llm.engine.memory_budget import MemoryBudget
from rtp_llm.engine.prompt_budget import PromptBudget
from rtp_llm.engine.proposer import DraftProposer
from rtp_llm.engine.scheduler_config import SchedulerConfig
from rtp_llm.engine.scheduler_output import RequestUpdate, ScheduledChunk, SchedulerOutput
from rtp_llm.engine.step_cost import StepWork

log = logging.getLogger(__name__)

MIN_DRAFT_BUDGET = 16  # drafts of a step, if it has fewer chunks: so few rows more hardly delay other requests
STARVING_SECONDS = 10.0  # that a request waits for memory while no other one runs


@dataclass
class SchedulerStats:
    """Counters for the metrics. They start at 0 with each scheduler, that is when the ranks form a new communicator."""

    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there
    drafts: int = 0  # chunks with draft tokens whose result was used
    draft_tokens: int = 0
    accepted_tokens: int = 0  # draft tokens that equal the sampled ones
    window_freed: int = 0  # blocks of running requests that were freed because they lay outside the window


class Scheduler:
    """Holds the waiting and the running requests (each one sequence), both in order of arrival, and chooses which
    tokens (chunks) of which requests each step computes.
    """

    def __init__(
        self,
        kv_cache_manager: KVCacheManager,
        config: SchedulerConfig,
        proposer: DraftProposer | None = None,
        memory_budget: MemoryBudget | None = None,
    ):
        """`proposer`: proposes draft tokens. A request then waits for the result of a step with draft tokens.

        `memory_budget`: needed if the KV cache does not hold its memory from the start.
        """
        self.kv_cache_manager, self.config, self.proposer = kv_cache_manager, config, proposer
        self.memory_budget = memory_budget
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.stats = SchedulerStats()
        self.admission_control = AdmissionControl(kv_cache_manager)
        self.itl_budget = ItlBudget(config)
        self._is_admission_blocked = False  # nothing has changed since the first waiting request did not fit
        self._is_short_of_blocks = False  # the current step leaves out or preempts a request, and so admits none
        self._is_short_of_memory = False  # at the last measurement
        self._retired_blocks: list[int] = []  # since the last step
        self._starving_since: float | None = None  # since when the first waiting request lacks memory and none runs
        self._num_releasing = 0  # requests that have left the batch, and whose blocks a step in flight still uses
        self._last_turn = 0
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._ended_slots: list[int] = []  # since the last step
        self._rewinds: dict[int, int] = {}  # by slot, since the last step: see `SchedulerOutput`

    def add(self, request: Request) -> None:
        """Appends a request to the waiting queue."""
        request.arrival_time = time.monotonic()
        self.waiting.append(request)

    def remove(self, request_id: str) -> Request | None:
        """Ends the running or waiting request with this id. Returns the request, or None if there is none."""
        for queue in (self.running, self.waiting):
            for request in queue:
                if request.id == request_id:
                    self.finish(request)
                    return request
        return None

    def finish(self, request: Request) -> None:
        """Ends a running or waiting request. Frees its blocks once no step in flight uses them."""
        request.has_ended = True
        self._is_admission_blocked = False
        # Other lengths say nothing about future requests: pooled, aborted before the start, or cut by max_tokens.
        if 0 < request.num_output_tokens < request.params.max_tokens:
            self.admission_control.record_output_length(request.num_output_tokens)
        if request.slot >= 0:
            self.running.remove(request)
            self._leave_batch(request)
        else:
            self.waiting.remove(request)

    def schedule(self) -> SchedulerOutput:
        """Returns the next step. It has no chunks, and is not run, if all requests must wait for the result of a step
        in flight.
        """
        self._is_short_of_blocks = False
        self._fit_memory()
        chunks = self._schedule_running()
        if self.proposer:
            self._add_drafts(chunks, self.proposer)
        if not self._is_short_of_blocks and not (self._is_short_of_memory and self.running):
            chunks += self._admit_waiting(chunks)
        if not chunks:
            return SchedulerOutput([], starved=self._end_starved())
        self._starving_since = None
        chunks.sort(key=lambda chunk: chunk.num_tokens != 1)
        output = SchedulerOutput(chunks, self._ended_slots, list(self._rewinds.items()), self._retired_blocks)
        self._ended_slots, self._rewinds, self._retired_blocks = [], {}, []
        return output

    def record_seconds(self, output: SchedulerOutput, seconds: float) -> None:
        """Passes the measured duration of a step, in seconds, to the cost model."""
        self.itl_budget.cost.record(StepWork.of(output.chunks), seconds)

    def update(self, output: SchedulerOutput, results: Iterable[list[int] | None]) -> list[RequestUpdate]:
        """Applies the results of a step. Must be called once for each step with chunks, in order.

        `results`: for each chunk with `num_sampled` > 0, the sampled tokens: accepted draft tokens and the token after
        them. None ends the request with an error: its logits are invalid, so its keys and values may be, too.

        Returns an update for each chunk with `num_sampled` > 0, and for each that ends a pooled (embedding) request.
        """
        updates, remaining = [], iter(results)
        for chunk in output.chunks:
            request = chunk.request
            request.num_in_flight -= 1
            is_releasing = request.slot < 0
            if chunk.num_sampled or chunk.is_pooled:
                updates.append(self._apply_result(chunk, next(remaining) if chunk.num_sampled else []))
            elif not request.has_ended:
                self._publish(request, chunk.start, chunk.start + chunk.num_tokens)
            if is_releasing and not request.num_in_flight:
                self._num_releasing -= 1
                self._release_blocks(request)
        return updates

    # Memory

    def _fit_memory(self) -> None:
        """Lets the KV cache grow into the free memory of the host, or retires blocks if memory is short.

        If too few blocks are free, preempts the newest requests, but never the last one.
        """
        if not self.memory_budget:
            return
        pool = self.kv_cache_manager.pool
        pool.mark_populated(self.memory_budget.num_populated())
        room = self.memory_budget.measure()
        if room is None:
            return
        num_usable = pool.num_usable
        if (room < 0) != self._is_short_of_memory:
            if room < 0:
                text = "the host has too little memory: %d KV blocks give theirs back, so requests may wait; %s"
                log.warning(text, -room, "free memory, or lower KV_CACHE_MEM_MB")
            else:
                log.warning("the host has enough memory again: the KV cache may use %d more blocks", room)
        pool.growth, self._is_short_of_memory = max(0, room), room < 0
        while (num_missing := -room - len(self._retired_blocks)) > 0:
            self._retired_blocks += pool.retire(num_missing)
            if len(self._retired_blocks) >= -room or len(self.running) < 2 or self._frees_blocks_soon():
                break
            self._preempt(self.running.pop())
        if pool.num_usable > num_usable:
            self._is_admission_blocked = False

    def _end_starved(self) -> list[Request]:
        """Ends and returns the first waiting request if it has long been short of memory although no other one runs."""
        if self.running or self._num_releasing or not self.waiting or not self.kv_cache_manager.pool.is_short_of_memory:
            self._starving_since = None
            return []
        now = time.monotonic()
        self._starving_since = self._starving_since or now
        if now - self._starving_since < STARVING_SECONDS:
            return []
        self._starving_since = None
        request = self.waiting[0]
        self.finish(request)
        return [request]

    # Running requests

    def _schedule_running(self) -> list[ScheduledChunk]:
        chunks: list[ScheduledChunk] = []
        requests, budget = self._take_turns([r for r in self.running if self._is_ready(r)])
        decodes = [r for r in requests if r.num_uncomputed_tokens == 1]
        num_decodes = len(decodes)
        self._prompt_budget = self._start_prompt_budget(decodes)
        for request in requests:
            if request.slot < 0:
                continue  # was preempted for the sake of an older one
            num_tokens = 1
            if request.num_uncomputed_tokens == 1:
                num_decodes -= 1
            else:  # reserves one token for each decode that comes later in the list
                limit = budget - num_decodes
                num_tokens = self._prompt_budget.chunk_size(request, request.num_computed_tokens, limit)
            if num_tokens > 0 and (new_blocks := self._allocate_slots(request, num_tokens)) is not None:
                chunks.append(self._make_chunk(request, num_tokens, new_blocks))
                budget -= num_tokens
                if num_tokens > 1:
                    self._prompt_budget.take(chunks[-1])
        return chunks

    def _start_prompt_budget(self, decodes: Sequence[Request]) -> PromptBudget:
        """Returns the prompt tokens that a step with these decodes may compute."""
        if len(decodes) == len(self.running) and not self.waiting:
            return self.itl_budget.prompt_budget([], ())  # no prompt asks for it
        num_free = 0 if self._is_admission_blocked else len(self._free_slots)
        streams = chain(self.running, islice(self.waiting, num_free))
        return self.itl_budget.prompt_budget(decodes, (self._demand(request) for request in streams))

    def _demand(self, request: Request) -> Demand:
        growth = self.admission_control.expected_growth(request)
        return Demand.of(request, request.num_tokens - request.num_prompt_tokens + growth)

    def _is_ready(self, request: Request) -> bool:
        """Returns whether the request can be computed before the results of the steps in flight are known."""
        if not request.num_pending_tokens:
            return request.num_uncomputed_tokens > 0
        must_wait = request.must_wait_for_result or (self.proposer and self.proposer.needs_result)
        return not must_wait and not request.num_draft_tokens and not request.has_reached_limit(self.config.max_seq_len)

    def _take_turns(self, requests: list[Request]) -> tuple[list[Request], int]:
        """Returns the requests that may be computed, and the number of tokens of the step for them.

        If there are more requests than tokens, those that have waited longest take their turn, and one token is left to
        admit another request.
        """
        budget = self.config.max_num_batched_tokens
        can_admit = self.waiting and not self._is_admission_blocked and len(self.running) < self.config.max_num_seqs
        if len(requests) >= budget > 1 and can_admit:
            budget -= 1
        if len(requests) <= budget:
            return requests, budget
        turn = nsmallest(budget, requests, key=lambda r: r.last_turn)
        for request in turn:
            self._last_turn += 1
            request.last_turn = self._last_turn
        first = self._last_turn - budget
        return [r for r in requests if r.last_turn > first], budget

    def _allocate_slots(self, request: Request, num_tokens: int) -> NewBlocks | None:
        """Allocates blocks for `num_tokens` more tokens, preempting the newest requests if too few are free.

        Returns None if `request` must wait: it was preempted itself, or a step in flight uses blocks that are free
        afterwards.
        """
        while (new_blocks := self.kv_cache_manager.allocate_slots(request, num_tokens)) is None:
            self._is_short_of_blocks = True
            if self._frees_blocks_soon() or (self.running[-1] is request and request.num_in_flight):
                return None  # a step in flight may also free blocks outside a window
            victim = self.running.pop()
            self._preempt(victim)
            if victim is request:
                return None
        return new_blocks

    def _frees_blocks_soon(self) -> bool:
        """Returns whether the result of a step in flight will free blocks."""
        if self._num_releasing:
            return True
        return any(r.num_pending_tokens and r.has_reached_limit(self.config.max_seq_len) for r in self.running)

    def _preempt(self, request: Request) -> None:
        """Moves a request, already removed from `running`, to the head of the waiting queue.

        Its prompt and output are recomputed later, except for a prefix that is then still in the prefix cache.
        """
        self._leave_batch(request)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)
        self.stats.preemptions += 1

    def _make_chunk(
        self, request: Request, num_tokens: int, new_blocks: NewBlocks, is_new: bool = False
    ) -> ScheduledChunk:
        """Returns the chunk of the next `num_tokens` tokens, and counts them as computed."""
        start = request.num_computed_tokens
        end = start + num_tokens
        is_last, is_pooled = end == request.num_tokens, request.params.pooling
        num_sampled = int(is_last and not is_pooled)
        num_prompt_logprobs = (
            min(num_tokens, request.num_prompt_tokens - 1 - start) if request.wants_prompt_logprobs else 0
        )
        token_ids = request.tokens[start : min(end, request.num_tokens_at_start)]
        request.num_computed_tokens = end
        request.num_pending_tokens += num_sampled
        request.num_in_flight += 1
        return ScheduledChunk(
            request,
            start,
            num_tokens,
            token_ids,
            num_sampled=num_sampled,
            is_pooled=is_last and is_pooled,
            num_prompt_logprobs=num_prompt_logprobs,
            is_new=is_new,
            new_blocks=new_blocks,
        )

    def _add_drafts(self, chunks: list[ScheduledChunk], proposer: DraftProposer) -> None:
        """Adds draft tokens to decodes if tokens and free blocks are left. Never preempts a request for a draft."""
        budget = min(self._budget(chunks), max(MIN_DRAFT_BUDGET, len(chunks)))
        for index, chunk in enumerate(chunks):
            if chunk.num_tokens == chunk.num_sampled == 1:
                chunks[index] = self._with_drafts(chunk, proposer.propose(chunk.request), budget)
                budget -= len(chunks[index].draft_tokens)

    def _with_drafts(self, chunk: ScheduledChunk, drafts: list[int], budget: int) -> ScheduledChunk:
        """Returns the chunk of a decode with the first `budget` drafts, as far as limits and free blocks allow.

        Until the result is known, the request counts them as computed tokens.
        """
        request = chunk.request
        num_tokens_left = min(
            request.params.max_tokens + request.num_prompt_tokens - request.num_tokens,
            self.config.max_seq_len - request.num_tokens,
        )
        drafts = drafts[: min(budget, num_tokens_left)]
        new_blocks = self.kv_cache_manager.allocate_slots(request, len(drafts))
        if new_blocks is None:
            return chunk
        request.num_computed_tokens += len(drafts)
        request.num_pending_tokens += len(drafts)
        request.num_draft_tokens = len(drafts)
        return replace(
            chunk,
            num_tokens=chunk.num_tokens + len(drafts),
            token_ids=chunk.token_ids + drafts,
            draft_tokens=drafts,
            num_sampled=chunk.num_sampled + len(drafts),
            new_blocks=chunk.new_blocks + new_blocks,
        )

    # Waiting requests

    def _admit_waiting(self, scheduled: list[ScheduledChunk]) -> list[ScheduledChunk]:
        admitted: list[ScheduledChunk] = []
        budget = self._budget(scheduled)
        num_prefills = sum(1 for c in scheduled if c.num_tokens > 1 + len(c.draft_tokens))
        while budget > 0 and self._can_admit(num_prefills + len(admitted)):
            chunk = self._admit(self.waiting[0], budget)
            if not chunk:
                break  # first come, first served: smaller requests further back wait too
            admitted.append(chunk)
            self._prompt_budget.take(chunk)
            budget -= chunk.num_tokens
        return admitted

    def _budget(self, chunks: Sequence[ScheduledChunk]) -> int:
        """Returns the tokens that these chunks leave in the step."""
        return self.config.max_num_batched_tokens - sum(c.num_tokens for c in chunks)

    def _can_admit(self, num_prefills: int) -> bool:
        if not self.waiting or self._is_admission_blocked or self.waiting[0].num_in_flight:
            return False
        if self.config.max_num_prefills and num_prefills >= self.config.max_num_prefills:
            return False
        return len(self.running) < self.config.max_num_seqs

    def _admit(self, request: Request, limit: int) -> ScheduledChunk | None:
        """Starts the first waiting request and returns its first chunk, or None if it has to wait."""
        prefix = self.kv_cache_manager.find_cached_prefix(request)
        num_tokens = self._prompt_budget.chunk_size(request, prefix.num_tokens, limit)
        if num_tokens <= 0:
            return None
        pool = self.kv_cache_manager.pool
        if pool.is_short_of_memory and self.admission_control.min_blocks(request) > pool.num_usable:
            return None  # it would be preempted again before it gets further
        if self.running and not self.admission_control.fits(self.running, request, prefix):
            self._is_admission_blocked = True
            return None
        new_blocks = self.kv_cache_manager.start_request(request, prefix, num_tokens)
        if new_blocks is None:
            return None
        self.waiting.popleft()
        self.running.append(request)
        request.slot = self._free_slots.pop()
        request.num_tokens_at_start = request.num_tokens
        request.prompt_logprobs.clear()
        if not request.queue_ms:  # only at the first start, not after a preemption
            request.queue_ms = (time.monotonic() - request.arrival_time) * 1000 or 0.001
            request.cached_tokens = prefix.num_tokens
            self.stats.prefix_queries += request.num_tokens
            self.stats.prefix_hits += prefix.num_tokens
            self.itl_budget.record_admission(self._demand(request))
        return self._make_chunk(request, num_tokens, new_blocks, is_new=True)

    # Results

    def _apply_result(self, chunk: ScheduledChunk, sampled: list[int] | None) -> RequestUpdate:
        request = chunk.request
        request.num_pending_tokens -= chunk.num_sampled
        request.num_draft_tokens -= len(chunk.draft_tokens)
        if request.has_ended:
            return RequestUpdate(request, [], None)
        if sampled is None:
            self.kv_cache_manager.evict(request)
            self.finish(request)
            return RequestUpdate(request, [], "error")
        tokens, finish = self._append(request, sampled)
        num_rejected = chunk.num_sampled - len(sampled)
        if num_drafts := len(chunk.draft_tokens):
            self.stats.drafts += 1
            self.stats.draft_tokens += num_drafts
            self.stats.accepted_tokens += num_drafts - num_rejected
        end = chunk.start + chunk.num_tokens - num_rejected
        self._publish(request, chunk.start, min(end, len(request.tokens)))
        if finish:
            self.finish(request)
        elif num_rejected and request.slot >= 0:
            request.num_computed_tokens = self._rewinds[request.slot] = end
        return RequestUpdate(request, tokens, finish)

    def _append(self, request: Request, sampled: list[int]) -> tuple[list[int], FinishReason | None]:
        """Appends tokens up to the one that ends the request. Returns the appended tokens and the finish reason."""
        finish: FinishReason | None = None if sampled else "stop"  # a pooled request
        num_tokens = len(request.tokens)
        for token in sampled:
            request.tokens.append(token)
            finish = request.finish_reason(self.config.max_seq_len)
            if finish:
                break
        return request.tokens[num_tokens:], finish

    def _publish(self, request: Request, start: int, end: int) -> None:
        """Adds the blocks that the tokens [start, end) have filled to the prefix cache.

        Frees the blocks that later tokens do not see.
        """
        self.kv_cache_manager.cache_full_blocks(request, start, end)
        self.stats.window_freed += self.kv_cache_manager.free_outside_windows(request, end)
        if end - start > 1:
            self._is_admission_blocked = False  # a waiting request may share the prompt

    def _leave_batch(self, request: Request) -> None:
        """Frees the slot of a request that is no longer in `running`, and its blocks if no step in flight uses them."""
        self._ended_slots.append(request.slot)
        self._free_slots.append(request.slot)
        self._rewinds.pop(request.slot, None)
        request.slot = -1
        if request.num_in_flight:
            self._num_releasing += 1
        else:
            self._release_blocks(request)

    def _release_blocks(self, request: Request) -> None:
        self.kv_cache_manager.release(request)
        self._is_admission_blocked = False
