"""The scheduler, checked with a model of the KV cache that records for each slot which prefix it was computed from.

If a block is shared by mistake, or overwritten while another request reads it, the recorded prefix is wrong.
"""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.engine.blocks import BlockPool
from rtp_llm.engine.scheduler import ScheduledChunk, Scheduler, SchedulerConfig

BLOCK_SIZE = 4


def make_scheduler(blocks: int = 16, tokens: int = 16, sequences: int = 4, **limits: int) -> Scheduler:
    return Scheduler(BlockPool(blocks, BLOCK_SIZE), SchedulerConfig(tokens, sequences, **limits))


def make_request(name: str, prompt: int | list[int], max_tokens: int = 100, **params: bool) -> Request:
    """`prompt`: the token ids, or their number; with a number, requests with different names share no prefix."""
    tokens = prompt if isinstance(prompt, list) else [ord(name)] * prompt
    return Request(name, tokens, SamplingParams(max_tokens, **params))  # type: ignore[arg-type]


def step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """Schedules and computes one step, as the engine does. Returns (request id, start, num_tokens) of each chunk."""
    chunks = scheduler.schedule()
    scheduler.update_after_step(chunks)
    for chunk in chunks:
        if chunk.request.num_uncomputed_tokens == 0:
            chunk.request.tokens.append(1)
    return [(c.request.id, c.start, c.num_tokens) for c in chunks]


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
    assert step(scheduler) == [("b", 2, 3), ("a", 2, 1)]


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
    assert scheduler.blocks.num_free == 1


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_removed_request_frees_its_blocks(steps: int) -> None:
    scheduler = make_scheduler(tokens=4)
    scheduler.add(make_request("a", 10))
    for _ in range(steps):
        step(scheduler)
    assert scheduler.remove("a") is not None
    assert (scheduler.blocks.num_used, scheduler.running, list(scheduler.waiting)) == (0, [], [])
    assert scheduler.remove("a") is None


def test_blocks_of_an_invalid_request_are_evicted() -> None:
    scheduler = make_scheduler(tokens=32)
    scheduler.add(make_request("a", list(range(9))))
    step(scheduler)
    scheduler.finish_invalid(scheduler.running[0])
    assert scheduler.blocks.num_used == 0
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
    salted.cache_salt = b"long"
    scheduler.add(salted)
    assert step(scheduler)[1] == ("b", 0, 9)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps, finishes and aborts random requests."""

    @initialize(
        blocks=st.integers(6, 14),
        sequences=st.integers(1, 4),
        tokens=st.integers(4, 12),
        prefills=st.integers(0, 2),
        mixed_chunk=st.integers(0, 12),
        enable_caching=st.booleans(),
    )
    def start(
        self, blocks: int, sequences: int, tokens: int, prefills: int, mixed_chunk: int, enable_caching: bool
    ) -> None:
        self.config = SchedulerConfig(tokens, sequences, prefills, mixed_chunk)
        self.scheduler = Scheduler(BlockPool(blocks, BLOCK_SIZE, enable_caching), self.config)
        self.max_seq_len = blocks * BLOCK_SIZE
        self.arrival_order: dict[str, int] = {}
        # By (block, offset): the salt and the prefix, up to this slot, that its key and value were computed from.
        self.slot_contents: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}

    @rule(
        prompt=PROMPTS,
        output=st.lists(st.integers(0, 1), max_size=3),
        max_tokens=st.integers(4, 12),
        salt=st.sampled_from([b"", b"", b"s"]),
        logprobs=st.sampled_from([False, False, True]),
    )
    def add(self, prompt: list[int], output: list[int], max_tokens: int, salt: bytes, logprobs: bool) -> None:
        name = f"r{len(self.arrival_order)}"
        self.arrival_order[name] = len(self.arrival_order)
        request = Request(name, prompt, SamplingParams(max_tokens, prompt_logprobs=logprobs), output)
        request.cache_salt = salt
        self.scheduler.add(request)

    @precondition(lambda self: self.arrival_order)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        requests = [*self.scheduler.running, *self.scheduler.waiting]
        if requests:
            request = data.draw(st.sampled_from(requests))
            assert self.scheduler.remove(request.id) is request
            assert request.block_ids == []

    @rule(token=st.integers(0, 1))
    def step(self, token: int) -> None:
        running_before = list(self.scheduler.running)
        had_work = bool(running_before or self.scheduler.waiting)
        decoding = [r for r in running_before if r.num_uncomputed_tokens == 1]
        chunks = self.scheduler.schedule()
        assert bool(chunks) == had_work, "there are requests, but none is scheduled"
        self.check_limits(chunks, running_before)
        scheduled = {c.request.id for c in chunks}
        assert all(r.id in scheduled for r in decoding if r in self.scheduler.running), "a decode is not scheduled"
        for chunk in chunks:
            self.compute(chunk)
        self.scheduler.update_after_step(chunks)
        for chunk in chunks:
            self.sample(chunk.request, token)

    def check_limits(self, chunks: list[ScheduledChunk], running_before: list[Request]) -> None:
        admitted = [c for c in chunks if c.request not in running_before]
        assert sum(c.num_tokens for c in chunks) <= self.config.max_num_batched_tokens
        assert all(c.num_tokens > 0 and c.start + c.num_tokens <= c.request.num_tokens for c in chunks)
        assert len({c.request.id for c in chunks}) == len(chunks)
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert len(admitted) <= (self.config.max_num_prefills or len(admitted))
        if any(c.request.num_uncomputed_tokens == 1 for c in chunks if c.request in running_before):
            limit = self.config.mixed_prefill_chunk
            assert all(c.num_tokens <= limit for c in chunks), "a prefill chunk beside decodes exceeds its limit"

    def compute(self, chunk: ScheduledChunk) -> None:
        """Simulates a rank: writes the slots of the chunk and reads all slots of the request up to its end."""
        request, salt = chunk.request, chunk.request.cache_salt
        end = chunk.start + chunk.num_tokens
        assert len(request.block_ids) == self.scheduler.blocks.num_blocks_for(end)
        for position in range(end):
            slot = (request.block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE)
            prefix = (salt, tuple(request.tokens[: position + 1]))
            if position >= chunk.start:
                readers = [r for r in self.scheduler.running if r is not request and slot[0] in r.block_ids]
                assert not readers, "wrote into a block that another request reads"
                self.slot_contents[slot] = prefix
            assert self.slot_contents[slot] == prefix

    def sample(self, request: Request, token: int) -> None:
        if request.num_uncomputed_tokens:
            return
        request.tokens.append(token)
        if request.finish_reason(self.max_seq_len):
            self.scheduler.finish(request)
            assert request.block_ids == []

    @invariant()
    def no_block_is_leaked_or_held_twice(self) -> None:
        if not self.arrival_order:
            return
        ref_counts = Counter(block for r in self.scheduler.running for block in r.block_ids)
        assert self.scheduler.blocks.num_used == len(ref_counts)
        assert all(len(set(r.block_ids)) == len(r.block_ids) for r in self.scheduler.running)
        assert all(not r.block_ids and not r.num_computed_tokens for r in self.scheduler.waiting)

    @invariant()
    def first_come_first_served(self) -> None:
        if self.arrival_order:
            queue = [*self.scheduler.running, *self.scheduler.waiting]
            assert [self.arrival_order[r.id] for r in queue] == sorted(self.arrival_order[r.id] for r in queue)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            self.step(0)
        assert not self.scheduler.running, "requests do not finish"
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks


TestScheduler = pytest.mark.timeout(120)(SchedulerMachine.TestCase)
TestScheduler.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
