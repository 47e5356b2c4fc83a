"""Three draft tokens per step from a proposer that this file adds: the text is that without drafts.

Alone, and together with a logits processor that this file adds too, which allows ten tokens and none twice in a row.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.layers.logits_processors import DEFAULT_LOGITS_PROCESSORS, LogitsProcessorFactory
from tests.model import drive
from tests.model.conftest import Oracles
from tests.model.oracle import Oracle
from tests.quick import slow_except
from tests.seams.test_logits_processor import ALLOWED, AllowTenTokens
from tests.seams.thread_ranks import thread_ranks

NUM_DRAFTS, NUM_TOKENS = 3, 48
CHAINS: dict[str, Sequence[LogitsProcessorFactory]] = {
    "plain": DEFAULT_LOGITS_PROCESSORS,
    "ten-tokens": (*DEFAULT_LOGITS_PROCESSORS, AllowTenTokens),
}
FEW_BLOCKS = {"test_block_num": 14, "seq_size_per_block": 16}


@pytest.fixture(scope="module")
def oracle(oracles: Oracles) -> Oracle:
    return oracles("llama-biases")


class FixedProposer:
    """Proposes the next tokens of known texts, one of three wrong in a fixed pattern."""

    needs_result = True

    def __init__(self, texts: dict[str, list[int]]):
        self.texts = texts
        self.num_proposed = 0

    def propose(self, request: Request) -> list[int]:
        done = request.num_output_tokens
        drafts = self.texts[request.id][done : done + NUM_DRAFTS]
        if done % 4:
            drafts[done % 4 - 1 : done % 4] = [ALLOWED[done % 10]]
        self.num_proposed += len(drafts)
        return drafts


def make_requests(oracle: Oracle, temperature: float) -> list[Request]:
    return [
        Request(
            str(index),
            list(answer.prompt),
            SamplingParams(NUM_TOKENS, temperature, top_p=0.95, seed=index, repetition_penalty=1.1),
        )
        for index, answer in enumerate(oracle.answers)
    ]


def texts_without_drafts(
    path: Path, requests: list[Request], chain: Sequence[LogitsProcessorFactory]
) -> dict[str, list[int]]:
    with thread_ranks(path, 1, logits_processors=chain) as (engine, _):
        return {id: completion.tokens for id, completion in drive.run(engine, requests).items()}


@pytest.mark.parametrize(
    "settings", slow_except([{}, FEW_BLOCKS, {"max_batch_tokens_size": 7}], {}, FEW_BLOCKS), ids=str
)
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("temperature", slow_except([0.0, 0.8], 0.8))
@pytest.mark.parametrize("chain", CHAINS)
def test_text_does_not_depend_on_drafts(
    oracle: Oracle, chain: str, temperature: float, tp_size: int, settings: dict[str, Any]
) -> None:
    texts = texts_without_drafts(oracle.path, make_requests(oracle, temperature), CHAINS[chain])
    assert all(len(set(text)) > 5 for text in texts.values())
    if chain == "ten-tokens":
        assert {token for text in texts.values() for token in text} <= set(ALLOWED)
    proposer = FixedProposer(texts)
    with thread_ranks(oracle.path, tp_size, proposer, CHAINS[chain], **settings) as (engine, _):
        completions = drive.run(engine, make_requests(oracle, temperature))
    assert {id: completion.tokens for id, completion in completions.items()} == texts
    assert proposer.num_proposed > NUM_TOKENS


def test_drafts_save_steps(oracle: Oracle) -> None:
    """With drafts that are all right, a step gives four tokens."""
    [request] = make_requests(oracle, 0.0)[-1:]
    texts = texts_without_drafts(oracle.path, make_requests(oracle, 0.0), DEFAULT_LOGITS_PROCESSORS)
    proposer = FixedProposer(texts)
    proposer.propose = lambda request: texts[request.id][request.num_output_tokens :][:NUM_DRAFTS]  # type: ignore[method-assign]
    with thread_ranks(oracle.path, 1, proposer, max_batch_tokens_size=512) as (engine, _):
        completions = {request.id: drive.Completion()}
        engine.add(request)
        outputs: Counter[int] = Counter()
        while engine.has_work:
            before = len(completions[request.id].tokens)
            drive.step(engine, completions)
            outputs[len(completions[request.id].tokens) - before] += 1
    assert outputs == {1: 1, 4: 11, 3: 1}  # the first token comes without drafts
