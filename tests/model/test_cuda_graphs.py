"""Replayed steps of decodes give the same tokens and logits as those whose layers Python calls.

`EmulatedGraph` takes the place of a CUDA graph, Triton's interpreter that of a GPU; tests/gpu uses the real ones.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels of GPUs need Triton: make test-all installs it")

from rtp_llm.contract.kv_cache import KVCacheGroup, KVCacheSpec
from rtp_llm.contract.request import Request
from rtp_llm.errors import CommunicationError
from rtp_llm.kernels import triton_ops
from rtp_llm.kernels.attention_backend import AttentionBackend
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.reference import ReferenceBackend
from rtp_llm.kernels.triton_attention import TritonBackend
from rtp_llm.native.library import select_kernels
from rtp_llm.runner import cuda_graphs
from rtp_llm.runner.cuda_graphs import MAX_FAILURES, CudaGraphs, copy_decodes, make_inputs
from rtp_llm.runner.model_runner import ModelRunner
from tests.model import drive
from tests.model.checkpoints import CASES, make_model, save_checkpoint
from tests.model.drive import CPU, MAX_SEQ_LEN, greedy_request
from tests.model.emulated_graph import EmulatedGraph

MAX_SEQUENCES = 4
TOLERANCE = 1e-4


class FailingGraph(EmulatedGraph):
    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        super().capture(function)
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture(autouse=True)
def _torch_for_other_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU; `EmulatedGraph` does not see the native kernels. Contexts of the tests need several graphs."""
    monkeypatch.setattr("rtp_llm.kernels.ops._triton_for", lambda x: triton_ops)
    monkeypatch.setattr(cuda_graphs, "MIN_CONTEXT", 4)
    select_kernels("off")
    yield
    select_kernels("auto")


def make_requests() -> list[Request]:
    """Returns requests of which one ends after the other, so that all numbers of decodes occur."""
    return [greedy_request([5 + i, 9, *range(3, 3 + 2 * i)], 3 + 3 * i, id=str(i)) for i in range(MAX_SEQUENCES)]


def run(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: AttentionBackend,
    make_graph: type[EmulatedGraph] = EmulatedGraph,
) -> tuple[drive.Completions, CudaGraphs]:
    """Returns the completions of all requests, and the graphs that were captured."""
    monkeypatch.setattr("rtp_llm.runner.residency.select_backend", lambda *_: backend)
    engine = drive.make_single_rank_engine(path, max_batch_size=MAX_SEQUENCES)
    assert isinstance(engine.runner, ModelRunner)
    residency = engine.runner.residency
    graphs = CudaGraphs(
        residency._compute, residency.layout.groups, MAX_SEQUENCES, MAX_SEQ_LEN, CPU, lambda x: x, make_graph
    )
    residency._cuda_graphs = graphs
    return drive.run(engine, make_requests()), graphs


def assert_same(actual: drive.Completions, expected: drive.Completions) -> None:
    for id, completion in expected.items():
        assert actual[id].tokens == completion.tokens
        assert np.allclose(actual[id].logits, completion.logits, atol=TOLERANCE)


def make_decodes(lengths: list[int]) -> ForwardBatch:
    """Returns decodes of sequences with these numbers of tokens, each with blocks of its own."""
    num_decodes = len(lengths)
    return ForwardBatch.build(
        token_ids=np.arange(50, 50 + num_decodes),
        query_start_loc=np.arange(num_decodes + 1),
        seq_lens=np.array(lengths),
        prompt_lens=np.full(num_decodes, 9),
        block_tables=[1 + np.arange(num_decodes * width).reshape(num_decodes, -1) for width in (3, 2)],
        block_sizes=[4, 8],
        device=CPU,
    )


def test_rows_without_a_decode_are_padding() -> None:
    """Also those that had one in the last step: its blocks may belong to another sequence now."""
    spec = KVCacheSpec((("keys", (1, 8)), ("values", (1, 8))), "fp32")
    inputs = make_inputs([KVCacheGroup(spec, (0,), 4), KVCacheGroup(spec, (1,), 8)], 4, 12, CPU)
    copy_decodes(make_decodes([3, 12, 7, 5]), inputs)
    batch = make_decodes([11, 2])
    copy_decodes(batch, inputs)
    assert inputs.token_ids.tolist() == [50, 51, 0, 0]
    assert inputs.positions.tolist() == [10, 1, 0, 0]
    assert inputs.rope_lens.tolist() == [11, 9, 1, 1]
    assert inputs.seq_lens.tolist() == [11, 2, 1, 1]
    assert inputs.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert [slots.tolist() for slots in inputs.slot_mapping] == [
        [3 * 4 + 2, 4 * 4 + 1, 0, 0],
        [2 * 8 + 2, 3 * 8 + 1, 0, 0],
    ]
    for table, expected in zip(inputs.block_tables, batch.block_tables, strict=True):
        assert torch.equal(table[:2], expected)


@pytest.fixture(scope="module", params=["rope-dynamic", "qwen2-window", "qwen3-bias-older"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    case = next(case for case in CASES if case.name == request.param)
    save_checkpoint(make_model(case, 0), case, path)
    return path


def test_replayed_steps_equal_computed_ones(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drive.run(drive.make_single_rank_engine(checkpoint), make_requests())
    replayed, graphs = run(checkpoint, monkeypatch, TritonBackend())
    assert sorted(graphs._steps) == [(1, 64), (2, 16), (4, 16)]
    assert_same(replayed, expected)


@pytest.mark.parametrize("checkpoint", ["qwen2-window"], indirect=True)
class TestOneCheckpoint:
    def test_a_backend_that_plans_on_the_host_cannot_be_captured(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(AssertionError, match="a CUDA graph cannot contain a copy from the host"):
            run(checkpoint, monkeypatch, ReferenceBackend(CPU))

    def test_steps_are_computed_if_captures_fail(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = drive.run(drive.make_single_rank_engine(checkpoint), make_requests())
        computed, graphs = run(checkpoint, monkeypatch, TritonBackend(), FailingGraph)
        assert graphs._steps == {}
        assert [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()] == [
            "decodes are computed without CUDA graphs, and so more slowly:"
            " operation not permitted when stream is capturing; ENABLE_CUDA_GRAPH=0 tries none"
        ] * MAX_FAILURES
        assert_same(computed, expected)


class CountingGraph(EmulatedGraph):
    """Records whether it holds work, as a CUDA graph holds collectives of a communicator."""

    held: ClassVar[set["CountingGraph"]] = set()

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        self.held.add(self)
        return function()

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        self.held.discard(self)


def make_graphs(
    forward: Callable[[ForwardBatch], Tensor], agree: Callable[[int], int], max_sequences: int = 6
) -> CudaGraphs:
    spec = KVCacheSpec((("keys", (1, 8)), ("values", (1, 8))), "fp32")
    groups = [KVCacheGroup(spec, (0,), 4), KVCacheGroup(spec, (1,), 8)]
    CountingGraph.held.clear()
    return CudaGraphs(forward, groups, max_sequences, 64, CPU, agree, CountingGraph)


def compute(batch: ForwardBatch) -> Tensor:
    return batch.token_ids[:, None].float()


def test_all_numbers_of_decodes_are_captured_before_serving() -> None:
    graphs = make_graphs(compute, lambda x: x)
    graphs.begin_epoch(captures=True)
    assert list(graphs._steps) == [(6, 4), (4, 4), (2, 4), (1, 4)], "the largest needs the most memory"
    assert len(CountingGraph.held) == 4
    graphs.clear()
    assert not CountingGraph.held
    assert not graphs._steps


def test_no_rank_captures_what_another_one_cannot() -> None:
    graphs = make_graphs(compute, lambda x: 0)
    for failure in range(MAX_FAILURES):
        assert graphs.covers(make_decodes([12]))
        assert graphs.run(make_decodes([9 + failure])).tolist() == [[50]]
        assert not graphs._steps
        assert not CountingGraph.held
    assert not graphs.covers(make_decodes([12]))


def test_captured_steps_are_replayed_after_other_captures_have_failed() -> None:
    graphs = make_graphs(compute, lambda x: x)
    graphs.run(make_decodes([12]))
    graphs._num_failures = MAX_FAILURES
    assert graphs.covers(make_decodes([12]))
    assert not graphs.covers(make_decodes([12, 9]))


def test_decodes_are_captured_only_if_all_ranks_want_it() -> None:
    """All capture together, but a rank that takes the place of a lost one has never served."""
    graphs = make_graphs(compute, lambda x: min(x, 0))
    graphs.begin_epoch(captures=True)
    assert not graphs._steps
    assert graphs.covers(make_decodes([12]))


def test_ranks_continue_with_the_most_failures_of_any() -> None:
    """A rank that has replaced a lost one has had none."""
    graphs = make_graphs(compute, lambda x: min(x, -MAX_FAILURES))
    graphs.begin_epoch(captures=False)
    assert not graphs.covers(make_decodes([12]))


@pytest.mark.parametrize("when", ["capture", "agreement"])
def test_no_graph_outlives_an_epoch_that_ends_during_its_capture(when: str) -> None:
    """The traceback of the error would keep the graph, and closing the communicator would wait for it."""
    calls = []

    def fail(step: str) -> None:
        calls.append(step)
        if calls.count("forward") == 2 and step == ("forward" if when == "capture" else "agree"):
            raise CommunicationError("aborted: a test aborts")

    def forward(batch: ForwardBatch) -> Tensor:
        fail("forward")
        return compute(batch)

    def agree(value: int) -> int:
        fail("agree")
        return value

    graphs = make_graphs(forward, agree)
    for failure in range(MAX_FAILURES):
        assert graphs.covers(make_decodes([12])), failure
        calls.clear()
        with pytest.raises(CommunicationError, match="a test aborts"):
            graphs.run(make_decodes([12]))
        assert not CountingGraph.held
        assert not graphs._steps
    assert not graphs.covers(make_decodes([12])), "otherwise one epoch after the other would fail"
