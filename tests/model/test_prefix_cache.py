"""Prompts that share a prefix: the shared blocks are not computed again, and nobody can tell from the output.

The oracle for these prompts is the same model without a cache, which test_families compares with transformers.
"""

import socket
from typing import Any, cast

import pytest

from rtp_llm.contract.engine_output import EngineOutput
from rtp_llm.contract.request import Request
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.loop import FollowerConnections, LeaderLoop
from rtp_llm.engine.request_server import ClientConnection, ClientMessage, RequestServer
from rtp_llm.parallel.rank_status import RankStatus
from rtp_llm.parallel.wire import FrameType
from rtp_llm.runner.model_runner import ModelRunner
from tests.model import drive
from tests.model.checkpoints import TRAINED
from tests.model.conftest import Oracles
from tests.model.drive import Completion, greedy
from tests.model.oracle import Oracle

COUNT = 24
BLOCK = 16


@pytest.fixture(scope="module", params=["llama", "mistral-window", "qwen2-window", "rope-yarn"])
def oracle(request: pytest.FixtureRequest, oracles: Oracles) -> Oracle:
    return oracles(request.param)


def without_cache(oracle: Oracle, prompt: list[int]) -> Completion:
    return drive.run(drive.alone(oracle.path, reuse_cache=False), [greedy(prompt, COUNT)])["0"]


def same(found: Completion, expected: Completion) -> None:
    assert found.tokens == expected.tokens
    # Not bit by bit: the same rows in a batch of another size are added up in another order.
    assert all(abs(a - b).max() < 1e-4 for a, b in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize(
    ("shared", "own", "cached"),
    [
        (70, 20, 64),  # four whole blocks of the prefix
        (48, 1, 48),  # blocks end where the prefix ends
        (47, 30, 32),  # one token short of the third block
        (15, 40, 0),  # not even one block
        (64, 0, 48),  # all of it: the last token is computed again, and with it its block
    ],
)
def test_shared_prefix(oracle: Oracle, shared: int, own: int, cached: int) -> None:
    long = oracle.answers[-1].prompt
    prompt = long[:shared] + oracle.answers[-2].prompt[:own]
    engine = drive.alone(oracle.path, seq_size_per_block=BLOCK)
    drive.run(engine, [greedy(long, 2, id="first")])
    found = drive.run(engine, [greedy(prompt, COUNT)])["0"]
    assert found.cached_tokens == cached
    same(found, without_cache(oracle, prompt))


def test_the_next_turn_of_a_conversation(oracle: Oracle) -> None:
    """Prompt and answer together are the beginning of the next prompt."""
    answer = oracle.answers[-2]
    engine = drive.alone(oracle.path, seq_size_per_block=BLOCK)
    drive.run(engine, [greedy(answer.prompt, len(answer.tokens), id="first")])
    prompt = answer.prompt + answer.tokens + oracle.answers[0].prompt
    found = drive.run(engine, [greedy(prompt, COUNT)])["0"]
    # The last token was chosen, but never computed.
    assert found.cached_tokens == (len(answer.prompt) + len(answer.tokens) - 1) // BLOCK * BLOCK
    same(found, without_cache(oracle, prompt))


def test_prompts_that_share_while_both_run(oracle: Oracle) -> None:
    long = oracle.answers[-1].prompt
    prompts = [long[:n] + oracle.answers[-2].prompt[:5] for n in (64, 64, 40)]
    engine = drive.alone(oracle.path, seq_size_per_block=BLOCK, max_batch_tokens_size=100)
    outcomes = drive.run(engine, [greedy(p, COUNT, id=str(i)) for i, p in enumerate(prompts)])
    for index, prompt in enumerate(prompts):
        same(outcomes[str(index)], without_cache(oracle, prompt))


def test_equal_blocks_behind_different_prefixes_are_different(oracle: Oracle) -> None:
    """Their keys and values are others: a block is known by everything before it, not by its own tokens."""
    long, other = oracle.answers[-1].prompt, oracle.answers[-2].prompt
    engine = drive.alone(oracle.path, seq_size_per_block=BLOCK)
    drive.run(engine, [greedy(long, 2, id="first"), greedy(other[: BLOCK + 1], 2, id="second")])
    prompt = other[:BLOCK] + long[BLOCK:]
    found = drive.run(engine, [greedy(prompt, COUNT)])["0"]
    assert found.cached_tokens == BLOCK
    same(found, without_cache(oracle, prompt))


class Done(Exception):
    """Ends the leader's loop."""


class OneClient:
    """In place of `engine.intake.Intake`: submits one request after the other."""

    def __init__(self, requests: list[Request]):
        self._requests, self._busy = iter(requests), False
        self.client = ClientConnection(socket.socket())
        self.connections = {self.client}
        self.outcomes = {r.id: Completion() for r in requests}

    def poll(self, timeout: float) -> list[ClientMessage]:
        if self._busy:
            return []
        request = next(self._requests, None)
        if request is None:
            self.client.sock.close()
            raise Done
        self._busy = True
        body = {"id": request.id, "prompt": request.tokens, "params": request.params.to_json(), "output": []}
        return [ClientMessage(self.client, FrameType.SUBMIT, body)]

    def send(self, connection: ClientConnection, kind: FrameType, body: dict[str, Any]) -> None:
        for event in (EngineOutput.from_json(e) for e in body["events"]):
            self.outcomes[event.request_id].tokens += event.tokens
            self.outcomes[event.request_id].cached_tokens = event.cached_tokens
            self._busy = not event.finish


def serve(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    """Through the loop of rank 0, which is what tells prompts of different lengths apart."""
    client = OneClient(requests)
    leader = LeaderLoop(
        engine,
        cast(RequestServer, client),
        FollowerConnections({}, 1),
        RankStatus(0, 0),
        cast(ModelRunner, engine.runner),
        TRAINED,
    )
    with pytest.raises(Done):
        leader.run()
    return client.outcomes


@pytest.fixture(scope="module")
def dynamic(oracles: Oracles) -> Oracle:
    return oracles("rope-dynamic")


def test_dynamic_rope_shares_only_what_is_the_same(dynamic: Oracle) -> None:
    """A prompt beyond the trained length is rotated by its length: another length has other keys for equal tokens."""
    long, other = dynamic.answers[-1].prompt, dynamic.answers[-2].prompt
    prompts = {
        "long": long,
        "long again": long,
        "shorter": long[:50],
        "as long": long[:64] + other[:6],
        "short": long[:20],
        "also short": long[:16] + other[:9],
    }
    engine = drive.alone(dynamic.path, seq_size_per_block=BLOCK)
    found = serve(engine, [greedy(prompt, COUNT, id=name) for name, prompt in prompts.items()])
    cached = {name: outcome.cached_tokens for name, outcome in found.items()}
    assert cached == {"long": 0, "long again": 64, "shorter": 0, "as long": 64, "short": 0, "also short": 16}
    for name, prompt in prompts.items():
        assert found[name].tokens == without_cache(dynamic, prompt).tokens


def test_dynamic_rope_would_go_wrong_without_that(dynamic: Oracle) -> None:
    """Proves that the test above can fail: the engine itself does not know about ropes."""
    long = dynamic.answers[-1].prompt
    engine = drive.alone(dynamic.path, seq_size_per_block=BLOCK)
    drive.run(engine, [greedy(long, 2, id="first")])
    found = drive.run(engine, [greedy(long[:50], COUNT)])["0"]
    assert found.cached_tokens == 48
    assert found.tokens != without_cache(dynamic, long[:50]).tokens
