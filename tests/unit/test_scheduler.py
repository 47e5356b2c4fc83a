"""The scheduler against a model of what the ranks do: a shadow of the KV cache that knows which prefix each slot holds.

A block that is shared when it must not be, written while another reads it, or leaked shows as a wrong prefix there.
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

SIZE = 4


def scheduler(blocks: int = 16, tokens: int = 16, sequences: int = 4, **limits: int) -> Scheduler:
    return Scheduler(BlockPool(blocks, SIZE), SchedulerConfig(tokens, sequences, **limits))


def request(name: str, prompt: int | list[int], max_tokens: int = 100, **params: bool) -> Request:
    """`prompt`: its tokens, or their number; then no two names share a prefix."""
    tokens = prompt if isinstance(prompt, list) else [ord(name)] * prompt
    return Request(name, tokens, SamplingParams(max_tokens, **params))  # type: ignore[arg-type]


def step(made: Scheduler) -> list[tuple[str, int, int]]:
    """Schedules and computes one step, as the engine does. (request, start, count) of each slice."""
    slices = made.schedule()
    made.update_after_step(slices)
    for piece in slices:
        if piece.request.num_uncomputed_tokens == 0:
            piece.request.tokens.append(1)
    return [(s.request.id, s.start, s.num_tokens) for s in slices]


def test_a_prompt_then_one_token_a_step() -> None:
    made = scheduler()
    made.add(request("a", 5))
    assert [step(made) for _ in range(3)] == [[("a", 0, 5)], [("a", 5, 1)], [("a", 6, 1)]]


def test_a_long_prompt_is_computed_in_chunks() -> None:
    made = scheduler(tokens=8)
    made.add(request("a", 20))
    assert [step(made) for _ in range(4)] == [[("a", 0, 8)], [("a", 8, 8)], [("a", 16, 4)], [("a", 20, 1)]]


def test_a_chunk_leaves_room_for_those_who_decode() -> None:
    made = scheduler(tokens=8)
    made.add(request("a", 3))
    step(made)
    made.add(request("b", 20))
    assert step(made) == [("a", 3, 1), ("b", 0, 4)]
    assert step(made) == [("a", 4, 1), ("b", 4, 4)]


def test_the_size_of_a_chunk_beside_decodes_can_be_set() -> None:
    made = scheduler(tokens=8, max_mixed_chunk=2)
    made.add(request("a", 3))
    step(made)
    made.add(request("b", 20))
    assert step(made) == [("a", 3, 1), ("b", 0, 2)]


def test_a_decode_behind_a_prompt_keeps_its_token() -> None:
    made = scheduler(tokens=4, sequences=3, max_mixed_chunk=4)
    made.add(request("a", 2))
    made.add(request("b", 10))
    assert step(made) == [("a", 0, 2), ("b", 0, 2)]
    made.running.reverse()
    assert step(made) == [("b", 2, 3), ("a", 2, 1)]


def test_first_come_first_served_even_where_a_later_one_would_fit() -> None:
    made = scheduler(blocks=6, tokens=32)
    made.add(request("a", 16))
    made.add(request("b", 16))
    made.add(request("c", 1))
    assert [name for name, _, _ in step(made)] == ["a"]
    assert [r.id for r in made.waiting] == ["b", "c"]


def test_no_more_sequences_than_allowed() -> None:
    made = scheduler(sequences=2)
    for name in "abc":
        made.add(request(name, 2))
    assert [name for name, _, _ in step(made)] == ["a", "b"]
    made.finish(made.running[0])
    assert [name for name, _, _ in step(made)] == ["b", "c"]


def test_no_more_prompts_in_a_step_than_allowed() -> None:
    made = scheduler(max_num_prefills=1)
    for name in "ab":
        made.add(request(name, 2))
    assert [[name for name, _, _ in step(made)] for _ in range(2)] == [["a"], ["a", "b"]]


def test_the_youngest_is_preempted_and_recomputes_prompt_and_output() -> None:
    made = scheduler(blocks=4, tokens=16)
    made.add(request("a", 7))
    made.add(request("b", 7))
    assert step(made) == [("a", 0, 7), ("b", 0, 7)]
    assert step(made) == [("a", 7, 1), ("b", 7, 1)]
    assert step(made) == [("a", 8, 1)]  # a ninth token needs a third block, which b gave
    assert [r.id for r in made.waiting] == ["b"]
    assert (made.waiting[0].num_tokens, made.waiting[0].num_computed_tokens, made.stats.preemptions) == (9, 0, 1)
    made.finish(made.running[0])
    assert step(made) == [("b", 4, 5)]  # its first block was still cached


def test_nobody_is_let_in_in_the_step_that_preempts() -> None:
    made = scheduler(blocks=4, tokens=16)
    made.add(request("a", 7))
    made.add(request("b", 7))
    step(made)
    step(made)
    made.add(request("c", 1))
    assert [name for name, _, _ in step(made)] == ["a"]


def test_the_last_one_left_preempts_itself_rather_than_looping() -> None:
    made = scheduler(blocks=1, tokens=16)
    made.add(request("a", 4))
    assert step(made) == [("a", 0, 4)]
    assert step(made) == []  # such a sequence is refused at the API: it is longer than the cache
    assert [r.id for r in made.waiting] == ["a"]
    assert made.blocks.num_free == 1


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_an_abort_frees_everything_whenever_it_comes(steps: int) -> None:
    made = scheduler(tokens=4)
    made.add(request("a", 10))
    for _ in range(steps):
        step(made)
    assert made.remove("a") is not None
    assert (made.blocks.num_used, made.running, list(made.waiting)) == (0, [], [])
    assert made.remove("a") is None


def test_what_a_discarded_request_computed_is_found_by_nobody() -> None:
    made = scheduler(tokens=32)
    made.add(request("a", list(range(9))))
    step(made)
    made.finish_invalid(made.running[0])
    assert made.blocks.num_used == 0
    made.add(request("b", list(range(9))))
    assert step(made) == [("b", 0, 9)]


def test_a_known_prefix_is_not_computed_again() -> None:
    made = scheduler(tokens=32)
    made.add(request("a", list(range(10))))
    step(made)
    made.add(request("b", [*range(8), 99, 98]))
    assert step(made) == [("a", 10, 1), ("b", 8, 2)]
    assert (made.running[1].cached_tokens, made.stats.prefix_hits, made.stats.prefix_queries) == (8, 8, 20)


@pytest.mark.parametrize("length", [4, 5, 8, 9])
def test_a_hit_never_covers_the_whole_prompt(length: int) -> None:
    made = scheduler(tokens=32)
    for name in "ab":
        made.add(request(name, list(range(length))))
        step(made)
    assert made.running[1].cached_tokens == (length - 1) // SIZE * SIZE


def test_prompt_logprobs_need_every_position_and_so_no_hit() -> None:
    made = scheduler(tokens=32)
    made.add(request("a", list(range(9))))
    step(made)
    made.add(request("b", list(range(9)), prompt_logprobs=True))
    assert step(made)[1] == ("b", 0, 9)


def test_equal_tokens_under_another_salt_are_another_prefix() -> None:
    made = scheduler(tokens=32)
    made.add(request("a", list(range(9))))
    step(made)
    salted = request("b", list(range(9)))
    salted.cache_salt = b"long"
    made.add(salted)
    assert step(made)[1] == ("b", 0, 9)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class Serving(RuleBasedStateMachine):
    """Requests come, are computed, finish and are aborted at random."""

    @initialize(
        blocks=st.integers(6, 14),
        sequences=st.integers(1, 4),
        tokens=st.integers(4, 12),
        prompts=st.integers(0, 2),
        chunk=st.integers(0, 12),
        caching=st.booleans(),
    )
    def start(self, blocks: int, sequences: int, tokens: int, prompts: int, chunk: int, caching: bool) -> None:
        self.limits = SchedulerConfig(tokens, sequences, prompts, chunk)
        self.scheduler = Scheduler(BlockPool(blocks, SIZE, caching), self.limits)
        self.max_seq_len = blocks * SIZE
        self.order: dict[str, int] = {}
        # What each slot of the cache holds: the whole prefix up to it, and the salt it was computed under.
        self.shadow: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}

    @rule(
        prompt=PROMPTS,
        output=st.lists(st.integers(0, 1), max_size=3),
        max_tokens=st.integers(4, 12),
        salt=st.sampled_from([b"", b"", b"s"]),
        logprobs=st.sampled_from([False, False, True]),
    )
    def add(self, prompt: list[int], output: list[int], max_tokens: int, salt: bytes, logprobs: bool) -> None:
        name = f"r{len(self.order)}"
        self.order[name] = len(self.order)
        new = Request(name, prompt, SamplingParams(max_tokens, prompt_logprobs=logprobs), output)
        new.cache_salt = salt
        self.scheduler.add(new)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        open_ones = [*self.scheduler.running, *self.scheduler.waiting]
        if open_ones:
            victim = data.draw(st.sampled_from(open_ones))
            assert self.scheduler.remove(victim.id) is victim
            assert victim.block_ids == []

    @rule(token=st.integers(0, 1))
    def step(self, token: int) -> None:
        before = list(self.scheduler.running)
        had_work = bool(before or self.scheduler.waiting)
        decoding = [r for r in before if r.num_uncomputed_tokens == 1]
        slices = self.scheduler.schedule()
        assert bool(slices) == had_work, "work, and nothing scheduled"
        self.check_limits(slices, before)
        scheduled = {s.request.id for s in slices}
        assert all(r.id in scheduled for r in decoding if r in self.scheduler.running), "a decode was starved"
        for piece in slices:
            self.compute(piece)
        self.scheduler.update_after_step(slices)
        for piece in slices:
            self.sample(piece.request, token)

    def check_limits(self, slices: list[ScheduledChunk], before: list[Request]) -> None:
        admitted = [s for s in slices if s.request not in before]
        assert sum(s.num_tokens for s in slices) <= self.limits.max_num_batched_tokens
        assert all(s.num_tokens > 0 and s.start + s.num_tokens <= s.request.num_tokens for s in slices)
        assert len({s.request.id for s in slices}) == len(slices)
        assert len(self.scheduler.running) <= self.limits.max_num_seqs
        assert len(admitted) <= (self.limits.max_num_prefills or len(admitted))
        if any(s.request.num_uncomputed_tokens == 1 for s in slices if s.request in before):
            chunk = self.limits.mixed_prefill_chunk
            assert all(s.num_tokens <= chunk for s in slices), "a chunk made decodes wait"

    def compute(self, piece: ScheduledChunk) -> None:
        """What a rank does: reads all slots before the slice, writes those of the slice."""
        mine, salt = piece.request, piece.request.cache_salt
        assert len(mine.block_ids) == self.scheduler.blocks.num_blocks_for(piece.start + piece.num_tokens)
        for position in range(piece.start + piece.num_tokens):
            slot = (mine.block_ids[position // SIZE], position % SIZE)
            prefix = (salt, tuple(mine.tokens[: position + 1]))
            if position >= piece.start:
                others = [r for r in self.scheduler.running if r is not mine and slot[0] in r.block_ids]
                assert not others, "wrote into a block that another request reads"
                self.shadow[slot] = prefix
            assert self.shadow[slot] == prefix

    def sample(self, done: Request, token: int) -> None:
        if done.num_uncomputed_tokens:
            return
        done.tokens.append(token)
        if done.finish_reason(self.max_seq_len):
            self.scheduler.finish(done)
            assert done.block_ids == []

    @invariant()
    def no_block_is_leaked_or_held_twice(self) -> None:
        if not self.order:
            return
        held = Counter(block for r in self.scheduler.running for block in r.block_ids)
        assert self.scheduler.blocks.num_used == len(held)
        assert all(len(set(r.block_ids)) == len(r.block_ids) for r in self.scheduler.running)
        assert all(not r.block_ids and not r.num_computed_tokens for r in self.scheduler.waiting)

    @invariant()
    def first_come_first_served(self) -> None:
        if self.order:
            queue = [*self.scheduler.running, *self.scheduler.waiting]
            assert [self.order[r.id] for r in queue] == sorted(self.order[r.id] for r in queue)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            self.step(0)
        assert not self.scheduler.running, "the requests never end"
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks


TestServing = pytest.mark.timeout(120)(Serving.TestCase)
TestServing.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
