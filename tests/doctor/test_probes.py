"""The short torch programs of `rtp-llm-doctor --tier 1`, run against a fake torch that succeeds, computes wrong
results, fails or hangs."""

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
        if os.environ.get("FAKE") == "raise": raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if os.environ.get("FAKE") == "hang": time.sleep(600)
        return Tensor([512.0] * 4 if os.environ.get("FAKE") != "wrong" else [511.0, 512.0, 512.0, 512.0], self.device)
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
        if os.environ.get("FAKE") == "hang" and self.device.endswith("2"): time.sleep(600)
        lost = os.environ.get("FAKE") == "lost" and other.device.endswith("0") and self.device.endswith("1")
        self.values = [0.0] * len(self.values) if lost else list(other.values)
def ones(*shape, device): return Tensor([1.0] * 4, device)
def arange(n, dtype, device): return Tensor([float(i) for i in range(8)], device)
def zeros(n, dtype, device): return Tensor([0.0] * 8, device)
"""


@pytest.fixture
def fake_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    (tmp_path / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return monkeypatch


GPUS = [healthy_gpu(0), replace(healthy_gpu(5), index=5)]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [("", ""), ("wrong", "1 wrong elements in a product"), ("raise", "an illegal memory access was encountered")],
)
def test_probe_compute_reports_failures(fake_torch: pytest.MonkeyPatch, behaviour: str, message: str) -> None:
    fake_torch.setenv("FAKE", behaviour)
    for text in probes.probe_compute(GPUS).values():
        assert text.endswith(message)
        assert bool(text) == bool(message)


def test_probe_of_a_hung_gpu_is_killed(fake_torch: pytest.MonkeyPatch) -> None:
    fake_torch.setenv("FAKE", "hang")
    fake_torch.setattr(probes, "TIMEOUT_SECONDS", 1.0)
    assert set(probes.probe_compute(GPUS).values()) == {"did not finish within 1 s and was killed"}


def test_lost_peer_copy_is_reported(fake_torch: pytest.MonkeyPatch) -> None:
    assert probes.probe_peer_copies([4, 5, 6]) == []
    fake_torch.setenv("FAKE", "lost")
    assert probes.probe_peer_copies([4, 5, 6]) == [
        (4, 5, "8 of 16777216 numbers are wrong")
    ] or probes.probe_peer_copies([4, 5, 6]) == [(4, 5, "8 of 1024 numbers are wrong")]


def test_hung_direction_is_reported(fake_torch: pytest.MonkeyPatch) -> None:
    fake_torch.setenv("FAKE", "hang")
    fake_torch.setattr(probes, "TIMEOUT_SECONDS", 2.0)
    assert [(source, target) for source, target, _ in probes.probe_peer_copies([0, 1, 2])] == [(0, 2), (1, 2)]


def test_architectures_are_read_from_torch(fake_torch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert probes.architectures() == ["sm_80", "sm_90"]
    (tmp_path / "torch.py").write_text("raise ImportError")
    assert probes.architectures() is None


@pytest.mark.parametrize(
    ("compiled", "capability", "supported"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 6), True),  # same major version, newer minor version
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["compute_80"], (9, 0), True),  # PTX is compiled at load time
        (["sm_90a"], (9, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        (["compute_120"], (9, 0), False),
    ],
)
def test_supports_capability(compiled: list[str], capability: tuple[int, int], supported: bool) -> None:
    assert probes.supports_capability(compiled, capability) == supported
