"""What a request is computed with changes nothing: company, chunks, blocks, the prefix cache, a preemption, a resume.

Greedy requests are compared with transformers throughout. Sampled ones have no oracle; they must be what each of them
is alone, in one chunk, without a cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.engine.scheduler import SchedulerStats
from rtp_llm.runner.model_runner import ModelRunner
from tests.model import drive
from tests.model.conftest import Oracles
from tests.model.drive import Outcomes, Settings, greedy
from tests.model.oracle import NEW_TOKENS, PROMPT_LENGTHS, Oracle
from tests.model.rank_pool import RankPool

# Plain attention, a window shorter than the prompts, and a rope that goes by the length of the prompt.
CASES = ["llama-biases", "mistral-window", "rope-dynamic"]
NEVER_STOP: dict[str, Any] = {"min_tokens": NEW_TOKENS, "stop_token_ids": tuple(range(30))}
# One request per way of choosing: see `layers.sampler`. Penalties look at what a resumed request brings along.
SAMPLED: Mapping[str, dict[str, Any]] = {
    "plain": {"temperature": 0.8},
    "cut": {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "edited": {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2, "logit_bias": {5: 2.0}},
    "counted": {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.4} | NEVER_STOP,
}
ALONE: Settings = {"max_batch_tokens_size": 512, "reuse_cache": False}


def greedy_requests(oracle: Oracle) -> list[Request]:
    return [greedy(a.prompt, NEW_TOKENS, id=str(i)) for i, a in enumerate(oracle.answers)]


def sampled(oracle: Oracle, name: str, output: list[int] | None = None) -> Request:
    """Each has a prompt of its own, the last ones of the oracle's: those are cut into chunks."""
    index = list(SAMPLED).index(name)
    params = SamplingParams(max_tokens=NEW_TOKENS, seed=100 + index, **SAMPLED[name])
    return Request(name, list(oracle.answers[-1 - index].prompt), params, output)


def sampled_requests(oracle: Oracle) -> list[Request]:
    return [sampled(oracle, name) for name in SAMPLED]


def mixed(oracle: Oracle) -> list[Request]:
    """Greedy and sampled ones in turn."""
    one, other = greedy_requests(oracle), sampled_requests(oracle)
    return [r for pair in zip(one, other, strict=False) for r in pair] + one[len(other) :]


@dataclass(frozen=True)
class Expected:
    oracle: Oracle
    sampled: dict[str, list[int]]

    def check(self, outcomes: Outcomes) -> None:
        for index, answer in enumerate(self.oracle.answers):
            outcome = outcomes[str(index)]
            answer.check(outcome.tokens, outcome.logits)
        self.check_sampled(outcomes)

    def check_sampled(self, outcomes: Outcomes) -> None:
        assert {name: outcomes[name].tokens for name in SAMPLED} == self.sampled


@pytest.fixture(scope="module", params=CASES)
def expected(request: pytest.FixtureRequest, oracles: Oracles) -> Expected:
    return expect(oracles(request.param))


def expect(oracle: Oracle) -> Expected:
    engine = drive.alone(oracle.path, **ALONE)
    outcomes = {r.id: drive.run(engine, [r])[r.id] for r in sampled_requests(oracle)}
    tokens = {name: outcome.tokens for name, outcome in outcomes.items()}
    assert all(len(set(t)) > 5 for t in tokens.values()), "a sampled output that says nothing"
    return Expected(oracle, tokens)


def salted(oracle: Oracle, requests: list[Request]) -> list[Request]:
    """As `engine.loop.Leader` does for dynamic rope; harmless elsewhere."""
    for request in requests:
        request.cache_salt = request.num_prompt_tokens.to_bytes(8, "little")
    return requests


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_batch_tokens_size": 7},
        {"max_batch_tokens_size": 16},
        {"max_batch_tokens_size": 512},
        {"seq_size_per_block": 1, "test_block_num": 1300},
        {"seq_size_per_block": 32, "test_block_num": 60},
        {"seq_size_per_block": 5, "test_block_num": 300, "max_batch_tokens_size": 13},
        {"reuse_cache": False},
        {"max_batch_size": 2},
        {"max_context_batch_size": 1},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()) or "defaults",
)
def test_company_chunks_and_blocks(expected: Expected, settings: Settings) -> None:
    expected.check(drive.run(drive.alone(expected.oracle.path, **settings), mixed(expected.oracle)))


def test_each_alone(expected: Expected) -> None:
    engine = drive.alone(expected.oracle.path, reuse_cache=False)
    outcomes: Outcomes = {}
    for request in mixed(expected.oracle):
        outcomes |= drive.run(engine, [request])
    expected.check(outcomes)


def test_arrivals_in_the_middle(expected: Expected) -> None:
    """One more request every third step, as they come from clients."""
    engine = drive.alone(expected.oracle.path)
    requests = mixed(expected.oracle)
    outcomes: Outcomes = {r.id: drive.Completion() for r in requests}
    with drive.watching() as logits:
        for request in requests:
            engine.add(request)
            for _ in range(3):
                drive.step(engine, outcomes)
        drive.finish(engine, outcomes)
    for id, outcome in outcomes.items():
        outcome.logits = logits[id]
    expected.check(outcomes)


@pytest.mark.parametrize("block_size", [1, 16])
def test_the_whole_prompt_is_cached(expected: Expected, block_size: int) -> None:
    engine = drive.alone(expected.oracle.path, seq_size_per_block=block_size, test_block_num=3000 // block_size)
    drive.run(engine, salted(expected.oracle, mixed(expected.oracle)))
    outcomes = drive.run(engine, salted(expected.oracle, mixed(expected.oracle)))
    for index, length in enumerate(PROMPT_LENGTHS):
        # One token at least is computed, for its logits.
        assert outcomes[str(index)].cached_tokens == (length - 1) // block_size * block_size
    expected.check(outcomes)


def preempting(settings: Settings) -> Settings:
    """Blocks for little more than one request: everybody else's are taken away again and again."""
    return {"test_block_num": 10, "seq_size_per_block": 16} | dict(settings)


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens_size": 7}, {"reuse_cache": False}], ids=str)
def test_preemption(expected: Expected, settings: Settings) -> None:
    engine = drive.alone(expected.oracle.path, **preempting(settings))
    outcomes = drive.run(engine, salted(expected.oracle, mixed(expected.oracle)))
    counters: SchedulerStats = engine.scheduler.stats
    assert counters.preemptions >= 5
    expected.check(outcomes)


@pytest.mark.parametrize("done", [1, 16, 63])
@pytest.mark.parametrize("reuse_cache", [True, False])
def test_resume(expected: Expected, done: int, reuse_cache: bool) -> None:
    """After the loss of a rank the API sends every request again, with the tokens that its client already has."""
    engine = drive.alone(expected.oracle.path, reuse_cache=reuse_cache)
    requests = [
        greedy_resumed(answer.prompt, answer.tokens[:done], str(index))
        for index, answer in enumerate(expected.oracle.answers)
    ] + [sampled(expected.oracle, name, expected.sampled[name][:done]) for name in SAMPLED]
    outcomes = drive.run(engine, requests)
    for index, answer in enumerate(expected.oracle.answers):
        outcome = outcomes[str(index)]
        answer.after(done).check(outcome.tokens, outcome.logits)
    assert {name: outcomes[name].tokens for name in SAMPLED} == {n: t[done:] for n, t in expected.sampled.items()}
    assert all(outcomes[name].finish == "length" for name in outcomes)


def greedy_resumed(prompt: list[int], output: list[int], id: str) -> Request:
    return Request(id, list(prompt), SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0), list(output))


@pytest.mark.parametrize("reuse_cache", [True, False])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_neighbour_whose_numbers_are_none(expected: Expected, place: str, reuse_cache: bool) -> None:
    """It ends with an error. Those beside it, and those that get its blocks later, do not notice."""
    oracle = expected.oracle
    engine = drive.alone(oracle.path, test_block_num=40, reuse_cache=reuse_cache)
    said = {t for a in oracle.answers for t in (*a.prompt, *a.tokens)}
    said |= {t for tokens in expected.sampled.values() for t in tokens}
    broken = next(token for token in range(oracle.answers[0].logits.shape[-1]) if token not in said)
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    runner.model.embed_tokens.weight.data[broken] = torch.nan
    bad = [greedy([broken, *a.prompt], 8, id=f"bad {i}") for i, a in enumerate(oracle.answers)]
    good = mixed(oracle)
    requests = [r for pair in zip(bad, good, strict=False) for r in (pair if place == "first" else pair[::-1])]
    outcomes = drive.run(engine, salted(oracle, requests + good[len(bad) :]))
    assert [outcomes[r.id].finish for r in bad] == ["error"] * len(bad)
    expected.check(outcomes)
    expected.check(drive.run(engine, salted(oracle, mixed(oracle))))


@pytest.mark.parametrize(
    ("gang", "name"), [(2, "mistral-window"), (4, "qwen2-14-heads")], ids=["tp2", "tp4"], indirect=["gang"]
)
def test_over_ranks(gang: RankPool, oracles: Oracles, name: str) -> None:
    """The same with several ranks: small chunks, few blocks, and everything a second time from what is cached."""
    expected = expect(oracles(name))
    settings = {"max_batch_tokens_size": 16, "test_block_num": 24}
    report = gang.run(expected.oracle.path, [mixed(expected.oracle)], "local", **settings)
    assert report.replies[0]["preemptions"] >= 3
    expected.check(report.outcomes)
    waves = [mixed(expected.oracle), again(expected.oracle)]
    outcomes = gang.run(expected.oracle.path, waves, "local").outcomes
    expected.check(outcomes)
    second = {id.removesuffix(" again"): o for id, o in outcomes.items() if id.endswith(" again")}
    assert second[str(PROMPT_LENGTHS.index(70))].cached_tokens == 64
    expected.check(second)


def again(oracle: Oracle) -> list[Request]:
    requests = mixed(oracle)
    for request in requests:
        request.id += " again"
    return requests
