"""Output does not depend on the batch, chunk and block sizes, the prefix cache, preemptions or resumption.

Greedy requests are compared with transformers. Sampled requests have no oracle; they must give the same tokens as
if each ran alone, in one chunk and without prefix cache.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.engine.scheduler import SchedulerStats
from rtp_llm.kernels.native_attention import NativeBackend
from rtp_llm.kernels.reference import ReferenceBackend
from rtp_llm.native.library import built_levels, select_kernels
from rtp_llm.runner.model_runner import ModelRunner
from tests.model import drive
from tests.model.conftest import Oracles
from tests.model.drive import Completions, Settings, greedy_request
from tests.model.oracle import NEW_TOKENS, PROMPT_LENGTHS, Oracle
from tests.model.rank_pool import RankPool

# Plain attention, a window shorter than the prompts, and a rope that depends on the length of the prompt.
CASES = ["llama-biases", "mistral-window", "rope-dynamic"]
NEVER_STOP: dict[str, Any] = {"min_tokens": NEW_TOKENS, "stop_token_ids": tuple(range(30))}
# One request per sampling method (see `layers.sampler`), and one with penalties, which count resumed output too.
SAMPLED: Mapping[str, dict[str, Any]] = {
    "unfiltered": {"temperature": 0.8},
    "filtered": {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "biased": {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2, "logit_bias": {5: 2.0}},
    "penalties": {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.4} | NEVER_STOP,
}
REFERENCE_SETTINGS: Settings = {"max_batch_tokens_size": 512, "reuse_cache": False}


def sampled_request(oracle: Oracle, name: str, output: list[int] | None = None) -> Request:
    """Returns the request `name` of SAMPLED. Each uses another prompt of the oracle, from the last (the longest) on."""
    index = list(SAMPLED).index(name)
    params = SamplingParams(max_tokens=NEW_TOKENS, seed=100 + index, **SAMPLED[name])
    return Request(name, list(oracle.answers[-1 - index].prompt), params, output)


def sampled_requests(oracle: Oracle) -> list[Request]:
    return [sampled_request(oracle, name) for name in SAMPLED]


def mixed_requests(oracle: Oracle) -> list[Request]:
    """Returns greedy and sampled requests alternately."""
    greedy, sampled = oracle.greedy_requests(), sampled_requests(oracle)
    return [r for pair in zip(greedy, sampled, strict=False) for r in pair] + greedy[len(sampled) :]


@dataclass(frozen=True)
class Expected:
    oracle: Oracle
    sampled: dict[str, list[int]]

    def check(self, completions: Completions) -> None:
        self.oracle.check(completions)
        self.check_sampled(completions)

    def check_sampled(self, completions: Completions) -> None:
        assert {name: completions[name].tokens for name in SAMPLED} == self.sampled


def kernel_cases() -> Iterator[Any]:
    """Yields each checkpoint with the kernels of this CPU, and one with those of its other levels and with torch."""
    for name in CASES:
        yield pytest.param((name, "auto"), id=name, marks=[] if name == "mistral-window" else pytest.mark.slow)
    for level in ("off", *built_levels()[:-1]):
        yield pytest.param(("mistral-window", level), id=f"mistral-window-{level}", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=kernel_cases())
def expected(request: pytest.FixtureRequest, oracles: Oracles) -> Iterator[Expected]:
    name, level = request.param
    select_kernels(level)
    yield compute_expected(oracles(name))
    select_kernels("auto")


def compute_expected(oracle: Oracle) -> Expected:
    engine = drive.make_single_rank_engine(oracle.path, **REFERENCE_SETTINGS)
    completions = {r.id: drive.run(engine, [r])[r.id] for r in sampled_requests(oracle)}
    tokens = {name: completion.tokens for name, completion in completions.items()}
    assert all(len(set(t)) > 5 for t in tokens.values()), "sampled output has too few different tokens"
    return Expected(oracle, tokens)


@pytest.mark.parametrize("level", [*built_levels(), "off"])
def test_attention_backend(oracles: Oracles, level: str) -> None:
    select_kernels(level)
    runner = drive.make_single_rank_engine(oracles(CASES[0]).path).runner
    select_kernels("auto")
    assert isinstance(runner, ModelRunner)
    assert isinstance(runner.residency._backend, ReferenceBackend if level == "off" else NativeBackend)


def add_cache_salt(requests: list[Request]) -> list[Request]:
    """Sets `cache_salt`, bytes that enter the hashes of the prefix cache, as `engine.loop.LeaderLoop` does for dynamic
    rope. The other cases work with a salt too."""
    for request in requests:
        request.extra_keys = (request.num_prompt_tokens.to_bytes(8, "little"),)
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
        {"rtp_pipeline_depth": 1},
        {"rtp_pipeline_depth": 1, "max_batch_tokens_size": 7},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()) or "defaults",
)
def test_batch_chunks_and_blocks(expected: Expected, settings: Settings) -> None:
    expected.check(
        drive.run(drive.make_single_rank_engine(expected.oracle.path, **settings), mixed_requests(expected.oracle))
    )


def test_requests_one_by_one(expected: Expected) -> None:
    engine = drive.make_single_rank_engine(expected.oracle.path, reuse_cache=False)
    completions: Completions = {}
    for request in mixed_requests(expected.oracle):
        completions |= drive.run(engine, [request])
    expected.check(completions)


def test_requests_that_arrive_later(expected: Expected) -> None:
    """Adds a request every third step, as clients do."""
    engine = drive.make_single_rank_engine(expected.oracle.path)
    requests = mixed_requests(expected.oracle)
    completions: Completions = {r.id: drive.Completion() for r in requests}
    with drive.record_logits() as logits:
        for request in requests:
            engine.add(request)
            for _ in range(3):
                drive.step(engine, completions)
        drive.finish(engine, completions)
    for id, completion in completions.items():
        completion.logits = logits[id]
    expected.check(completions)


@pytest.mark.parametrize("block_size", [1, 16])
def test_cached_prompt(expected: Expected, block_size: int) -> None:
    engine = drive.make_single_rank_engine(
        expected.oracle.path, seq_size_per_block=block_size, test_block_num=3000 // block_size
    )
    drive.run(engine, add_cache_salt(mixed_requests(expected.oracle)))
    completions = drive.run(engine, add_cache_salt(mixed_requests(expected.oracle)))
    for index, length in enumerate(PROMPT_LENGTHS):
        # At least one token is computed, for its logits.
        assert completions[str(index)].cached_tokens == (length - 1) // block_size * block_size
    expected.check(completions)


def few_blocks(settings: Settings) -> Settings:
    """Returns settings with blocks for little more than one request, so that the others are preempted repeatedly."""
    return {"test_block_num": 10, "seq_size_per_block": 16} | dict(settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batch_tokens_size": 7}, {"reuse_cache": False}, {"rtp_pipeline_depth": 1}],
    ids=str,
)
def test_preemption(expected: Expected, settings: Settings) -> None:
    engine = drive.make_single_rank_engine(expected.oracle.path, **few_blocks(settings))
    completions = drive.run(engine, add_cache_salt(mixed_requests(expected.oracle)))
    stats: SchedulerStats = engine.scheduler.stats
    assert stats.preemptions >= 5
    expected.check(completions)


@pytest.mark.parametrize("num_done", [1, 16, 63])
@pytest.mark.parametrize("settings", [{}, {"reuse_cache": False}, {"rtp_pipeline_depth": 1}], ids=str)
def test_resume(expected: Expected, num_done: int, settings: Settings) -> None:
    """After the loss of a rank the API resubmits every request with the tokens that its client already has."""
    engine = drive.make_single_rank_engine(expected.oracle.path, **settings)
    requests = [
        greedy_resumed(answer.prompt, answer.tokens[:num_done], str(index))
        for index, answer in enumerate(expected.oracle.answers)
    ] + [sampled_request(expected.oracle, name, expected.sampled[name][:num_done]) for name in SAMPLED]
    completions = drive.run(engine, requests)
    for index, answer in enumerate(expected.oracle.answers):
        completion = completions[str(index)]
        answer.after(num_done).check(completion.tokens, completion.logits)
    assert {name: completions[name].tokens for name in SAMPLED} == {
        n: t[num_done:] for n, t in expected.sampled.items()
    }
    assert all(completions[name].finish == "length" for name in completions)


def greedy_resumed(prompt: list[int], output: list[int], id: str) -> Request:
    return Request(id, list(prompt), SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0), list(output))


@pytest.mark.parametrize("reuse_cache", [True, False])
@pytest.mark.parametrize("order", ["first", "last"])
def test_requests_with_nan_do_not_affect_others(expected: Expected, order: str, reuse_cache: bool) -> None:
    """Requests with NaN end with an error; others in the batch, and those that reuse their blocks, are unaffected."""
    oracle = expected.oracle
    engine = drive.make_single_rank_engine(oracle.path, test_block_num=40, reuse_cache=reuse_cache)
    used_tokens = {t for a in oracle.answers for t in (*a.prompt, *a.tokens)}
    used_tokens |= {t for tokens in expected.sampled.values() for t in tokens}
    nan_token = next(token for token in range(oracle.answers[0].logits.shape[-1]) if token not in used_tokens)
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    runner.residency.model.embed_tokens.weight.data[nan_token] = torch.nan
    # Also at the end: a sliding window hides the first token from the last.
    prompts = [[nan_token, *a.prompt, nan_token] for a in oracle.answers]
    bad = [greedy_request(prompt, 8, id=f"bad {i}") for i, prompt in enumerate(prompts)]
    good = mixed_requests(oracle)
    requests = [r for pair in zip(bad, good, strict=False) for r in (pair if order == "first" else pair[::-1])]
    completions = drive.run(engine, add_cache_salt(requests + good[len(bad) :]))
    assert [completions[r.id].finish for r in bad] == ["error"] * len(bad)
    expected.check(completions)
    expected.check(drive.run(engine, add_cache_salt(mixed_requests(oracle))))


@pytest.mark.parametrize(
    ("rank_pool", "name", "num_blocks"),
    # Few blocks for each: a window of 20 tokens needs less.
    [(2, "mistral-window", 12), pytest.param(4, "qwen2-14-heads", 24, marks=pytest.mark.slow)],
    ids=["tp2", "tp4"],
    indirect=["rank_pool"],
)
def test_several_ranks(rank_pool: RankPool, oracles: Oracles, name: str, num_blocks: int) -> None:
    """Small chunks and few blocks on several ranks; then all requests twice, the second time from the prefix cache."""
    expected = compute_expected(oracles(name))
    settings = {"max_batch_tokens_size": 16, "test_block_num": num_blocks}
    report = rank_pool.run(expected.oracle.path, [mixed_requests(expected.oracle)], "local", **settings)
    assert report.replies[0]["preemptions"] >= 3
    expected.check(report.completions)
    waves = [mixed_requests(expected.oracle), repeated_requests(expected.oracle)]
    completions = rank_pool.run(expected.oracle.path, waves, "local").completions
    expected.check(completions)
    repeated = {id.removesuffix(" again"): c for id, c in completions.items() if id.endswith(" again")}
    assert repeated[str(PROMPT_LENGTHS.index(70))].cached_tokens == 64
    expected.check(repeated)


def repeated_requests(oracle: Oracle) -> list[Request]:
    requests = mixed_requests(oracle)
    for request in requests:
        request.id += " again"
    return requests
