"""Workloads, summaries and bounds against numbers computed in another way."""

import itertools
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from rtp_llm.bench.bound import PRECISIONS, Bound, MachineRates, ModelCost
from rtp_llm.bench.checkpoint import SHAPES, write_checkpoint
from rtp_llm.bench.record import Record
from rtp_llm.bench.summary import Slo, Summary
from rtp_llm.bench.workload import WORKLOADS, Workload, find_workload, poisson_arrivals
from rtp_llm.errors import ConfigError
from rtp_llm.native.library import DTYPE_CODES, library

SLO = Slo(ttft=0.3, itl=0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, "tiny")
    return folder


def test_requests_have_the_lengths_of_the_workload() -> None:
    mixed = WORKLOADS["mixed"].requests(16, 1000, seed=1)
    assert Counter((len(r.prompt), r.output_tokens) for r in mixed) == {(8192, 64): 2, (128, 128): 14}
    assert all(0 <= token < 1000 for request in mixed for token in request.prompt)


def test_seeds_give_other_prompts_and_a_shared_prefix_is_shared() -> None:
    first, again, other = (WORKLOADS["shared-prefix"].requests(3, 1000, seed) for seed in (1, 1, 2))
    assert first == again
    assert len({tuple(r.prompt[:1024]) for r in first}) == 1
    assert len({tuple(r.prompt) for r in first}) == 3
    assert first[0].prompt[:1024] != other[0].prompt[:1024]


def test_poisson_arrivals_have_exponential_gaps() -> None:
    arrivals = poisson_arrivals(10.0, 20000, seed=3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.03)  # of an exponential law: as large as the mean
    assert min(gaps) > 0


@pytest.mark.parametrize(("name", "inputs", "outputs"), [("none", None, None), ("chat", 3, None), ("chat", 0, 1)])
def test_a_wrong_workload_is_refused(name: str, inputs: int | None, outputs: int | None) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        find_workload(name, inputs, outputs)


def test_summary_of_two_requests_and_a_failure() -> None:
    records = [
        Record(100, 1.0, [1.2, 1.3, 1.4], 3),  # meets the SLO
        Record(50, 1.5, [2.5, 2.6], 4),  # too late; its two events carry four tokens
        Record(10, 1.5, error="HTTP 500"),
    ]
    summary = Summary.of(records, SLO)
    assert (summary.requests, summary.errors) == (3, 1)
    assert summary.seconds == pytest.approx(1.6)
    assert summary.output_rate == pytest.approx(7 / 1.6)
    assert summary.goodput == pytest.approx(1 / 1.6)
    assert summary.input_rate == pytest.approx((100 / 0.2 + 50 / 1.0) / 2)
    assert summary.decode_rate == pytest.approx((2 / 0.2 + 3 / 0.1) / 2)
    assert (summary.ttft.p50, summary.e2e.p50) == pytest.approx((0.6, 0.75))
    assert summary.itl.p99 == pytest.approx(0.1)
    assert summary.tokens_per_event == pytest.approx(7 / 5)


def test_summary_without_any_answer_is_zero() -> None:
    summary = Summary.of([Record(10, 0.0, error="no")], SLO)
    assert (summary.output_rate, summary.ttft.p99, summary.goodput, summary.errors) == (0.0, 0.0, 0.0, 1)


RATES = MachineRates(50e9, {"bf16": 500e9, "fp32": 100e9, "int8": 1000e9})


def test_costs_are_those_of_the_model_in_transformers(checkpoint: Path) -> None:
    """Bytes from the tensors in memory, operations as torch counts them."""
    cost = ModelCost.of(checkpoint, PRECISIONS["bf16"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert cost.layer_weights + cost.head_weights == matrices  # embedding and head are one matrix
    tokens = 24
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        output = model(torch.arange(tokens)[None], logits_to_keep=1)
    cache = output.past_key_values
    assert cost.kv_bytes == sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers) // tokens
    rates = MachineRates(1.0, {"bf16": 1.0})
    # Eager attention multiplies the masked half, too.
    assert cost.compute_seconds(rates, tokens, 1, tokens * tokens) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_bound_of_one_stream_is_bytes_over_bandwidth(checkpoint: Path) -> None:
    cost = ModelCost.of(checkpoint, PRECISIONS["bf16"])
    bound = Bound.of(cost, RATES, Workload("x", ((128, 128),)), 1)
    weights = 2 * (cost.layer_weights + cost.head_weights)
    assert bound.decode_rate == pytest.approx(RATES.bandwidth / (weights + 192 * cost.kv_bytes))
    assert bound.output_rate < bound.decode_rate  # the prefill takes time, too
    wide = MachineRates(1e15, RATES.operations)
    assert Bound.of(cost, wide, Workload("x", ((128, 128),)), 1).decode_rate > 2 * bound.decode_rate


@pytest.mark.parametrize("name", ["int8", "w8a8", "int4"])
def test_bits_of_a_weight_are_those_that_the_kernels_keep(name: str) -> None:
    kernels = library()
    if kernels is None:
        pytest.skip("no kernels were built for this CPU")
    outputs, inputs = 1920, 4096
    packed = getattr(kernels, f"rtp_{name}_packed_bytes")(DTYPE_CODES["torch.bfloat16"], outputs, inputs, 0)
    assert packed * 8 / (outputs * inputs) == pytest.approx(PRECISIONS[name].bits, rel=0.01)


def test_the_head_of_int4_has_8_bits(checkpoint: Path) -> None:
    cost = ModelCost.of(checkpoint, PRECISIONS["int4"])
    weights = cost.layer_weights * 4.5 / 8 + cost.head_weights
    assert cost.read_seconds(RATES, 0, 0.0) == pytest.approx(weights / RATES.bandwidth)


def test_bound_of_many_streams_is_that_of_operations(checkpoint: Path) -> None:
    cost = ModelCost.of(checkpoint, PRECISIONS["w8a8"])
    workload = Workload("x", ((128, 64),))
    many = Bound.of(cost, RATES, workload, 10_000)
    operations = 2 * cost.layer_weights * 191 + 2 * cost.head_weights * 64
    assert many.output_rate < 64 / (operations / 1000e9)
    assert many.output_rate == pytest.approx(64 / (operations / 1000e9), rel=0.2)  # attention is the rest
    assert Bound.of(cost, RATES, workload, 1).output_rate < many.output_rate


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_of_the_architecture(shape: str) -> None:
    from rtp_llm.bench.checkpoint import tensor_shapes

    config = SHAPES[shape]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert {name: size for name, size, _, _ in tensor_shapes(config)} == expected


def test_weights_and_tokenizer_work_together(checkpoint: Path) -> None:
    from tokenizers import Tokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.randint(0, 1024, (1, 64), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits[0]
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 100
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1024
    text = " the cat<|im_end|>naïve 数据\n"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode(" ab").tokens == ["Ġa", "b"] or len(tokenizer.encode(" ab").ids) == 1
    assert all(tokenizer.decode([number], skip_special_tokens=False) for number in range(1024))
