"""The cost estimate of a step, compared with torch's FLOP counter on the same decoder."""

from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rtp_llm.engine.epoch import make_scheduler
from rtp_llm.engine.step_builder import build_step
from rtp_llm.runner.input_batch import StepInputs
from rtp_llm.runner.model_runner import ModelRunner
from tests.model import drive
from tests.model.conftest import Oracles
from tests.model.drive import SingleRankGroup
from tests.quick import slow_except
from tests.unit.scheduling import make_request


def prompt_inputs(runner: ModelRunner, num_tokens: int) -> StepInputs:
    """Returns the step that computes one prompt in one chunk and samples its next token."""
    prompt = make_request("a", num_tokens)
    scheduler = make_scheduler(runner.residency)
    scheduler.add(prompt)
    return runner.prepare(build_step(scheduler.schedule(), 1, 1))


@pytest.mark.parametrize(
    "name", slow_except(["llama-biases", "llama-tied", "qwen2-14-heads", "qwen3"], "qwen2-14-heads")
)
@pytest.mark.usefixtures("without_kernels")  # torch counts only its own products
def test_flops_of_a_prompt(oracles: Oracles, name: str) -> None:
    """Compares all FLOPs except those of attention, where the reference backend computes masked keys too."""
    with mock.patch("rtp_llm.kernels.linear_methods.MIN_PREPACKED_ELEMENTS", 1 << 60):
        runner, _ = drive.load_runner(oracles(name).path, {"max_batch_tokens_size": 64}, SingleRankGroup())
    inputs, spec = prompt_inputs(runner, 64), runner.residency.spec
    with FlopCounterMode(display=False) as counter:
        runner.forward(inputs)
        runner.residency.model.logits(torch.zeros(1, spec.hidden_size))
    flop_counts = counter.get_flop_counts()["Global"]
    dense_flops = sum(flops for operation, flops in flop_counts.items() if "attention" not in str(operation))
    num_pairs = 64 * 65 // 2  # of query and key
    attention_flops = 4 * spec.num_layers * spec.num_heads * spec.head_dim * num_pairs
    assert runner.cost.flops - attention_flops == pytest.approx(dense_flops, rel=0.02)


def test_bytes_of_a_step(oracles: Oracles) -> None:
    runner, load_stats = drive.load_runner(oracles("llama").path, {"max_batch_tokens_size": 64}, SingleRankGroup())
    spec = runner.residency.spec
    runner.cost.add(prompt_inputs(runner, 48))
    cache_bytes = 48 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4
    assert runner.cost.write_bytes == cache_bytes
    assert runner.cost.read_bytes == pytest.approx(load_stats.bytes + cache_bytes, rel=0.02)
