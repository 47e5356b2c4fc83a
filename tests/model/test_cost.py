"""The estimate of a step's cost, against torch's own count of the operations of the same decoder."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rtp_llm.contract.step import Step
from tests.model import drive
from tests.model.conftest import Oracles
from tests.model.drive import SingleRankGroup


def prompt_step(tokens: int, block_size: int) -> Step:
    """One prompt of so many tokens, computed at once; its last row is sampled."""
    place = np.arange(tokens, dtype=np.int32)
    one, tables = np.array([tokens], np.int32), np.arange(-(-tokens // block_size), dtype=np.int32)[None]
    starts = np.array([0, tokens], np.int32)
    return Step(0, 1, 0, np.zeros_like(place), place, place, starts, one, one, tables, place[-1:])


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied", "qwen2-14-heads", "qwen3"])
def test_flops_of_a_prompt(oracles: Oracles, name: str) -> None:
    """The reference attention computes all keys for every query; a causal one, which is what we count, half of that."""
    runner, _ = drive.load(oracles(name).path, {}, SingleRankGroup())
    step, spec = prompt_step(64, runner.block_size), runner.spec
    with FlopCounterMode(display=False) as counter:
        runner.execute(step)
        runner.model.logits(torch.zeros(1, spec.hidden_size))
    counted = counter.get_flop_counts()["Global"]
    dense = sum(flops for operation, flops in counted.items() if "attention" not in str(operation))
    runner.cost.add(step)
    pairs = 64 * 65 // 2
    attention = 4 * spec.num_layers * spec.num_heads * spec.head_dim * pairs
    assert runner.cost.flops - attention == pytest.approx(dense, rel=0.02)


def test_bytes_of_a_step(oracles: Oracles) -> None:
    runner, report = drive.load(oracles("llama").path, {}, SingleRankGroup())
    spec = runner.spec
    runner.cost.add(prompt_step(48, runner.block_size))
    cache = 48 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4
    assert runner.cost.write_bytes == cache
    assert runner.cost.read_bytes == pytest.approx(report.bytes + cache, rel=0.02)
