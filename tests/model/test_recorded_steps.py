"""Decode steps that are replayed give the same logits, bit for bit, as steps whose layers are called one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rtp_llm.contract.request import Request
from rtp_llm.native.library import library
from rtp_llm.runner.model_runner import ModelRunner
from rtp_llm.runner.recorded_steps import MAX_SEQUENCES, RecordedSteps
from tests.model import drive
from tests.model.checkpoints import CASES, make_model, save_checkpoint
from tests.model.drive import greedy_request
from tests.model.rank_pool import RankPool

if library() is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

# Biases, q/k norm, a window, norms after the sub-blocks, rotations that depend on the length, 16-bit weights.
NAMES = [case.name for case in CASES]
NUM_REQUESTS = MAX_SEQUENCES + 3  # so that there are three steps of each number of sequences


def recorded_steps(engine: drive.Engine) -> RecordedSteps:
    assert isinstance(engine.runner, ModelRunner)
    steps = engine.runner.residency._recorded_steps
    assert steps
    return steps


def make_requests() -> list[Request]:
    return [greedy_request([5 + i, 9, *range(3, 3 + 2 * i)], 90 + 2 * i, id=str(i)) for i in range(NUM_REQUESTS)]


def complete(path: Path, *, records: bool) -> tuple[drive.Completions, int]:
    """Returns the completions of requests that end one after the other, and how many steps were recorded."""
    engine = drive.make_single_rank_engine(path, test_block_num=800, max_batch_size=NUM_REQUESTS + 1)
    steps = recorded_steps(engine)
    steps._is_possible = records
    return drive.run(engine, make_requests()), len(steps._steps)


@pytest.mark.parametrize("name", NAMES)
def test_replayed_steps_equal_called_ones(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == name)
    save_checkpoint(make_model(case, 0), case, tmp_path)
    called, num_called = complete(tmp_path, records=False)
    replayed, num_recorded = complete(tmp_path, records=True)
    assert num_called == 0
    assert num_recorded == MAX_SEQUENCES
    for id, completion in called.items():
        assert completion.tokens == replayed[id].tokens
        assert all(map(np.array_equal, completion.logits, replayed[id].logits))


@pytest.mark.parametrize("collectives", ["local", "gloo"])
@pytest.mark.parametrize("rank_pool", [2], indirect=True)
def test_two_ranks_replay_the_kernels_between_their_sums(rank_pool: RankPool, collectives: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen2-14-heads")
    save_checkpoint(make_model(case, 0), case, tmp_path)
    called, _ = complete(tmp_path, records=False)
    settings = {"test_block_num": 800, "max_batch_size": NUM_REQUESTS + 1}
    report = rank_pool.run(tmp_path, [make_requests()], collectives, **settings)
    assert [reply["num_recorded"] for reply in report.replies] == [MAX_SEQUENCES] * 2
    for id, completion in called.items():
        assert completion.tokens == report.completions[id].tokens
        assert np.allclose(completion.logits, report.completions[id].logits, atol=1e-4)
