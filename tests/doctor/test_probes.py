"""The programs of tier 1, run for real against a played torch: right, wrong, failing, hanging."""

from dataclasses import replace
from pathlib import Path

import pytest

from doctor import probes
from tests.doctor.test_gpu_faults import healthy_gpu

TORCH = """
import os, time
class Cuda:
    def synchronize(self, device): pass
    def get_arch_list(self): return ["sm_80", "sm_90"]
cuda = Cuda()
int32 = "int32"
def device(kind, index=0): return (kind, index)
class Tensor:
    def __init__(self, values, device): self.values, self.device = values, device
    def __matmul__(self, other):
        if os.environ.get("PLAY") == "raise": raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if os.environ.get("PLAY") == "hang": time.sleep(600)
        return Tensor([512.0] * 4 if os.environ.get("PLAY") != "wrong" else [511.0, 512.0, 512.0, 512.0], self.device)
    def __ne__(self, other):
        others = other.values if isinstance(other, Tensor) else [other] * len(self.values)
        return Tensor([float(a != b) for a, b in zip(self.values, others)], self.device)
    __hash__ = None
    def __mul__(self, n): return Tensor([v * n for v in self.values], self.device)
    def __add__(self, n): return Tensor([v + n for v in self.values], self.device)
    def sum(self): return Tensor([sum(self.values)], self.device)
    def item(self): return self.values[0]
    def __int__(self): return int(self.values[0])
    def cpu(self): return self
    def copy_(self, other):
        if os.environ.get("PLAY") == "hang" and self.device.endswith("2"): time.sleep(600)
        lost = os.environ.get("PLAY") == "lost" and other.device.endswith("0") and self.device.endswith("1")
        self.values = [0.0] * len(self.values) if lost else list(other.values)
def ones(*shape, device): return Tensor([1.0] * 4, device)
def arange(n, dtype, device): return Tensor([float(i) for i in range(8)], device)
def zeros(n, dtype, device): return Tensor([0.0] * 8, device)
"""


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    (tmp_path / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return monkeypatch


GPUS = [healthy_gpu(0), replace(healthy_gpu(5), index=5)]


@pytest.mark.parametrize(
    ("play", "said"),
    [("", ""), ("wrong", "1 wrong elements in a product"), ("raise", "an illegal memory access was encountered")],
)
def test_computing(played: pytest.MonkeyPatch, play: str, said: str) -> None:
    played.setenv("PLAY", play)
    for text in probes.probe_compute(GPUS).values():
        assert text.endswith(said)
        assert bool(text) == bool(said)


def test_a_gpu_that_hangs_is_killed(played: pytest.MonkeyPatch) -> None:
    played.setenv("PLAY", "hang")
    played.setattr(probes, "TIMEOUT_SECONDS", 1.0)
    assert set(probes.probe_compute(GPUS).values()) == {"no answer within 1 s; the process was killed"}


def test_copies_that_arrive_and_one_that_does_not(played: pytest.MonkeyPatch) -> None:
    assert probes.probe_peer_copies([4, 5, 6]) == []
    played.setenv("PLAY", "lost")
    assert probes.probe_peer_copies([4, 5, 6]) == [
        (4, 5, "8 of 16777216 numbers are wrong")
    ] or probes.probe_peer_copies([4, 5, 6]) == [(4, 5, "8 of 1024 numbers are wrong")]


def test_the_direction_that_hangs_is_named(played: pytest.MonkeyPatch) -> None:
    played.setenv("PLAY", "hang")
    played.setattr(probes, "TIMEOUT_SECONDS", 2.0)
    assert [(one, other) for one, other, _ in probes.probe_peer_copies([0, 1, 2])] == [(0, 2), (1, 2)]


def test_what_torch_was_built_for(played: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert probes.architectures() == ["sm_80", "sm_90"]
    (tmp_path / "torch.py").write_text("raise ImportError")
    assert probes.architectures() is None


@pytest.mark.parametrize(
    ("known", "capability", "serves"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 6), True),  # the same generation, a newer minor one
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["compute_80"], (9, 0), True),  # compiled when it is loaded
        (["sm_90a"], (9, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        (["compute_120"], (9, 0), False),
    ],
)
def test_machine_code_and_what_runs_it(known: list[str], capability: tuple[int, int], serves: bool) -> None:
    assert probes.supports_capability(known, capability) == serves
