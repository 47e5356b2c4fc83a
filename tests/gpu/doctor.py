"""Tests the doctor on this machine: no check crashes, and its facts about the GPUs equal those of torch."""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch

from rtp_llm.machine.devices import visible_gpus
from rtp_llm.machine.gpus import GpuInventory, read_gpus
from tests.gpu.plugin import Note
from tests.parallel.parts import REPOSITORY

TIMEOUT_SECONDS = 120
MIB = 1 << 20
# torch does not count the memory that the driver and ECC reserve.
MEMORY_TOLERANCE = 0.03


@cache
def run_doctor(tier: int, device: str) -> tuple[dict[str, Any], int]:
    """Returns the JSON report of the doctor for one rank on this device, and its exit code."""
    command = [sys.executable, "-m", "doctor", "--tier", str(tier), "--output", "json"]
    env = {**os.environ, "RTP_DEVICE": device, "TP_SIZE": "1", "WORLD_SIZE": "1"}
    completed = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert completed.stdout, completed.stderr
    report: dict[str, Any] = json.loads(completed.stdout)
    return report, completed.returncode


@cache
def read_visible_gpus() -> GpuInventory:
    return read_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


@pytest.fixture
def require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("no GPU here")


@pytest.mark.parametrize("tier", [0, 1])
def test_no_check_crashes(tier: int, device: torch.device, note: Note) -> None:
    report, code = run_doctor(tier, device.type)
    assert code == report["exit_code"]
    problems = [check for check in report["checks"] if check["status"] not in ("ok", "skip")]
    # A problem of this machine is not a failure of the doctor.
    note("reason", "; ".join(f"{c['id']} {c['status']}: {c['actual']}" for c in problems) or "no problem")
    assert [check for check in problems if check["status"] == "crash"] == []
    assert report["duration_s"] < TIMEOUT_SECONDS


@pytest.mark.usefixtures("require_cuda")
def test_gpu_checks_run(device: torch.device, note: Note) -> None:
    """On a machine with a GPU no check may be skipped because of a missing GPU."""
    report, _ = run_doctor(1, device.type)
    gpu_checks = {check["id"]: check for check in report["checks"] if check["category"] == "gpu"}
    skipped = {id: check["actual"] for id, check in gpu_checks.items() if check["status"] == "skip"}
    note("reason", f"{len(gpu_checks)} checks, skipped: {', '.join(skipped) or 'none'}")
    assert [actual for actual in skipped.values() if "the ranks run on CPU" in actual] == []
    assert {"G-04", "G-08"} & skipped.keys() == set()


@pytest.mark.usefixtures("require_cuda")
def test_gpus_equal_those_of_torch(note: Note) -> None:
    visible = read_visible_gpus().visible
    assert visible_gpus() == len(visible) == torch.cuda.device_count()
    for ordinal, gpu in enumerate(visible):
        properties = torch.cuda.get_device_properties(ordinal)
        assert gpu.name == properties.name
        assert gpu.capability == (properties.major, properties.minor)
        assert abs(gpu.memory_total - properties.total_memory) <= MEMORY_TOLERANCE * gpu.memory_total
    note("reason", ", ".join(f"{gpu.name} {gpu.memory_total // MIB} MiB" for gpu in visible))


@pytest.mark.usefixtures("require_cuda")
def test_used_memory_equals_that_of_cuda() -> None:
    """NVML and CUDA must report the same used memory after an allocation of 1 GiB."""
    allocated = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    free, total = torch.cuda.mem_get_info()
    gpu = read_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES")).visible[0]
    assert abs((gpu.memory_total - gpu.memory_free) - (total - free)) <= MEMORY_TOLERANCE * total
    assert gpu.memory_total - gpu.memory_free >= allocated.numel()


@pytest.mark.usefixtures("require_cuda")
def test_report_contains_gpu_and_driver(device: torch.device) -> None:
    report, _ = run_doctor(0, device.type)
    facts = report["node"]["facts"]
    assert torch.cuda.get_device_name(0) in facts["gpus"]
    assert facts["driver"] == read_visible_gpus().driver != ""
    assert report["node"]["device"] == "cuda"
