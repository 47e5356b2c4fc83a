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

SECONDS = 120
MIB = 1 << 20
# torch does not count the memory that the driver and ECC reserve.
MEMORY_SLACK = 0.03


@cache
def examine(tier: int, device: str) -> tuple[dict[str, Any], int]:
    """Returns the report of the doctor for one rank on this device, and its exit code."""
    command = [sys.executable, "-m", "doctor", "--tier", str(tier), "--output", "json"]
    env = {**os.environ, "RTP_DEVICE": device, "TP_SIZE": "1", "WORLD_SIZE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report, done.returncode


@cache
def gpus() -> GpuInventory:
    return read_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


@pytest.fixture
def only_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("no GPU here")


@pytest.mark.parametrize("tier", [0, 1])
def test_no_check_crashes(tier: int, device: torch.device, note: Note) -> None:
    report, code = examine(tier, device.type)
    assert code == report["exit_code"]
    found = [check for check in report["checks"] if check["status"] not in ("ok", "skip")]
    # An error of this machine is for its owner to read. It is no failure of the doctor.
    note("reason", "; ".join(f"{c['id']} {c['status']}: {c['actual']}" for c in found) or "nothing found")
    assert [check for check in found if check["status"] == "crash"] == []
    assert report["duration_s"] < SECONDS


@pytest.mark.usefixtures("only_cuda")
def test_gpu_checks_were_made(device: torch.device, note: Note) -> None:
    """On a machine with a GPU no check may report that there is none."""
    report, _ = examine(1, device.type)
    mine = {check["id"]: check for check in report["checks"] if check["category"] == "gpu"}
    skipped = {id: check["actual"] for id, check in mine.items() if check["status"] == "skip"}
    note("reason", f"{len(mine)} checks, skipped: {', '.join(skipped) or 'none'}")
    assert [actual for actual in skipped.values() if "the ranks run on CPU" in actual] == []
    assert {"G-04", "G-08"} & skipped.keys() == set()


@pytest.mark.usefixtures("only_cuda")
def test_torch_sees_the_same_gpus(note: Note) -> None:
    seen = gpus().visible
    assert visible_gpus() == len(seen) == torch.cuda.device_count()
    for ordinal, gpu in enumerate(seen):
        properties = torch.cuda.get_device_properties(ordinal)
        assert gpu.name == properties.name
        assert gpu.capability == (properties.major, properties.minor)
        assert abs(gpu.memory_total - properties.total_memory) <= MEMORY_SLACK * gpu.memory_total
    note("reason", ", ".join(f"{gpu.name} {gpu.memory_total // MIB} MiB" for gpu in seen))


@pytest.mark.usefixtures("only_cuda")
def test_it_counts_memory_as_cuda_does() -> None:
    """NVML and CUDA must agree on the memory in use while this process holds some."""
    held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    free, total = torch.cuda.mem_get_info()
    told = read_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES")).visible[0]
    assert abs((told.memory_total - told.memory_free) - (total - free)) <= MEMORY_SLACK * total
    assert told.memory_total - told.memory_free >= held.numel()


@pytest.mark.usefixtures("only_cuda")
def test_the_report_names_gpu_and_driver(device: torch.device) -> None:
    report, _ = examine(0, device.type)
    facts = report["node"]["facts"]
    assert torch.cuda.get_device_name(0) in facts["gpus"]
    assert facts["driver"] == gpus().driver != ""
    assert report["node"]["device"] == "cuda"
