"""Prompts with a common prefix: cached blocks are not recomputed, and the output does not change.

The expected output is that of the same model without prefix cache, which test_families compares with transformers.
"""

import socket
from typing import cast

import pytest

from rtp_llm.contract.engine_events import unpack_events
from rtp_llm.contract.request import Request
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.loop import FollowerConnections, LeaderLoop
from rtp_llm.engine.request_server import ClientConnection, ClientMessage, RequestServer
from rtp_llm.parallel.rank_status import RankStatus
from rtp_llm.parallel.wire import HEADER, FrameType
from rtp_llm.runner.model_runner import ModelRunner
from tests.model import drive
from tests.model.checkpoints import TRAINED_LENGTH
from tests.model.conftest import Oracles
from tests.model.drive import Completion, greedy_request
from tests.model.oracle import Oracle
from tests.quick import slow_except

MAX_TOKENS = 24
BLOCK_SIZE = 16
# Two of its three layers have a window. A block holds twice as many tokens of the one layer without: see
# `contract.kv_cache.make_layout`. A prefix must end a block of both groups.
ALIGNMENT = {"qwen2-window": 32}


@pytest.fixture(
    scope="module",
    params=slow_except(["llama", "mistral-window", "qwen2-window", "rope-yarn"], "llama", "qwen2-window"),
)
def oracle(request: pytest.FixtureRequest, oracles: Oracles) -> Oracle:
    return oracles(request.param)


def without_cache(oracle: Oracle, prompt: list[int]) -> Completion:
    return drive.run(
        drive.make_single_rank_engine(oracle.path, reuse_cache=False), [greedy_request(prompt, MAX_TOKENS)]
    )["0"]


def assert_same(completion: Completion, expected: Completion) -> None:
    assert completion.tokens == expected.tokens
    # Not exactly equal: the order of summation depends on the batch size.
    assert all(abs(a - b).max() < 1e-4 for a, b in zip(completion.logits, expected.logits, strict=True))


@pytest.mark.parametrize(
    ("num_shared", "num_different", "cached_tokens"),
    [
        (70, 20, 64),  # four full blocks of the prefix
        (48, 1, 48),  # the prefix ends at a block boundary
        (47, 30, 32),  # the third block lacks one token
        (15, 40, 0),  # less than one block
        (64, 0, 48),  # the last token is recomputed for its logits, and so is its block
    ],
)
def test_shared_prefix(oracle: Oracle, num_shared: int, num_different: int, cached_tokens: int) -> None:
    long = oracle.answers[-1].prompt
    prompt = long[:num_shared] + oracle.answers[-2].prompt[:num_different]
    engine = drive.make_single_rank_engine(oracle.path, seq_size_per_block=BLOCK_SIZE)
    drive.run(engine, [greedy_request(long, 2, id="first")])
    completion = drive.run(engine, [greedy_request(prompt, MAX_TOKENS)])["0"]
    alignment = ALIGNMENT.get(oracle.case.name, BLOCK_SIZE)
    assert completion.cached_tokens == cached_tokens // alignment * alignment
    assert_same(completion, without_cache(oracle, prompt))


def test_next_turn_of_a_conversation(oracle: Oracle) -> None:
    """The next prompt begins with the prompt and the output of the previous turn."""
    answer = oracle.answers[-2]
    engine = drive.make_single_rank_engine(oracle.path, seq_size_per_block=BLOCK_SIZE)
    drive.run(engine, [greedy_request(answer.prompt, len(answer.tokens), id="first")])
    prompt = answer.prompt + answer.tokens + oracle.answers[0].prompt
    completion = drive.run(engine, [greedy_request(prompt, MAX_TOKENS)])["0"]
    # The last token was sampled, but its keys and values were not computed.
    assert completion.cached_tokens == (len(answer.prompt) + len(answer.tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert_same(completion, without_cache(oracle, prompt))


def test_concurrent_prompts_with_a_shared_prefix(oracle: Oracle) -> None:
    long = oracle.answers[-1].prompt
    prompts = [long[:n] + oracle.answers[-2].prompt[:5] for n in (64, 64, 40)]
    engine = drive.make_single_rank_engine(oracle.path, seq_size_per_block=BLOCK_SIZE, max_batch_tokens_size=100)
    completions = drive.run(engine, [greedy_request(p, MAX_TOKENS, id=str(i)) for i, p in enumerate(prompts)])
    for index, prompt in enumerate(prompts):
        assert_same(completions[str(index)], without_cache(oracle, prompt))


def test_equal_blocks_after_different_prefixes_are_not_shared(oracle: Oracle) -> None:
    """Keys and values depend on all tokens before them, so a block's hash includes its prefix."""
    long, short = oracle.answers[-1].prompt, oracle.answers[-2].prompt
    engine = drive.make_single_rank_engine(oracle.path, seq_size_per_block=BLOCK_SIZE)
    unit = ALIGNMENT.get(oracle.case.name, BLOCK_SIZE)
    drive.run(engine, [greedy_request(long, 2, id="first"), greedy_request(short[: unit + 1], 2, id="second")])
    prompt = short[:unit] + long[unit:]
    completion = drive.run(engine, [greedy_request(prompt, MAX_TOKENS)])["0"]
    assert completion.cached_tokens == unit
    assert_same(completion, without_cache(oracle, prompt))


class AllServedError(Exception):
    """Raised by FakeRequestServer after the last request, to end LeaderLoop.run."""


class FakeRequestServer:
    """Fake of `engine.request_server.RequestServer`: submits each request when the previous one has ended."""

    def __init__(self, requests: list[Request]):
        self._requests, self._is_busy = iter(requests), False
        self.client = ClientConnection(socket.socket())
        self.connections = {self.client}
        self.completions = {r.id: Completion() for r in requests}

    def poll(self, timeout: float) -> list[ClientMessage]:
        if self._is_busy:
            return []
        request = next(self._requests, None)
        if request is None:
            self.client.sock.close()
            raise AllServedError
        self._is_busy = True
        body = {"id": request.id, "prompt": request.tokens, "params": request.params.to_json(), "output": []}
        return [ClientMessage(self.client, FrameType.SUBMIT, body)]

    def send(self, connection: ClientConnection, frame: bytes) -> None:
        for output in unpack_events(frame[HEADER.size :])[0]:
            self.completions[output.request_id].tokens += output.tokens
            self.completions[output.request_id].cached_tokens = output.cached_tokens
            self._is_busy = not output.finish


def serve(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    """Serves requests through the loop of rank 0, which adds a salt (extra bytes) to the cache keys of long prompts."""
    request_server = FakeRequestServer(requests)
    leader = LeaderLoop(
        engine,
        cast(RequestServer, request_server),
        FollowerConnections({}, 1),
        RankStatus(0, 0),
        cast(ModelRunner, engine.runner),
        TRAINED_LENGTH,
    )
    with pytest.raises(AllServedError):
        leader.run()
    return request_server.completions


@pytest.fixture(scope="module")
def dynamic_rope_oracle(oracles: Oracles) -> Oracle:
    return oracles("rope-dynamic")


def test_dynamic_rope_shares_only_equal_keys(dynamic_rope_oracle: Oracle) -> None:
    """Keys of prompts beyond the trained length depend on the length of the prompt."""
    long, second = dynamic_rope_oracle.answers[-1].prompt, dynamic_rope_oracle.answers[-2].prompt
    prompts = {
        "long": long,
        "long again": long,
        "shorter": long[:50],
        "same length": long[:64] + second[:6],
        "short": long[:20],
        "also short": long[:16] + second[:9],
    }
    engine = drive.make_single_rank_engine(dynamic_rope_oracle.path, seq_size_per_block=BLOCK_SIZE)
    completions = serve(engine, [greedy_request(prompt, MAX_TOKENS, id=name) for name, prompt in prompts.items()])
    cached = {name: completion.cached_tokens for name, completion in completions.items()}
    assert cached == {"long": 0, "long again": 64, "shorter": 0, "same length": 64, "short": 0, "also short": 16}
    for name, prompt in prompts.items():
        assert completions[name].tokens == without_cache(dynamic_rope_oracle, prompt).tokens


def test_dynamic_rope_needs_the_cache_salt(dynamic_rope_oracle: Oracle) -> None:
    """Proves that test_dynamic_rope_shares_only_equal_keys can fail: without a salt in the cache keys of long
    prompts, the output is wrong."""
    long = dynamic_rope_oracle.answers[-1].prompt
    engine = drive.make_single_rank_engine(dynamic_rope_oracle.path, seq_size_per_block=BLOCK_SIZE)
    drive.run(engine, [greedy_request(long, 2, id="first")])
    completion = drive.run(engine, [greedy_request(long[:50], MAX_TOKENS)])["0"]
    assert completion.cached_tokens == 48
    assert completion.tokens != without_cache(dynamic_rope_oracle, long[:50]).tokens
