"""Tests collectives and the sampler on this device, which tests/gpu/parity.py covers only in part."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows, SampledTokens
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import CommunicationError
from rtp_llm.layers.logprobs import compute_logprobs
from rtp_llm.layers.sampler import Sampler
from rtp_llm.layers.token_filter import FILTER_PARAMS, sample_filtered
from rtp_llm.parallel.group import TorchGroup, open_torch_group

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
FILTER_VOCAB_SIZE = 151_936  # of Qwen3
FILTERS: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_k": 50},
    {"top_k": 1000, "top_p": 0.95},
    {"min_p": 0.02},
    {"top_k": 20000, "top_p": 0.5, "min_p": 0.001},
]
NUMBERS = (0.0, 0.31, 0.77, 1 - 1e-9)  # random numbers; the first and the last select the ends of the kept tokens


@pytest.fixture
def single_rank_group(device: torch.device) -> Iterator[TorchGroup]:
    """Yields a group of one rank over the backend of this device, which a server with one rank never creates."""
    torch_group = open_torch_group(dist.HashStore(), 0, 1, TIMEOUT_SECONDS, device)
    yield torch_group
    torch_group.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_collectives(single_rank_group: TorchGroup, device: torch.device, dtype: torch.dtype) -> None:
    tensor = torch.arange(24, dtype=dtype, device=device).reshape(4, 6)
    assert torch.equal(single_rank_group.all_reduce(tensor.clone()), tensor)
    gathered = single_rank_group.gather(tensor.T)  # not contiguous
    assert gathered is not None
    assert torch.equal(torch.cat(gathered), tensor.T)
    assert torch.equal(single_rank_group.broadcast(tensor.clone()), tensor)
    assert single_rank_group.min(12345678901) == 12345678901


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
def test_abort_ends_a_group_and_another_forms(
    single_rank_group: TorchGroup, device: torch.device, is_busy: bool
) -> None:
    """Busy: the device has not computed the group's last collective when another thread aborts the group."""
    tensor = torch.ones(24, device=device)
    for _ in range(2):
        aborted = open_torch_group(dist.HashStore(), 0, 1, TIMEOUT_SECONDS, device)
        assert torch.equal(aborted.all_reduce(tensor.clone()), tensor)
        if is_busy:
            delay_device(device)
            aborted.all_reduce(tensor.clone())
        thread = threading.Thread(target=aborted.abort, args=["a test aborts"], daemon=True)
        thread.start()
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive(), "the abort hangs"
        for collective in (aborted.all_reduce, aborted.gather, aborted.broadcast):
            with pytest.raises(CommunicationError, match="aborted: a test aborts"):
                collective(tensor)
        with pytest.raises(CommunicationError, match="aborted: a test aborts"):
            aborted.check_aborted()
        aborted.close()
        assert torch.equal(single_rank_group.all_reduce(tensor.clone()), tensor), "another group is not aborted"


def delay_device(device: torch.device) -> None:
    """Keeps a GPU busy for about half a second; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda._sleep(1_000_000_000)  # clock cycles


def make_sampler(requests: Sequence[Request], device: torch.device) -> Sampler:
    """Returns a sampler in which each request has the slot of its index."""
    sampler = Sampler(len(requests), VOCAB_SIZE, device)
    for slot, request in enumerate(requests):
        sampler.reset(slot, request)
    return sampler


def run_sampler(logits: Tensor, requests: Sequence[Request]) -> list[SampledTokens]:
    """Returns the tokens that a new sampler gives the requests, on the device of the logits."""
    sampler = make_sampler(requests, logits.device)
    rows = SampledRows.build(range(len(requests)), [r.num_tokens for r in requests])
    return sampler.accept_drafts(sampler.sample(logits, rows), rows)


def make_requests(seed: int) -> list[Request]:
    """Returns a request for each of SAMPLING_PARAMS."""
    return [
        Request(str(i), [1, 7, 9], SamplingParams(max_tokens=20, **({"seed": seed + i} | params)), [7, 12])
        for i, params in enumerate(SAMPLING_PARAMS)
    ]


def random_logits(num_rows: int, vocab_size: int, spread: float, seed: int) -> Tensor:
    """Returns normally distributed logits [num_rows, vocab_size]. `spread`: standard deviation."""
    return spread * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_sampler_gives_same_tokens_as_on_cpu(device: torch.device, seed: int) -> None:
    requests = make_requests(seed)
    logits = random_logits(len(requests), VOCAB_SIZE, 4, seed)
    sampled, cpu_sampled = run_sampler(logits.to(device), requests), run_sampler(logits, requests)
    assert [s.token_ids for s in sampled] == [s.token_ids for s in cpu_sampled]
    logprobs = [*compute_logprobs(logits[:2].to(device), [5, 6], [3, 3]), *sampled[-1].logprobs]
    cpu_logprobs = [*compute_logprobs(logits[:2], [5, 6], [3, 3]), *cpu_sampled[-1].logprobs]
    assert len(logprobs) == 3
    for actual, expected in zip(logprobs, cpu_logprobs, strict=True):
        assert actual[0] == pytest.approx(expected[0], abs=1e-4)
        assert (actual[1], [token for token, _ in actual[2]]) == (expected[1], [token for token, _ in expected[2]])


def test_rows_after_drafts_give_same_tokens_as_on_cpu(device: torch.device) -> None:
    """A step with three drafts per sequence; the drafts count in the penalties of the rows behind them."""
    requests = make_requests(seed=3)
    logits = random_logits(4 * len(requests), VOCAB_SIZE, 4, seed=3)
    rows = SampledRows.build(range(len(requests)), [r.num_tokens for r in requests], [[5, 9, 5]] * len(requests))
    tokens, cpu_tokens = (make_sampler(requests, t.device).sample(t, rows).tokens for t in (logits.to(device), logits))
    assert tokens.tolist() == cpu_tokens.tolist()


@pytest.mark.parametrize("step", [0, 0.25], ids=["distinct", "equal"])
@pytest.mark.parametrize("spread", [0.5, 2.5], ids=["flat", "peaked"])
def test_filters_give_same_tokens_as_on_cpu(device: torch.device, spread: float, step: float) -> None:
    """Flat rows keep more tokens than the sampler sorts. `step`: logits are its multiples, so that many are equal."""
    logits = random_logits(len(FILTERS), FILTER_VOCAB_SIZE, spread, seed=1)
    logits = ((logits / step).round() * step if step else logits).repeat_interleave(len(NUMBERS), 0)
    params = np.zeros(len(logits), FILTER_PARAMS)
    params["temperature"], params["top_p"], params["number"] = 0.7, 1, NUMBERS * len(FILTERS)
    for index, filters in enumerate(FILTERS):
        for name, value in filters.items():
            params[name][index * len(NUMBERS) : (index + 1) * len(NUMBERS)] = value
    tokens, cpu_tokens = (sample_filtered(t, params).tolist() for t in (logits.to(device), logits))
    assert len(set(cpu_tokens)) > len(FILTERS)
    assert tokens == cpu_tokens


@pytest.mark.parametrize("logit", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.8}, {"top_p": 0.9}], ids=str)
def test_nan_and_inf_logits_give_no_token(device: torch.device, params: dict[str, Any], logit: float) -> None:
    logits = torch.zeros(2, VOCAB_SIZE, device=device)
    logits[1, 17] = logit
    requests = [Request(str(i), [1], SamplingParams(max_tokens=2, **params)) for i in range(2)]
    sampled = run_sampler(logits, requests)
    assert [(s.failed, len(s.token_ids)) for s in sampled] == [(False, 1), (True, 0)]
