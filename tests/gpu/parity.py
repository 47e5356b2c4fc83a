"""Compares every checkpoint of `tests.model.checkpoints` with transformers, both on the same device.

The oracle is transformers in fp32. In fp32 the greedy tokens must equal the oracle's, and the logits be within a
tolerance. In bf16 no implementation is exact, so the bf16 run of transformers gives the scale: our run and that one are
forced along the oracle's tokens, and their logits are compared with the oracle's. Our error may be `MAX_ERROR_RATIO`
times that of transformers, and a token may differ only if the oracle's margin (best minus second-best logit) is smaller
than such errors.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gpu.plugin import Note
from tests.model import drive
from tests.model.checkpoints import CASES, CheckpointCase, make_model
from tests.model.conftest import _one_thread  # noqa: F401  # applies to these tests, too
from tests.model.oracle import NEW_TOKENS, TOLERANCE, Floats, Oracle, generate_answer, make_oracle

# Implementations that round in different places have errors of about the same size: ratios from 0.87 to 1.01 on CPU.
# Rope angles rounded to bf16 give ratios up to 2.2 there, norms computed in bf16 up to 1.23. This bound always detects
# the former, the latter only sometimes.
MAX_ERROR_RATIO = 1.2
# For fp32 on a GPU, whose kernels sum in another order. On CPU the usual difference is 3e-5 and the largest 7e-5.
# TF32 must be off: it keeps 10 of the 23 bits. The tokens must be equal anyway.
GPU_TOLERANCE = 3e-4

_oracles: dict[str, Oracle] = {}


@pytest.fixture
def oracle(case: CheckpointCase, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Returns the oracle (expected tokens and logits) of the checkpoint, computed once for both dtypes. Caches only the
    last one."""
    if case.name not in _oracles:
        _oracles.clear()
        _oracles[case.name] = make_oracle(case, tmp_path_factory.mktemp("checkpoint") / case.name, device)
    return _oracles[case.name]


@pytest.mark.parametrize("case", CASES, ids=str)
class TestParity:
    """Tests both dtypes of a checkpoint in succession: `oracle` caches only one checkpoint."""

    def test_fp32(self, case: CheckpointCase, oracle: Oracle, device: torch.device, note: Note) -> None:
        completions = run_engine(oracle, device, "fp32")
        for index, expected in enumerate(oracle.answers):
            expected.check(completions[str(index)].tokens, completions[str(index)].logits, tolerance(device))
        worst = max(np.abs(np.stack(completions[str(i)].logits) - a.logits).max() for i, a in enumerate(oracle.answers))
        note("reason", f"logits within {worst:.1e}")

    def test_bf16(self, case: CheckpointCase, oracle: Oracle, device: torch.device, note: Note) -> None:
        completions = run_engine(oracle, device, "bf16", {str(i): a.tokens for i, a in enumerate(oracle.answers)})
        oracle_logits = np.concatenate([a.logits for a in oracle.answers])
        ours = np.concatenate([completions[str(i)].logits for i in range(len(oracle.answers))])
        theirs = transformers_logits_bf16(case, oracle, device)
        our_error, their_error = root_mean_square(ours - oracle_logits), root_mean_square(theirs - oracle_logits)
        ratio = our_error / their_error
        note("reason", f"error {our_error:.3f}, of transformers {their_error:.3f}, ratio {ratio:.2f}")
        assert ratio <= MAX_ERROR_RATIO
        assert_clear_tokens_equal(ours, oracle_logits, float(np.abs(theirs - oracle_logits).max()))


def run_engine(
    oracle: Oracle, device: torch.device, dtype: str, forced: drive.ForcedTokens | None = None
) -> drive.Completions:
    return drive.run(
        drive.make_single_rank_engine(oracle.path, device, act_type=dtype), oracle.greedy_requests(), forced
    )


def transformers_logits_bf16(case: CheckpointCase, oracle: Oracle, device: torch.device) -> Floats:
    model = torch.nn.Module.to(make_model(case, oracle.seed), device, torch.bfloat16)
    return np.concatenate([generate_answer(model, a.prompt, a.tokens).logits for a in oracle.answers])


def tolerance(device: torch.device) -> float:
    return TOLERANCE if device.type == "cpu" else GPU_TOLERANCE


def root_mean_square(errors: Floats) -> float:
    return float(np.sqrt(np.square(errors, dtype=np.float64).mean()))


def assert_clear_tokens_equal(ours: Floats, oracle_logits: Floats, max_error: float) -> None:
    """Asserts equal greedy tokens wherever the oracle's margin (best minus second-best logit) exceeds twice the largest
    allowed error of a logit."""
    second, best = np.sort(oracle_logits, axis=-1)[:, -2:].T
    is_clear = best - second > 2 * MAX_ERROR_RATIO * max_error
    np.testing.assert_array_equal(ours.argmax(-1)[is_clear], oracle_logits.argmax(-1)[is_clear])


def test_unwritten_kv_slots_do_not_change_output(device: torch.device, tmp_path: Path) -> None:
    """A NaN in an unwritten slot must not reach the output (0 * NaN is NaN)."""
    oracle = make_oracle(next(case for case in CASES if case.name == "llama"), tmp_path / "llama", device)
    engine = drive.make_single_rank_engine(oracle.path, device)
    for cache in engine.runner.kv_caches:  # type: ignore[attr-defined]  # a real runner, not the protocol
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
    requests = [drive.greedy_request(a.prompt, NEW_TOKENS, id=str(i)) for i, a in enumerate(oracle.answers)]
    completions = drive.run(engine, requests)
    for index, expected in enumerate(oracle.answers):
        expected.check(completions[str(index)].tokens, completions[str(index)].logits, tolerance(device))
