"""Decode steps that are replayed give the same logits, bit for bit, as steps whose layers are called one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rtp_llm.contract.request import Request
from rtp_llm.native.library import library
from rtp_llm.runner.model_runner import ModelRunner
from rtp_llm.runner.recorded_steps import MAX_TOKENS, RecordedSteps, _Memory
from tests.model import drive
from tests.model.checkpoints import CASES, make_model, save_checkpoint
from tests.model.drive import greedy_request
from tests.model.rank_pool import RankPool
from tests.quick import slow_except

if library() is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

# Biases, q/k norm, a window, norms after the sub-blocks, rotations that depend on the length, 16-bit weights.
NAMES = [case.name for case in CASES]
NUM_REQUESTS = 35
SETTINGS: dict[str, Any] = {"test_block_num": 800, "max_batch_size": NUM_REQUESTS + 1}


def recorded_steps(engine: drive.Engine) -> RecordedSteps:
    assert isinstance(engine.runner, ModelRunner)
    steps = engine.runner.residency._recorded_steps
    assert steps
    return steps


def make_requests() -> list[Request]:
    return [greedy_request([5 + i, 9, *range(3, 3 + 2 * i)], 90 + 2 * i, id=str(i)) for i in range(NUM_REQUESTS)]


def complete(path: Path, *, records: bool) -> tuple[drive.Completions, list[int]]:
    """Returns the completions of requests that end one after the other, and the recorded numbers of tokens."""
    engine = drive.make_single_rank_engine(path, **SETTINGS)
    steps = recorded_steps(engine)
    steps._is_possible = records
    return drive.run(engine, make_requests()), sorted(num_tokens for num_tokens, _ in steps._steps)


@pytest.mark.parametrize("name", slow_except(NAMES, "mistral-window", "qwen3-bias-older"))
def test_replayed_steps_equal_called_ones(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == name)
    save_checkpoint(make_model(case, 0), case, tmp_path)
    called, none = complete(tmp_path, records=False)
    replayed, recorded = complete(tmp_path, records=True)
    assert not none
    # Steps of decodes only, and full ones with chunks of prompts. A prompt ends in every step, so there are few others.
    assert set(range(1, NUM_REQUESTS + 1)) <= set(recorded)
    assert recorded[-1] == drive.DEFAULT_SETTINGS["max_batch_tokens_size"] <= MAX_TOKENS
    for id, completion in called.items():
        assert completion.tokens == replayed[id].tokens
        assert all(map(np.array_equal, completion.logits, replayed[id].logits))


def test_memory_is_used_again_once_no_tensor_refers_to_it() -> None:
    memory = _Memory()
    first = memory.allocate((4, 8), torch.float32)
    address, part = first.data_ptr(), first.view(-1)[3:]
    del first
    second = memory.allocate((32,), torch.float32)
    assert second.data_ptr() != address, "a part of the first tensor exists"
    del part
    assert memory.allocate((2, 32), torch.bfloat16).data_ptr() == address, "as many bytes"
    memory.rewind()
    assert memory.allocate((1,), torch.float32).data_ptr() == address


@pytest.mark.parametrize("collectives", slow_except(["local", "gloo"], "local"))
@pytest.mark.parametrize("rank_pool", [2], indirect=True)
def test_two_ranks_replay_the_kernels_between_their_sums(rank_pool: RankPool, collectives: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen2-14-heads")
    save_checkpoint(make_model(case, 0), case, tmp_path)
    called, _ = complete(tmp_path, records=False)
    report = rank_pool.run(tmp_path, [make_requests()], collectives, **SETTINGS)
    assert [reply["num_recorded"] >= NUM_REQUESTS for reply in report.replies] == [True] * 2
    for id, completion in called.items():
        assert completion.tokens == report.completions[id].tokens
        assert np.allclose(completion.logits, report.completions[id].logits, atol=1e-4)
