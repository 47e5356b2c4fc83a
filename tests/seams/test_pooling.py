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


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens_size": 16}], ids=str)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_hidden_state_of_the_last_token(oracle: Oracle, tp_size: int, settings: dict[str, Any]) -> None:
    """Beside requests that generate, of which one has the same prompt: its text is not disturbed."""
    pooled = [
        Request(f"pooled {i}", list(answer.prompt), SamplingParams(max_tokens=1, pooling=True))
        for i, answer in enumerate(oracle.answers)
    ]
    generating = [greedy_request(answer.prompt, 8, id=f"{i}") for i, answer in enumerate(oracle.answers)]
    states: dict[str, list[float]] = {}
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
        np.testing.assert_allclose(states[request.id], expected_state(oracle, answer.prompt), rtol=0, atol=1e-4)
    assert tokens == {f"{i}": answer.tokens[:8] for i, answer in enumerate(oracle.answers)}
