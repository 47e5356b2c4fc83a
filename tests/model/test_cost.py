"""The cost estimate of a step, compared with torch's FLOP counter on the same decoder."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rtp_llm.contract.step import Step
from tests.model import drive
from tests.model.conftest import Oracles
from tests.model.drive import SingleRankGroup


def prompt_step(num_tokens: int, block_size: int) -> Step:
    """Returns a step that computes one prompt in one chunk and needs the logits of its last token."""
    positions = np.arange(num_tokens, dtype=np.int32)
    seq_lens = np.array([num_tokens], np.int32)
    return Step(
        epoch=0,
        number=1,
        num_decodes=0,
        token_ids=np.zeros_like(positions),
        positions=positions,
        slot_mapping=positions,
        query_start_loc=np.array([0, num_tokens], np.int32),
        seq_lens=seq_lens,
        prompt_lens=seq_lens,
        block_tables=np.arange(-(-num_tokens // block_size), dtype=np.int32)[None],
        logits_indices=positions[-1:],
    )


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied", "qwen2-14-heads", "qwen3"])
def test_flops_of_a_prompt(oracles: Oracles, name: str) -> None:
    """Compares all FLOPs except those of attention, where the reference backend computes masked keys too."""
    runner, _ = drive.load_runner(oracles(name).path, {}, SingleRankGroup())
    step, spec = prompt_step(64, runner.block_size), runner.spec
    with FlopCounterMode(display=False) as counter:
        runner.execute(step)
        runner.model.logits(torch.zeros(1, spec.hidden_size))
    flop_counts = counter.get_flop_counts()["Global"]
    dense_flops = sum(flops for operation, flops in flop_counts.items() if "attention" not in str(operation))
    runner.cost.add(step)
    num_pairs = 64 * 65 // 2  # of query and key
    attention_flops = 4 * spec.num_layers * spec.num_heads * spec.head_dim * num_pairs
    assert runner.cost.flops - attention_flops == pytest.approx(dense_flops, rel=0.02)


def test_bytes_of_a_step(oracles: Oracles) -> None:
    runner, load_stats = drive.load_runner(oracles("llama").path, {}, SingleRankGroup())
    spec = runner.spec
    runner.cost.add(prompt_step(48, runner.block_size))
    cache_bytes = 48 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4
    assert runner.cost.write_bytes == cache_bytes
    assert runner.cost.read_bytes == pytest.approx(load_stats.bytes + cache_bytes, rel=0.02)
