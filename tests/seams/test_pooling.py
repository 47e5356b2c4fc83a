"""A pooled request returns the hidden state of its last prompt token, equal to that of transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from tests.model.conftest import Oracles
from tests.model.drive import greedy_request
from tests.model.oracle import Oracle
from tests.seams.thread_ranks import thread_ranks


@pytest.fixture(scope="module")
def oracle(oracles: Oracles) -> Oracle:
    return oracles("qwen3")


@torch.inference_mode()
def expected_state(oracle: Oracle, prompt: list[int]) -> np.ndarray:
    model = AutoModel.from_pretrained(oracle.path, dtype=torch.float32).eval()
    state: np.ndarray = model(torch.tensor([prompt])).last_hidden_state[0, -1].numpy()
    return state


@pytest.mark.parametrize(
    "settings", [{}, {"max_batch_tokens_size": 16}, {"max_batch_tokens_size": 16, "rtp_pipeline_depth": 1}], ids=str
)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_hidden_state_of_the_last_token(oracle: Oracle, tp_size: int, settings: dict[str, Any]) -> None:
    """Beside requests that generate, of which one has the same prompt: its text is not disturbed."""
    pooled = [
        Request(f"pooled {i}", list(answer.prompt), SamplingParams(max_tokens=1, pooling=True))
        for i, answer in enumerate(oracle.answers)
    ]
    generating = [greedy_request(answer.prompt, 8, id=f"{i}") for i, answer in enumerate(oracle.answers)]
    states: dict[str, bytes] = {}
    tokens: dict[str, list[int]] = {request.id: [] for request in generating}
    with thread_ranks(oracle.path, tp_size, **settings) as (engine, _):
        for pair in zip(pooled, generating, strict=True):
            for request in pair:
                assert engine.add(request) is None
        while engine.has_work:
            for output in engine.step():
                if output.request_id in tokens:
                    tokens[output.request_id] += output.tokens
                else:
                    assert (output.tokens, output.finish) == ([], "stop")
                    states[output.request_id] = output.hidden_state
    for request, answer in zip(pooled, oracle.answers, strict=True):
        state = np.frombuffer(states[request.id], np.float32)
        np.testing.assert_allclose(state, expected_state(oracle, answer.prompt), rtol=0, atol=1e-4)
    assert tokens == {f"{i}": answer.tokens[:8] for i, answer in enumerate(oracle.answers)}


def test_a_cached_prompt_gives_the_same_state(oracle: Oracle) -> None:
    """Of a prompt whose blocks are all in the prefix cache, the last token is computed again."""
    answer = oracle.answers[-1]
    states = []
    with thread_ranks(oracle.path, 1) as (engine, _):
        for id in ("first", "again", "longer"):
            prompt = answer.prompt[:64] if id != "longer" else answer.prompt
            assert engine.add(Request(id, list(prompt), SamplingParams(max_tokens=1, pooling=True))) is None
            while engine.has_work:
                states += [np.frombuffer(output.hidden_state, np.float32) for output in engine.step()]
        assert engine.scheduler.stats.prefix_hits > 0
    for state, length in zip(states, (64, 64, len(answer.prompt)), strict=True):
        expected = expected_state(oracle, answer.prompt[:length])
        np.testing.assert_allclose(state, expected, rtol=0, atol=1e-4)
