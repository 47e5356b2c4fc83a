"""The scheduler, checked with a model of the KV cache that records for each slot which prefix it was computed from.

If a block is shared by mistake, or overwritten while another request reads it, the recorded prefix is wrong.
"""

import gc
import sys
import time
from collections import Counter, deque
from dataclasses import replace
from itertools import pairwise, takewhile
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rtp_llm.contract.kv_cache import KVCacheGroup
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.engine.block_pool import BlockPool
from rtp_llm.engine.memory_budget import MemoryBudget
from rtp_llm.engine.scheduler import STARVING_SECONDS, Scheduler
from rtp_llm.engine.scheduler_output import ScheduledChunk, SchedulerOutput
from tests.unit.scheduling import (
    BLOCK_SIZE,
    FixedProposer,
    chunks_of,
    complete,
    make_group,
    make_request,
    make_scheduler,
    step,
)


def test_prompt_then_one_token_per_step() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5))
    assert [step(scheduler) for _ in range(3)] == [[("a", 0, 5)], [("a", 5, 1)], [("a", 6, 1)]]


def test_long_prompt_is_computed_in_chunks() -> None:
    scheduler = make_scheduler(tokens=8)
    scheduler.add(make_request("a", 20))
    assert [step(scheduler) for _ in range(4)] == [[("a", 0, 8)], [("a", 8, 8)], [("a", 16, 4)], [("a", 20, 1)]]


def test_prefill_chunk_is_smaller_beside_decodes() -> None:
    scheduler = make_scheduler(tokens=8)
    scheduler.add(make_request("a", 3))
    step(scheduler)
    scheduler.add(make_request("b", 20))
    assert step(scheduler) == [("a", 3, 1), ("b", 0, 4)]
    assert step(scheduler) == [("a", 4, 1), ("b", 4, 4)]


def test_max_mixed_chunk_limits_prefills_beside_decodes() -> None:
    scheduler = make_scheduler(tokens=8, max_mixed_chunk=2)
    scheduler.add(make_request("a", 3))
    step(scheduler)
    scheduler.add(make_request("b", 20))
    assert step(scheduler) == [("a", 3, 1), ("b", 0, 2)]


def test_prefill_leaves_budget_for_later_decodes() -> None:
    scheduler = make_scheduler(tokens=4, sequences=3, max_mixed_chunk=4)
    scheduler.add(make_request("a", 2))
    scheduler.add(make_request("b", 10))
    assert step(scheduler) == [("a", 0, 2), ("b", 0, 2)]
    scheduler.running.reverse()
    assert step(scheduler) == [("a", 2, 1), ("b", 2, 3)]  # decodes come first


def test_first_come_first_served_even_if_a_later_request_would_fit() -> None:
    scheduler = make_scheduler(blocks=6, tokens=32)
    scheduler.add(make_request("a", 16))
    scheduler.add(make_request("b", 16))
    scheduler.add(make_request("c", 1))
    assert [name for name, _, _ in step(scheduler)] == ["a"]
    assert [r.id for r in scheduler.waiting] == ["b", "c"]


def test_max_num_seqs() -> None:
    scheduler = make_scheduler(sequences=2)
    for name in "abc":
        scheduler.add(make_request(name, 2))
    assert [name for name, _, _ in step(scheduler)] == ["a", "b"]
    scheduler.finish(scheduler.running[0])
    assert [name for name, _, _ in step(scheduler)] == ["b", "c"]


def test_max_num_prefills() -> None:
    scheduler = make_scheduler(max_num_prefills=1)
    for name in "ab":
        scheduler.add(make_request(name, 2))
    assert [[name for name, _, _ in step(scheduler)] for _ in range(2)] == [["a"], ["a", "b"]]


def test_newest_request_is_preempted_and_recomputes_prompt_and_output() -> None:
    scheduler = make_scheduler(blocks=4, tokens=16)
    scheduler.add(make_request("a", 7))
    scheduler.add(make_request("b", 7))
    assert step(scheduler) == [("a", 0, 7), ("b", 0, 7)]
    assert step(scheduler) == [("a", 7, 1), ("b", 7, 1)]
    assert step(scheduler) == [("a", 8, 1)]  # the ninth token of a needs a third block, so b is preempted
    assert [r.id for r in scheduler.waiting] == ["b"]
    assert (scheduler.waiting[0].num_tokens, scheduler.waiting[0].num_computed_tokens, scheduler.stats.preemptions) == (
        9,
        0,
        1,
    )
    scheduler.finish(scheduler.running[0])
    assert step(scheduler) == [("b", 4, 5)]  # its first block is still cached


def test_step_with_a_preemption_admits_no_request() -> None:
    scheduler = make_scheduler(blocks=4, tokens=16)
    scheduler.add(make_request("a", 7))
    scheduler.add(make_request("b", 7))
    step(scheduler)
    step(scheduler)
    scheduler.add(make_request("c", 1))
    assert [name for name, _, _ in step(scheduler)] == ["a"]


def test_last_request_preempts_itself() -> None:
    scheduler = make_scheduler(blocks=1, tokens=16)
    scheduler.add(make_request("a", 4))
    assert step(scheduler) == [("a", 0, 4)]
    assert step(scheduler) == []  # longer than the cache; the API rejects such requests
    assert [r.id for r in scheduler.waiting] == ["a"]
    assert scheduler.kv_cache_manager.pool.num_free == 1


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_removed_request_frees_its_blocks(steps: int) -> None:
    scheduler = make_scheduler(tokens=4)
    scheduler.add(make_request("a", 10))
    for _ in range(steps):
        step(scheduler)
    assert scheduler.remove("a") is not None
    assert (scheduler.kv_cache_manager.pool.num_used, scheduler.running, list(scheduler.waiting)) == (0, [], [])
    assert scheduler.remove("a") is None


def test_blocks_of_an_invalid_request_are_evicted() -> None:
    scheduler = make_scheduler(tokens=32)
    scheduler.add(make_request("a", list(range(9))))
    output = scheduler.schedule()
    [update] = scheduler.update(output, [None])
    assert (update.tokens, update.finish) == ([], "error")
    assert scheduler.kv_cache_manager.pool.num_used == 0
    scheduler.add(make_request("b", list(range(9))))
    assert step(scheduler) == [("b", 0, 9)]


def test_cached_prefix_is_not_recomputed() -> None:
    scheduler = make_scheduler(tokens=32)
    scheduler.add(make_request("a", list(range(10))))
    step(scheduler)
    scheduler.add(make_request("b", [*range(8), 99, 98]))
    assert step(scheduler) == [("a", 10, 1), ("b", 8, 2)]
    assert (scheduler.running[1].cached_tokens, scheduler.stats.prefix_hits, scheduler.stats.prefix_queries) == (
        8,
        8,
        20,
    )


@pytest.mark.parametrize("length", [4, 5, 8, 9])
def test_cache_hit_never_covers_the_whole_prompt(length: int) -> None:
    scheduler = make_scheduler(tokens=32)
    for name in "ab":
        scheduler.add(make_request(name, list(range(length))))
        step(scheduler)
    assert scheduler.running[1].cached_tokens == (length - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_prompt_logprobs_skip_the_prefix_cache() -> None:
    scheduler = make_scheduler(tokens=32)
    scheduler.add(make_request("a", list(range(9))))
    step(scheduler)
    scheduler.add(make_request("b", list(range(9)), prompt_logprobs=True))
    assert step(scheduler)[1] == ("b", 0, 9)


def test_prefix_cache_depends_on_the_salt() -> None:
    scheduler = make_scheduler(tokens=32)
    scheduler.add(make_request("a", list(range(9))))
    step(scheduler)
    salted = make_request("b", list(range(9)))
    salted.extra_keys = ("a salt of more than sixteen bytes",)
    scheduler.add(salted)
    assert step(scheduler)[1] == ("b", 0, 9)


def test_prefix_cache_can_be_skipped() -> None:
    scheduler = make_scheduler(tokens=32)
    scheduler.add(make_request("a", list(range(9))))
    step(scheduler)
    request = make_request("b", list(range(9)))
    request.skip_prefix_cache = True
    scheduler.add(request)
    assert step(scheduler)[1] == ("b", 0, 9)


def test_chunks_end_at_tiles() -> None:
    """A recomputed prompt then has the same chunks, whatever else ran beside it the first time."""
    scheduler = make_scheduler(blocks=100, tokens=50)
    scheduler.add(make_request("a", 100))
    assert [step(scheduler) for _ in range(3)] == [[("a", 0, 48)], [("a", 48, 48)], [("a", 96, 4)]]
    scheduler.add(make_request("b", 100))
    scheduler.add(make_request("c", 100))
    assert step(scheduler) == [("a", 100, 1), ("b", 0, 16), ("c", 0, 16)]


def test_chunk_that_misses_a_tile_waits_only_for_another_prefill() -> None:
    scheduler = make_scheduler(blocks=100, tokens=33, sequences=20)
    scheduler.add(make_request("a", 20))
    scheduler.add(make_request("b", 40))
    assert step(scheduler) == [("a", 0, 20)]  # 13 tokens are left
    assert step(scheduler) == [("a", 20, 1), ("b", 0, 16)]
    scheduler = make_scheduler(blocks=100, tokens=33, sequences=20)
    for name in "abcdefghijklmnopqrs":
        scheduler.add(make_request(name, 1))
    scheduler.add(make_request("t", 40))
    # The other 19 tokens of each step belong to the others.
    assert [step(scheduler)[-1] for _ in range(3)] == [("t", 0, 14), ("t", 14, 2), ("t", 16, 14)]


@pytest.mark.parametrize(("num_streams", "tokens"), [(8, 4), (9, 2), (5, 3), (3, 1)])
@pytest.mark.parametrize("depth", [0, 1])
def test_streams_take_turns_if_a_step_has_too_few_tokens(num_streams: int, tokens: int, depth: int) -> None:
    """With one token per step, the next request starts when the first has ended."""
    scheduler = make_scheduler(blocks=800, tokens=tokens, sequences=num_streams)
    requests = [make_request(chr(97 + i), 5) for i in range(num_streams)]
    for request in requests:
        scheduler.add(request)
    in_flight: deque[SchedulerOutput] = deque()
    steps_of: dict[str, list[int]] = {r.id: [] for r in requests}  # that computed a token of a decode
    for number in range(300):
        in_flight.append(scheduler.schedule())
        for chunk in in_flight[-1].chunks:
            if chunk.start >= 5:
                steps_of[chunk.request.id].append(number)
        if len(in_flight) > depth:
            complete(scheduler, in_flight.popleft())
    started = [steps for steps in steps_of.values() if steps]
    assert len(started) == (num_streams if tokens > 1 else 300 // 104 + 1)
    for steps in started if tokens > 1 else []:
        assert max(b - a for a, b in pairwise(steps)) <= -(-num_streams // (tokens - 1)) + depth


def test_running_prompt_takes_turns_with_decodes() -> None:
    scheduler = make_scheduler(blocks=400, tokens=4, sequences=5)
    for name in "abcd":
        scheduler.add(make_request(name, 1))
    step(scheduler)
    scheduler.add(make_request("e", 30))
    num_steps = 0
    while scheduler.running[-1].id != "e" or scheduler.running[-1].num_output_tokens == 0:
        step(scheduler)
        num_steps += 1
    assert num_steps <= 40


# Steps in flight


def test_next_step_is_scheduled_before_the_token_is_known() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5, 3))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert [chunks_of(first), chunks_of(second)] == [[("a", 0, 5)], [("a", 5, 1)]]
    assert [c.token_ids for c in (*first.chunks, *second.chunks)] == [[97] * 5, []]  # ranks hold the sampled token
    complete(scheduler, first, token=7)
    third = scheduler.schedule()
    assert chunks_of(third) == [("a", 6, 1)]
    assert chunks_of(scheduler.schedule()) == []  # the third token is the last
    complete(scheduler, second, token=8)
    [update] = scheduler.update(third, [[9]])
    assert (update.request.output, update.tokens, update.finish) == ([7, 8, 9], [9], "length")
    assert scheduler.kv_cache_manager.pool.num_used == 0


def test_max_seq_len_ends_scheduling_ahead() -> None:
    scheduler = make_scheduler(max_seq_len=6)
    scheduler.add(make_request("a", 5))
    first = scheduler.schedule()
    assert chunks_of(scheduler.schedule()) == []
    [update] = scheduler.update(first, [[7]])
    assert update.finish == "length"


def test_result_after_the_end_is_discarded_and_blocks_are_freed_with_it() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 5, stop_token_ids=(2,))
    scheduler.add(request)
    first, second = scheduler.schedule(), scheduler.schedule()
    [update] = scheduler.update(first, [[2]])
    assert (update.tokens, update.finish) == ([2], "stop")
    assert scheduler.kv_cache_manager.pool.num_used == 2, "freed while a step in flight uses them"
    [update] = scheduler.update(second, [[3]])
    assert (update.tokens, update.finish, request.output) == ([], None, [2])
    assert scheduler.kv_cache_manager.pool.num_used == 0


def test_aborted_request_keeps_its_blocks_until_its_step_is_known() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5))
    output = scheduler.schedule()
    assert scheduler.remove("a") is not None
    assert scheduler.kv_cache_manager.pool.num_used == 2
    scheduler.add(make_request("b", 1))
    following = scheduler.schedule()
    assert following.ended_slots == [output.chunks[0].request.slot, 0][1:]
    assert following.chunks[0].request.slot == 0
    complete(scheduler, output)
    assert scheduler.kv_cache_manager.pool.num_used == 1


def test_preempted_request_keeps_the_token_of_the_step_in_flight() -> None:
    scheduler = make_scheduler(blocks=4, tokens=16)
    older, newer = make_request("a", 7), make_request("b", 7)
    scheduler.add(older)
    scheduler.add(newer)
    first, second = scheduler.schedule(), scheduler.schedule()
    complete(scheduler, first, token=5)
    assert chunks_of(scheduler.schedule()) == []  # a needs a third block, which b frees when the step is known
    assert (scheduler.running, list(scheduler.waiting), newer.num_in_flight) == ([older], [newer], 1)
    complete(scheduler, second, token=6)
    assert (newer.output, newer.num_computed_tokens, newer.block_tables) == ([5, 6], 0, [])
    third = scheduler.schedule()
    assert chunks_of(third) == [("a", 8, 1)]
    assert third.ended_slots == [1]


def test_preempted_request_is_not_admitted_while_its_step_is_in_flight() -> None:
    scheduler = make_scheduler(blocks=4)
    older, newer = make_request("a", 8), make_request("b", 7)
    older.must_wait_for_result = True
    scheduler.add(older)
    scheduler.add(newer)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert chunks_of(second) == [("b", 7, 1)]
    complete(scheduler, first)
    assert chunks_of(scheduler.schedule()) == []  # a needs a third block, so b is preempted
    scheduler.remove("a")
    scheduler.config = replace(scheduler.config, max_num_batched_tokens=8)
    assert chunks_of(scheduler.schedule()) == []  # the first chunk of b would fit
    complete(scheduler, second)
    assert chunks_of(scheduler.schedule()) == [("b", 8, 1)]  # its blocks are in the prefix cache


def test_request_that_must_wait_holds_up_no_other() -> None:
    scheduler = make_scheduler()
    waiting = make_request("a", 3)
    waiting.must_wait_for_result = True
    scheduler.add(waiting)
    scheduler.add(make_request("b", 3))
    first = scheduler.schedule()
    assert chunks_of(scheduler.schedule()) == [("b", 3, 1)]
    complete(scheduler, first)
    assert chunks_of(scheduler.schedule()) == [("a", 3, 1), ("b", 4, 1)]


def test_pooled_request_ends_without_a_token() -> None:
    scheduler = make_scheduler(tokens=4)
    scheduler.add(make_request("a", 6, pooling=True))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [(c.is_pooled, c.num_sampled) for c in (*first.chunks, *second.chunks)] == [(False, 0), (True, 0)]
    assert scheduler.schedule().chunks == []
    assert scheduler.update(first, []) == []
    [update] = scheduler.update(second, [])
    assert (update.tokens, update.finish) == ([], "stop")
    assert scheduler.kv_cache_manager.pool.num_used == 0


def test_prompt_logprobs_of_chunks() -> None:
    """All prompt tokens but the first have one; a chunk gives those of the tokens after its own."""
    scheduler = make_scheduler(tokens=4)
    scheduler.add(make_request("a", 6, prompt_logprobs=True))
    outputs = [scheduler.schedule() for _ in range(3)]
    assert [o.chunks[0].num_prompt_logprobs for o in outputs] == [4, 1, 0]


# Draft tokens


def make_drafting_scheduler(drafts: list[int], **limits: Any) -> tuple[Scheduler, Request]:
    """Returns a scheduler that has computed a prompt of 5 tokens, and the request."""
    scheduler = make_scheduler(**limits)
    scheduler.proposer = FixedProposer(drafts)
    request = make_request("a", 5, 10)
    scheduler.add(request)
    complete(scheduler, scheduler.schedule())
    return scheduler, request


def test_draft_tokens_are_computed_and_rejected_ones_are_rewound() -> None:
    scheduler, request = make_drafting_scheduler([11, 12, 13])
    output = scheduler.schedule()
    [chunk] = output.chunks
    assert (chunk.start, chunk.num_tokens, chunk.num_sampled) == (5, 4, 4)
    assert (chunk.token_ids, chunk.draft_tokens) == ([11, 12, 13], [11, 12, 13])
    assert chunk.new_blocks == [(0, 2, request.block_tables[0][2])]
    assert scheduler.schedule().chunks == []  # which drafts are accepted is not known
    [update] = scheduler.update(output, [[11, 22]])
    assert (update.tokens, request.num_computed_tokens, request.num_uncomputed_tokens) == ([11, 22], 7, 1)
    assert (scheduler.stats.drafts, scheduler.stats.draft_tokens, scheduler.stats.accepted_tokens) == (1, 3, 1)
    following = scheduler.schedule()
    assert following.rewinds == [(request.slot, 7)]
    assert (following.chunks[0].start, following.chunks[0].new_blocks) == (7, [])


def test_accepted_drafts_need_no_rewind() -> None:
    scheduler, request = make_drafting_scheduler([11, 12])
    scheduler.update(scheduler.schedule(), [[11, 12, 13]])
    assert (request.output[1:], request.num_uncomputed_tokens) == ([11, 12, 13], 1)
    assert (scheduler.stats.drafts, scheduler.stats.draft_tokens, scheduler.stats.accepted_tokens) == (1, 2, 2)
    assert scheduler.schedule().rewinds == []


def test_tokens_after_the_end_of_a_request_are_dropped() -> None:
    scheduler, request = make_drafting_scheduler([2, 12, 13])
    request.params = replace(request.params, stop_token_ids=(2,))
    [update] = scheduler.update(scheduler.schedule(), [[2, 12, 13, 14]])
    assert (update.tokens, update.finish, request.output) == ([2], "stop", [1, 2])
    assert len(request.block_hashes[BLOCK_SIZE]) == 1  # the second block is not full without the dropped tokens


def test_request_that_has_ended_is_not_rewound() -> None:
    """A new request may have its slot."""
    scheduler, _ = make_drafting_scheduler([11, 12, 13])
    scheduler.update(scheduler.schedule(), [[22]])
    scheduler.remove("a")
    scheduler.add(make_request("b", 3))
    output = scheduler.schedule()
    assert (output.ended_slots, output.rewinds, output.chunks[0].request.slot) == ([0], [], 0)


@pytest.mark.parametrize(
    ("max_tokens", "limits", "num_drafts"),
    [
        (10, {}, 3),
        (3, {}, 1),
        (2, {}, 0),
        (10, {"max_seq_len": 8}, 1),
        (10, {"tokens": 3}, 2),
        (10, {"blocks": 2}, 0),  # two tokens fit in the second block, but four drafts do not
    ],
)
def test_drafts_are_limited(max_tokens: int, limits: dict[str, Any], num_drafts: int) -> None:
    scheduler, request = make_drafting_scheduler([11, 12, 13], **limits)
    while request.num_uncomputed_tokens != 1 or not request.num_output_tokens:
        complete(scheduler, scheduler.schedule())
    request.params = replace(request.params, max_tokens=max_tokens)
    assert [len(c.draft_tokens) for c in scheduler.schedule().chunks] == [num_drafts]
    assert scheduler.stats.preemptions == 0


def test_drafts_preempt_no_request() -> None:
    scheduler = make_scheduler(blocks=4)
    scheduler.proposer = FixedProposer([11, 12, 13])
    for name in "ab":
        scheduler.add(make_request(name, 7))
    step(scheduler)
    assert step(scheduler) == [("a", 7, 1), ("b", 7, 1)]
    assert scheduler.stats.preemptions == 0


def test_work_of_a_step_does_not_grow_with_the_context() -> None:
    """Counts the Python function calls of a decode step, with few and with many blocks per request."""
    counts = []
    for prompt in (8, 8000):
        scheduler = make_scheduler(blocks=20000, tokens=40000)
        for name in "abcd":
            scheduler.add(make_request(name, prompt + 1))
        step(scheduler)
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        gc.disable()  # hypothesis has callbacks there
        sys.setprofile(count)
        step(scheduler)
        sys.setprofile(None)
        gc.enable()
        counts.append(calls)
    assert counts[0] == counts[1]


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20)
SlotContent = tuple[tuple[str | bytes, ...], tuple[int, ...]]  # extra keys, prefix up to this slot


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, schedules, completes and aborts random requests; steps are scheduled ahead of the results of others."""

    @initialize(
        blocks=st.integers(6, 14),
        sequences=st.integers(1, 4),
        tokens=st.integers(4, 12),
        prefills=st.integers(0, 2),
        mixed_chunk=st.integers(0, 12),
        enable_caching=st.booleans(),
        admit_all=st.booleans(),
        depth=st.integers(0, 2),
        drafts=st.sampled_from([[], [], [1, 0, 1]]),
        needs_result=st.booleans(),
    )
    def start(
        self,
        blocks: int,
        sequences: int,
        tokens: int,
        prefills: int,
        mixed_chunk: int,
        enable_caching: bool,
        admit_all: bool,
        depth: int,
        drafts: list[int],
        needs_result: bool,
    ) -> None:
        self.scheduler = make_scheduler(
            blocks,
            tokens,
            sequences,
            enable_caching=enable_caching,
            admit_all=admit_all,
            max_num_prefills=prefills,
            max_mixed_chunk=mixed_chunk,
            max_seq_len=blocks * BLOCK_SIZE,
        )
        self.config, self.pool = self.scheduler.config, self.scheduler.kv_cache_manager.pool
        self.scheduler.proposer = FixedProposer(drafts, needs_result) if drafts else None
        self.depth = depth
        self.in_flight: deque[SchedulerOutput] = deque()
        self.requests: list[Request] = []
        self.batch: dict[int, Request] = {}  # by slot, as the ranks know it from the outputs
        # By (block, offset): what the key and value in this slot were computed from.
        self.slot_contents: dict[tuple[int, int], SlotContent] = {}

    @rule(
        prompt=PROMPTS,
        output=st.lists(st.integers(0, 1), max_size=3),
        max_tokens=st.integers(4, 12),
        salt=st.sampled_from(["", "", "s"]),
        kind=st.sampled_from(["", "", "prompt_logprobs", "pooling"]),
        must_wait=st.sampled_from([False, False, True]),
    )
    def add(self, prompt: list[int], output: list[int], max_tokens: int, salt: str, kind: str, must_wait: bool) -> None:
        params = SamplingParams(
            max_tokens,
            stop_token_ids=(2,),
            prompt_logprobs=0 if kind == "prompt_logprobs" else None,
            pooling=kind == "pooling",
        )
        request = Request(f"r{len(self.requests)}", prompt, params, [] if params.pooling else output)
        request.extra_keys = (salt,) if salt else ()
        request.must_wait_for_result = must_wait
        self.requests.append(request)
        self.scheduler.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        requests = [*self.scheduler.running, *self.scheduler.waiting]
        if requests:
            request = data.draw(st.sampled_from(requests))
            assert self.scheduler.remove(request.id) is request
            assert request.has_ended
            assert bool(request.block_tables) == bool(request.num_in_flight)
            assert self.scheduler.remove(request.id) is None

    @rule(tokens=st.lists(st.sampled_from([0, 0, 1, 1, 1, 2, None]), min_size=1, max_size=9))
    def step(self, tokens: list[int | None]) -> None:
        """Launches a step, then completes the oldest one if more than `depth` are in flight, as the engine does.

        `tokens`: that the chunks of the completed step sample, in turn; None: their logits are invalid.
        """
        running_before = list(self.scheduler.running)
        decoding = [r for r in running_before if r.num_uncomputed_tokens == 1]
        had_work = bool(running_before or self.scheduler.waiting)
        preemptions = self.scheduler.stats.preemptions
        output = self.scheduler.schedule()
        assert output.chunks or self.in_flight or not had_work, "there are requests, but none is scheduled"
        self.check_limits(output.chunks, running_before)
        scheduled = {c.request.id for c in output.chunks}
        missing = [r for r in decoding if r in self.scheduler.running and r.id not in scheduled]
        if missing and not self.in_flight:
            is_ending = any(c.request.has_reached_limit(self.config.max_seq_len) for c in output.chunks)
            assert is_ending, "a decode is left out, though no other is about to end"
            assert not self.pool.num_free, "a decode is left out, though blocks are free"
        if self.scheduler.stats.preemptions > preemptions:
            assert not any(c.is_new for c in output.chunks), "a step with a preemption admits a request"
        if output.chunks:
            self.launch(output)
        if self.in_flight and (len(self.in_flight) > self.depth or not output.chunks):
            self.complete(self.in_flight.popleft(), deque(tokens))

    def check_limits(self, chunks: list[ScheduledChunk], running_before: list[Request]) -> None:
        admitted = [c for c in chunks if c.request not in running_before]
        assert [c for c in chunks if c.is_new] == admitted
        assert sum(c.num_tokens for c in chunks) <= self.config.max_num_batched_tokens
        assert all(c.num_tokens > 0 and c.start + c.num_tokens <= c.request.num_tokens for c in chunks)
        assert len({c.request.id for c in chunks}) == len(chunks)
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert len(admitted) <= (self.config.max_num_prefills or len(admitted))
        prefills = [c for c in chunks if c.num_tokens > 1 + len(c.draft_tokens)]
        if any(c.request in running_before and c not in prefills and c.num_sampled for c in chunks):
            limit = self.config.mixed_prefill_chunk
            assert all(c.num_tokens <= limit for c in prefills), "a prefill chunk beside decodes exceeds its limit"
        order = {r.id: index for index, r in enumerate(self.scheduler.running)}
        assert chunks == sorted(chunks, key=lambda c: (c.num_tokens != 1, order[c.request.id]))

    def launch(self, output: SchedulerOutput) -> None:
        """Applies an output to what the ranks know."""
        for slot in output.ended_slots:
            del self.batch[slot]
        for chunk in output.chunks:
            slot = chunk.request.slot
            assert (slot not in self.batch) == chunk.is_new
            assert 0 <= slot < self.config.max_num_seqs
            self.batch[slot] = chunk.request
            table = [(0, index, block) for index, block in enumerate(chunk.request.block_tables[0])]
            assert chunk.new_blocks == (table if chunk.is_new else table[len(table) - len(chunk.new_blocks) :])
        assert all(slot in self.batch for slot, _ in output.rewinds)
        assert {r.id for r in self.batch.values()} == {r.id for r in self.scheduler.running}
        self.in_flight.append(output)

    def complete(self, output: SchedulerOutput, tokens: deque[int | None]) -> None:
        """Computes a step in place of the ranks, and passes the result to the scheduler."""
        results: list[list[int] | None] = []
        for chunk in output.chunks:
            tokens.rotate()
            self.compute(chunk)
            if chunk.num_sampled:
                results.append(None if tokens[0] is None else [*accepted_drafts(chunk), tokens[0]])
        reporting = [(c, c.request.has_ended) for c in output.chunks if c.num_sampled or c.is_pooled]
        updates = self.scheduler.update(output, results)
        for update, (chunk, had_ended) in zip(updates, reporting, strict=True):
            assert update.request is chunk.request
            assert update.request.has_ended == bool(had_ended or update.finish)
            assert not (had_ended and (update.tokens or update.finish))
            assert len(update.request.tokens) <= self.config.max_seq_len
            assert update.request.num_output_tokens <= max(3, update.request.params.max_tokens)

    def compute(self, chunk: ScheduledChunk) -> None:
        """Simulates a rank: writes the slots of the chunk and reads all slots of the request up to its end."""
        request, end = chunk.request, chunk.start + chunk.num_tokens
        if request.has_ended:
            return  # the results are discarded, and the blocks are still its own
        [table] = request.block_tables
        tokens = [*request.tokens[: end - len(chunk.draft_tokens)], *chunk.draft_tokens]
        assert len(tokens) == end, "a token is computed before it is known"
        for position in range(end):
            slot = (table[position // BLOCK_SIZE], position % BLOCK_SIZE)
            content = (request.extra_keys, tuple(tokens[: position + 1]))
            if position >= chunk.start:
                readers = [r for r in self.scheduler.running if r is not request and slot[0] in r.block_tables[0]]
                assert not readers, "wrote into a block that another request reads"
                self.slot_contents[slot] = content
            assert self.slot_contents[slot] == content

    @invariant()
    def no_block_is_leaked_or_held_twice(self) -> None:
        holders = [r for r in self.requests if r.block_tables] if hasattr(self, "requests") else []
        ref_counts = Counter(block for r in holders for block in r.block_tables[0])
        assert not holders or self.pool.num_used == len(ref_counts)
        assert 0 not in ref_counts
        for request in holders:
            [table] = request.block_tables
            assert len(set(table)) == len(table)
            assert request.slot >= 0 or request.num_in_flight
            if request.slot >= 0 and not self.scheduler.proposer:
                assert len(table) == -(-request.num_computed_tokens // BLOCK_SIZE)

    @invariant()
    def counts_agree(self) -> None:
        for request in self.requests if hasattr(self, "requests") else ():
            assert request.num_in_flight == sum(c.request is request for o in self.in_flight for c in o.chunks)
            assert (request.slot >= 0) == (request in self.scheduler.running)
        if hasattr(self, "scheduler"):
            assert all(not r.num_computed_tokens for r in self.scheduler.waiting)

    @invariant()
    def first_come_first_served(self) -> None:
        if hasattr(self, "requests"):
            queue = [*self.scheduler.running, *self.scheduler.waiting]
            assert queue == [r for r in self.requests if not r.has_ended]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not (self.scheduler.running or self.scheduler.waiting or self.in_flight):
                break
            self.step([0])
        assert not self.scheduler.running, "requests do not finish"
        assert self.pool.num_free == self.pool.num_usable


def accepted_drafts(chunk: ScheduledChunk) -> list[int]:
    """Returns the draft tokens that the simulated model accepts: those before the first 0."""
    return list(takewhile(lambda token: token != 0, chunk.draft_tokens))


TestScheduler = pytest.mark.timeout(120)(SchedulerMachine.TestCase)
TestScheduler.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("groups", [[make_group(4, 16)], [make_group(4), make_group(4, 16)]], ids=["window", "both"])
def test_lone_prompt_with_a_window_ends_if_its_blocks_just_suffice(groups: list[KVCacheGroup], depth: int) -> None:
    """With a step in flight, blocks outside the window are free only once its result is known."""
    num_blocks = sum(group.max_resident_blocks(404, 16) for group in groups)
    scheduler = make_scheduler(num_blocks, 16, 4, groups, admit_all=False, enable_caching=False, max_seq_len=404)
    scheduler.add(make_request("a", 400, 4))
    in_flight: deque[SchedulerOutput] = deque()
    for _ in range(200):
        output = scheduler.schedule()
        if output.chunks:
            in_flight.append(output)
        if in_flight and (len(in_flight) > depth or not output.chunks):
            complete(scheduler, in_flight.popleft())
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.stats.preemptions == 0


def test_requests_that_end_in_the_queue_do_not_change_the_expected_length() -> None:
    scheduler = make_scheduler(admit_all=False)
    expected = scheduler.admission_control.typical_length
    for name in "abc":
        scheduler.add(make_request(name, 5))
    for name in "abc":
        scheduler.remove(name)
    assert scheduler.admission_control.typical_length == expected


# Memory


class Host:
    """The memory of a host in blocks, and a scheduler that must fit into it: `free` + what the scheduler has backed."""

    def __init__(self, free: int, **settings: Any):
        self.free = free
        self.scheduler = make_scheduler(**settings)
        pool = BlockPool(1 + self.scheduler.kv_cache_manager.pool.num_free, is_backed=False)
        self.scheduler.kv_cache_manager.pool = pool
        self.scheduler.memory_budget = MemoryBudget(lambda: self.free, reserve_bytes=0, block_bytes=1)
        self.backed: set[int] = set()

    def step(self) -> SchedulerOutput:
        """Computes one step; its new blocks take memory at first touch, and its retired ones give it back."""
        output = self.scheduler.schedule()
        retired = set(output.retired_blocks)
        assert retired <= self.backed
        assert retired.isdisjoint(block for request in self.scheduler.running for block in request.block_tables[0])
        new = {block for chunk in output.chunks for _, _, block in chunk.new_blocks} - (self.backed - retired)
        self.free += len(retired) - len(new)
        self.backed = self.backed - retired | new
        complete(self.scheduler, output)
        return output


def test_no_block_is_touched_for_which_the_host_has_no_memory() -> None:
    host = Host(free=3, blocks=32)
    host.scheduler.add(make_request("a", 4, max_tokens=9))
    host.scheduler.add(make_request("b", 4, max_tokens=9))
    while host.scheduler.running or host.scheduler.waiting:
        assert host.step().chunks
        assert host.free >= 0
    assert host.scheduler.stats.preemptions > 0


def test_blocks_are_given_back_when_others_take_the_memory_and_grow_again() -> None:
    host = Host(free=12, blocks=32)
    for name in "abc":
        host.scheduler.add(make_request(name, 6, max_tokens=18))
    while host.free > 2:
        host.step()
    host.free -= 7  # another program
    output = host.step()
    assert len(output.retired_blocks) >= 5
    assert host.free >= 0
    assert [request.id for request in host.scheduler.running] == ["a"], "the oldest one goes on"
    host.free += 30
    host.step()
    host.step()
    assert [request.id for request in host.scheduler.running] == ["a", "b", "c"]


def test_a_request_without_memory_waits_and_then_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    host = Host(free=2, blocks=32)
    host.scheduler.add(make_request("a", 4, max_tokens=50))
    host.scheduler.add(make_request("b", 1, max_tokens=1))
    outputs = [host.step() for _ in range(20)]
    assert not any(output.starved for output in outputs)
    assert not outputs[-1].chunks, "it does not compute again and again what does not fit"
    now += STARVING_SECONDS
    assert [request.id for request in host.step().starved] == ["a"]
    assert [chunk.request.id for chunk in host.step().chunks] == ["b"]


def test_a_request_that_waits_for_memory_goes_on_with_it() -> None:
    host = Host(free=2, blocks=32)
    host.scheduler.add(make_request("a", 4, max_tokens=50))
    while host.step().chunks:
        pass
    host.free += 20
    while host.scheduler.running or host.scheduler.waiting:
        assert host.step().chunks
