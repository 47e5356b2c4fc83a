"""Tests the parts of a rank that run other code on a GPU than on a CPU, and that parity does not cover."""

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

SECONDS = 60
VOCAB = 5000
# Every way to choose, and every edit of logits.
WAYS: list[dict[str, Any]] = [
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
def alone(device: torch.device) -> Iterator[TorchGroup]:
    """A group of one rank over the backend of this device. A server with one rank never creates such a group."""
    plan = replace(local_plan(1, free_start_port()), device=device.type)
    backend = "nccl" if device.type == "cuda" else "gloo"
    group._init_torch_group(plan, 0, 1, HOST, SECONDS, backend, device)
    made = TorchGroup(0, 1, device)
    yield made
    made.close()
    assert not dist.is_initialized()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_collectives(alone: TorchGroup, device: torch.device, dtype: torch.dtype) -> None:
    table = torch.arange(24, dtype=dtype, device=device).reshape(4, 6)
    assert torch.equal(alone.all_reduce(table.clone()), table)
    gathered = alone.gather(table.T)  # not contiguous
    assert gathered is not None
    assert torch.equal(torch.cat(gathered), table.T)
    assert alone.min(12345678901) == 12345678901


@pytest.mark.parametrize("seed", range(3))
def test_the_sampler_chooses_as_on_cpu(device: torch.device, seed: int) -> None:
    logits = 4 * torch.randn(len(WAYS), VOCAB, generator=torch.Generator().manual_seed(seed))
    requests = [
        Request(str(i), [1, 7, 9], SamplingParams(max_tokens=20, **({"seed": seed + i} | way)), [7, 12])
        for i, way in enumerate(WAYS)
    ]
    plan = SamplingMetadata(list(range(len(WAYS))), requests, [(0, 5, 3), (1, 6, 3)])
    here, prompt_here = sample(logits.to(device), plan)
    there, prompt_there = sample(logits, plan)
    assert [one.token_id for one in here] == [one.token_id for one in there]
    for one, other in zip([*prompt_here, here[-1].logprob], [*prompt_there, there[-1].logprob], strict=True):
        assert one is not None
        assert other is not None
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert (one[1], [token for token, _ in one[2]]) == (other[1], [token for token, _ in other[2]])


def test_logits_that_are_not_numbers_are_told(device: torch.device) -> None:
    logits = torch.zeros(2, VOCAB, device=device)
    logits[1, 17] = torch.nan
    requests = [Request(str(i), [1], SamplingParams(max_tokens=2, temperature=0.0)) for i in range(2)]
    sampled, _ = sample(logits, SamplingMetadata([0, 1], requests, []))
    assert sampled[0].token_id is not None
    assert sampled[1].token_id is None
