"""Constrained requests in the engine: with tensor parallelism, pipelining, preemption, and beside other requests."""

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema_rs
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.forced_tokens import ForcedTokens
from rtp_llm.engine.grammar_compiler import GrammarCompiler
from rtp_llm.engine.vocabulary import open_vocabulary
from rtp_llm.text import grammar
from rtp_llm.text.tokenizer import Tokenizer
from tests.model import drive
from tests.quick import slow_except
from tests.seams.thread_ranks import thread_ranks
from tests.structured.random_text import Vocabulary
from tests.structured.schemas import SCHEMAS

NAMES = ("weather call", "invoice", "several types", "expression", "colour")
MAX_TOKENS = 120
FEW_BLOCKS = {"test_block_num": 14, "seq_size_per_block": 16}
SETTINGS: list[dict[str, Any]] = [{}, {"rtp_pipeline_depth": 1}, FEW_BLOCKS, {"max_batch_tokens_size": 7}]


@contextmanager
def running_engine(checkpoint: Path, tp_size: int = 1, *, has_drafts: bool = True, **settings: Any) -> Iterator[Engine]:
    with thread_ranks(checkpoint, tp_size, ForcedTokens() if has_drafts else None, **settings) as (engine, ranks):
        residency = ranks[0][0].residency
        engine.compiler = GrammarCompiler(open_vocabulary(residency.config, residency.spec.vocab_size))
        yield engine


def make_request(
    tokenizer: Tokenizer, id: str, text_grammar: str, output: Sequence[int] = (), **params: Any
) -> Request:
    defaults = {"temperature": 0.8, "seed": len(id), "max_tokens": MAX_TOKENS, "frequency_penalty": 0.5}
    stop_ids = tuple(sorted(tokenizer.eos_ids))
    sampling = SamplingParams(**{**defaults, "stop_token_ids": stop_ids, "grammar": text_grammar, **params})
    return Request(id, tokenizer.encode(f"Write a JSON text, as {id} please."), sampling, list(output))


def make_requests(tokenizer: Tokenizer) -> list[Request]:
    """Returns requests with a grammar, and in between as many without."""
    requests = []
    for name in NAMES:
        requests.append(make_request(tokenizer, name, grammar.from_json_schema(SCHEMAS[name])))
        requests.append(make_request(tokenizer, f"free {name}", "", max_tokens=60))
    return requests


def generate(engine: Engine, requests: Sequence[Request]) -> dict[str, drive.Completion]:
    return drive.run(engine, requests)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, vocabulary: Vocabulary) -> dict[str, list[int]]:
    """The tokens of each request, generated alone and without drafts."""
    texts = {}
    with running_engine(checkpoint, has_drafts=False) as engine:
        for request in make_requests(vocabulary.tokenizer):
            texts[request.id] = generate(engine, [request])[request.id].tokens
    return texts


@pytest.mark.parametrize("settings", slow_except(SETTINGS, {}, FEW_BLOCKS), ids=str)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_text_is_valid_and_that_of_the_request_alone(
    checkpoint: Path, vocabulary: Vocabulary, expected: dict[str, list[int]], tp_size: int, settings: dict[str, Any]
) -> None:
    with running_engine(checkpoint, tp_size, **settings) as engine:
        completions = generate(engine, make_requests(vocabulary.tokenizer))
        if settings is FEW_BLOCKS:
            assert engine.scheduler.stats.preemptions, "nothing is preempted, so nothing is tested"
    assert {id: completion.tokens for id, completion in completions.items()} == expected
    for name in NAMES:
        tokens = completions[name].tokens
        if completions[name].finish == "stop":
            assert tokens.pop() in vocabulary.eos_ids
            jsonschema_rs.validator_for(SCHEMAS[name]).validate(json.loads(vocabulary.tokenizer.decode(tokens)))
    assert sum(completions[name].finish == "stop" for name in NAMES) >= 3


def test_a_resumed_request_continues(checkpoint: Path, vocabulary: Vocabulary, expected: dict[str, list[int]]) -> None:
    """As after the loss of a rank: the API process submits the request again, with its output so far."""
    with running_engine(checkpoint) as engine:
        for name in NAMES:
            done = expected[name][: len(expected[name]) // 2]
            request = make_request(vocabulary.tokenizer, name, grammar.from_json_schema(SCHEMAS[name]), done)
            assert done + generate(engine, [request])[name].tokens == expected[name]


def test_logprobs_are_those_of_the_sampled_tokens(checkpoint: Path, vocabulary: Vocabulary) -> None:
    with running_engine(checkpoint) as engine:
        request = make_request(vocabulary.tokenizer, "r", grammar.from_regex("[ab]{4}c"), logprobs=2)
        completion = generate(engine, [request])["r"]
    assert len(completion.logprobs) == len(completion.tokens)
    assert all(len(top) == 2 for _, _, top in completion.logprobs)


@pytest.mark.parametrize(("pattern", "min_tokens"), [("[a-c]", 30), ("[a-c]{2,40}", 20)])
def test_min_tokens_gives_way_to_the_end_of_the_grammar(
    checkpoint: Path, vocabulary: Vocabulary, pattern: str, min_tokens: int
) -> None:
    with running_engine(checkpoint) as engine:
        request = make_request(vocabulary.tokenizer, "r", grammar.from_regex(pattern), min_tokens=min_tokens)
        completion = generate(engine, [request])["r"]
    assert completion.finish == "stop"
    text = vocabulary.tokenizer.decode(completion.tokens)
    assert len(text) == 1 if pattern == "[a-c]" else len(completion.tokens) > min_tokens or len(text) == 40


def test_a_stop_token_of_the_client_may_come_where_the_grammar_allows_it(
    checkpoint: Path, vocabulary: Vocabulary
) -> None:
    with_b = tuple(t for t in range(vocabulary.tokenizer.vocab_size) if b"b" in vocabulary.tokenizer.token_bytes(t))
    with running_engine(checkpoint) as engine:
        request = make_request(vocabulary.tokenizer, "r", grammar.from_regex("a{3}b{3}"), stop_token_ids=with_b)
        completion = generate(engine, [request])["r"]
    assert completion.finish == "stop"
    assert "b" not in vocabulary.tokenizer.decode(completion.tokens[:-1])
    assert "aaabbb".startswith(vocabulary.tokenizer.decode(completion.tokens))


def test_only_the_request_waits_for_its_grammar(checkpoint: Path, vocabulary: Vocabulary) -> None:
    may_compile = threading.Event()

    def slow_matcher(*args: Any, **kwargs: Any) -> LLMatcher:
        may_compile.wait(60)
        return LLMatcher(*args, **kwargs)

    slow = make_request(vocabulary.tokenizer, "slow", grammar.from_regex("ab"))
    aborted = make_request(vocabulary.tokenizer, "aborted", grammar.from_regex("ac"))
    free = make_request(vocabulary.tokenizer, "free", "", max_tokens=20)
    completions = {id: drive.Completion() for id in ("slow", "aborted", "free")}
    with running_engine(checkpoint) as engine, mock.patch("rtp_llm.engine.grammar_compiler.LLMatcher", slow_matcher):
        for request in (slow, aborted, free):
            assert engine.add(request) is None
        while not completions["free"].finish:
            drive.step(engine, completions)
        assert not completions["slow"].tokens
        assert engine.num_waiting == 2
        assert engine.has_work
        assert not engine.is_stalled
        output = engine.abort("aborted")
        assert output
        assert output.finish == "abort"
        may_compile.set()
        drive.finish(engine, completions)
    assert vocabulary.tokenizer.decode(completions["slow"].tokens) == "ab"
    assert not completions["aborted"].tokens


def test_a_grammar_that_the_model_cannot_follow_ends_its_request_only(checkpoint: Path, vocabulary: Vocabulary) -> None:
    bad = make_request(vocabulary.tokenizer, "bad", "start: <[999999]>")
    good = make_request(vocabulary.tokenizer, "good", grammar.from_regex("ab"))
    with running_engine(checkpoint) as engine:
        assert engine.add(bad) is None
        assert engine.add(good) is None
        outputs = []
        while engine.has_work:
            outputs += engine.step()
    [failed] = [output for output in outputs if output.request_id == "bad"]
    assert failed.finish == "invalid"
    assert "999999" in failed.error
    assert [output.finish for output in outputs if output.request_id == "good"][-1] == "stop"


def test_a_grammar_that_grows_beyond_the_limits_ends_its_request(checkpoint: Path, vocabulary: Vocabulary) -> None:
    text_grammar = grammar.from_json_schema(SCHEMAS["person"])
    request = make_request(vocabulary.tokenizer, "r", text_grammar)
    with (
        running_engine(checkpoint) as engine,
        mock.patch("rtp_llm.engine.grammar_compiler.LIMITS", LLParserLimits(max_lexer_states=30)),
    ):
        engine.add(request)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
    assert outputs[-1].finish == "invalid"
    assert "too many states" in outputs[-1].error


def test_a_compiled_grammar_is_used_again(checkpoint: Path, vocabulary: Vocabulary) -> None:
    with (
        running_engine(checkpoint) as engine,
        mock.patch("rtp_llm.engine.grammar_compiler.LLMatcher", wraps=LLMatcher) as compile_grammar,
    ):
        requests = [make_request(vocabulary.tokenizer, str(i), grammar.from_regex("a[bc]")) for i in range(4)]
        completions = generate(engine, requests)
    assert compile_grammar.call_count == 1
    assert {completion.finish for completion in completions.values()} == {"stop"}


def test_without_a_usable_tokenizer_only_constrained_requests_fail(checkpoint: Path, vocabulary: Vocabulary) -> None:
    unreadable: Future[LLTokenizer] = Future()
    unreadable.set_exception(ValueError("this model's tokenizer does not support grammars"))
    with running_engine(checkpoint) as engine:
        engine.compiler = GrammarCompiler(unreadable)
        engine.add(make_request(vocabulary.tokenizer, "r", grammar.from_regex("ab")))
        [output] = engine.step()
    assert (output.finish, "tokenizer" in output.error) == ("invalid", True)
