"""The engine measures how long each step takes, also if it is scheduled while the step before is computed."""

from types import SimpleNamespace
from typing import Any

import pytest

from rtp_llm.contract.sampling_metadata import SampledTokens, SamplingMetadata, StepResult
from rtp_llm.contract.step import Step
from rtp_llm.engine.engine import Engine
from tests.unit.scheduling import make_request, make_scheduler


class Runner:
    """Takes two seconds of a clock for each step, and samples token 1."""

    def __init__(self) -> None:
        self.now = 0.0

    def prepare(self, step: Step) -> Any:
        return SimpleNamespace(digest=lambda: 0, num_rows=int((step.num_sampled > 0).sum()))

    def execute(self, inputs: Any, sampling_metadata: SamplingMetadata) -> StepResult:
        self.now += 2
        return StepResult(tokens=[SampledTokens(0, [1]) for _ in range(inputs.num_rows)])


@pytest.mark.parametrize("depth", [0, 1])
def test_each_step_is_recorded_with_its_own_duration(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, scheduler = Runner(), make_scheduler()
    monkeypatch.setattr("rtp_llm.engine.engine.time.perf_counter", lambda: runner.now)
    recorded: list[tuple[int, float]] = []
    monkeypatch.setattr(scheduler, "record_seconds", lambda output, s: recorded.append((output.num_tokens, s)))
    engine = Engine(scheduler, runner, max_seq_len=100, epoch=1, pipeline_depth=depth)
    engine.add(make_request("a", 5, 4))
    while engine.has_work:
        engine.step()
    runner.now += 100  # idle
    engine.add(make_request("b", 3, 2))
    while engine.has_work:
        engine.step()
    engine.close()
    assert recorded == [(5, 2), (1, 2), (1, 2), (1, 2), (3, 2), (1, 2)]
