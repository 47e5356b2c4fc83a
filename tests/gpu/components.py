"""Tests GPU-specific code of a rank that tests/gpu/parity.py does not cover: collectives and the sampler."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SamplingMetadata
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.layers.sampler import sample
from rtp_llm.parallel import group
from rtp_llm.parallel.group import TorchGroup
from tests.model.rank import HOST, local_plan
from tests.ports import free_start_port

TIMEOUT_SECONDS = 60
VOCAB_SIZE = 5000
# Every sampling method and every logits processor.
SAMPLING_PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"repetition_penalty": 1.3, "temperature": 0.0},
    {"presence_penalty": 0.5, "frequency_penalty": 0.7},
    {"logit_bias": {7: 5.0, 9: -3.0}, "temperature": 0.0},
    {"min_tokens": 10, "stop_token_ids": (3, 4), "logprobs": 5},
]


@pytest.fixture
def single_rank_group(device: torch.device) -> Iterator[TorchGroup]:
    """Yields a group of one rank over the backend of this device, which a server with one rank never creates."""
    plan = replace(local_plan(1, free_start_port()), device=device.type)
    backend = "nccl" if device.type == "cuda" else "gloo"
    group._init_torch_group(plan, 0, 1, HOST, TIMEOUT_SECONDS, backend, device)
    torch_group = TorchGroup(0, 1, device)
    yield torch_group
    torch_group.close()
    assert not dist.is_initialized()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_collectives(single_rank_group: TorchGroup, device: torch.device, dtype: torch.dtype) -> None:
    tensor = torch.arange(24, dtype=dtype, device=device).reshape(4, 6)
    assert torch.equal(single_rank_group.all_reduce(tensor.clone()), tensor)
    gathered = single_rank_group.gather(tensor.T)  # not contiguous
    assert gathered is not None
    assert torch.equal(torch.cat(gathered), tensor.T)
    assert single_rank_group.min(12345678901) == 12345678901


@pytest.mark.parametrize("seed", range(3))
def test_sampler_gives_same_tokens_as_on_cpu(device: torch.device, seed: int) -> None:
    logits = 4 * torch.randn(len(SAMPLING_PARAMS), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    requests = [
        Request(str(i), [1, 7, 9], SamplingParams(max_tokens=20, **({"seed": seed + i} | params)), [7, 12])
        for i, params in enumerate(SAMPLING_PARAMS)
    ]
    metadata = SamplingMetadata(list(range(len(SAMPLING_PARAMS))), requests, [(0, 5, 3), (1, 6, 3)])
    sampled, prompt_logprobs = sample(logits.to(device), metadata)
    cpu_sampled, cpu_prompt_logprobs = sample(logits, metadata)
    assert [token.token_id for token in sampled] == [token.token_id for token in cpu_sampled]
    logprobs = [*prompt_logprobs, sampled[-1].logprob]
    cpu_logprobs = [*cpu_prompt_logprobs, cpu_sampled[-1].logprob]
    for actual, expected in zip(logprobs, cpu_logprobs, strict=True):
        assert actual is not None
        assert expected is not None
        assert actual[0] == pytest.approx(expected[0], abs=1e-4)
        assert (actual[1], [token for token, _ in actual[2]]) == (expected[1], [token for token, _ in expected[2]])


def test_nan_logits_give_no_token(device: torch.device) -> None:
    logits = torch.zeros(2, VOCAB_SIZE, device=device)
    logits[1, 17] = torch.nan
    requests = [Request(str(i), [1], SamplingParams(max_tokens=2, temperature=0.0)) for i in range(2)]
    sampled, _ = sample(logits, SamplingMetadata([0, 1], requests, []))
    assert sampled[0].token_id is not None
    assert sampled[1].token_id is None
