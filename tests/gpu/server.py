"""Tests a real server on this device: requests, metrics, recovery from a killed rank, and an orderly end."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from rtp_llm.machine.gpus import read_gpus
from tests import random_model
from tests.gpu.plugin import RECORD, Note
from tests.parallel.conftest import pytest_runtest_makereport  # noqa: F401  # shows the log of a part where a test fails
from tests.parallel.parts import Part
from tests.parallel.stream import Stream
from tests.ports import free_start_port

# What a process needs to find its libraries and its GPU. The server gets no other variables of this shell.
PASSED_ON = ("PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "USER", "LANG", RECORD)
PREFIXES = ("CUDA_", "NVIDIA_", "TRITON_", "XDG_")
# Long enough that a GPU is still busy with it when the rank is lost.
GREEDY: dict[str, Any] = {
    "prompt": "A large language model is",
    "max_tokens": 1200,
    "ignore_eos": True,
    "temperature": 0,
}
SHORT = {**GREEDY, "max_tokens": 12}
GIB = 1 << 30
RETURN_SECONDS = 15  # for the driver to take back the memory of processes that were ended


@pytest.fixture(scope="module")
def free_before() -> int:
    """Returns the bytes of GPU memory that are free before the server starts; 0 without a GPU."""
    return free_memory()


@pytest.fixture(scope="module")
def part(device: torch.device, free_before: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Part]:
    """The documented launch, with warm-up and, on a GPU, a measured KV cache."""
    checkpoint = tmp_path_factory.mktemp("random") / "model"
    random_model.write(checkpoint)
    port = free_start_port()
    with Part(settings(device, checkpoint) | {"START_PORT": str(port)}, port=port) as running:
        yield running.wait_healthy()


def settings(device: torch.device, checkpoint: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k in PASSED_ON or k.startswith(PREFIXES)}
    own = {
        "CHECKPOINT_PATH": str(checkpoint),
        "RTP_DEVICE": device.type,
        "RTP_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        # The doctor has a group of its own. Its findings on this machine must not prevent the tests of the server.
        "RTP_DOCTOR": "warn",
    }
    return inherited | own | ({"TEST_BLOCK_NUM": "256"} if device.type == "cpu" else {})


def free_memory() -> int:
    return sum(gpu.memory_free for gpu in read_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES")).visible)


@pytest.fixture(scope="module")
def expected(part: Part) -> str:
    return part.complete(GREEDY)


def test_it_starts_and_answers(part: Part, note: Note) -> None:
    assert part.fetch("/health") == part.fetch("/liveness") == (200, '"ok"')
    first, second = part.complete(SHORT), part.complete(SHORT)
    assert first == second != ""
    note("reason", f"started in {startup(part):.1f} s")


def startup(part: Part) -> float:
    return sum(value for name, _, value in samples(part) if name == "rtp_llm_startup_seconds")


def samples(part: Part) -> list[tuple[str, dict[str, str], float]]:
    status, text = part.fetch("/metrics")
    assert status == 200
    return [
        (sample.name, dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def test_its_metrics_count_what_it_did(part: Part, expected: str) -> None:
    found = {name: value for name, _, value in samples(part)}
    assert found["rtp_llm_ready"] == 1
    assert found["rtp_llm_generation_tokens_total"] >= GREEDY["max_tokens"]
    assert found["rtp_llm_gang_member_up"] == 1
    assert found["rtp_llm_kv_cache_memory_bytes"] > 0
    assert found["rtp_llm_weight_memory_bytes"] > 0


def test_its_metrics_tell_of_the_gpu(part: Part, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("no GPU here")

    def readings() -> dict[str, float]:
        """Of the rank's GPU, once they are younger than its KV cache."""
        told = {name: value for name, labels, value in samples(part) if labels.get("rank", "0") == "0"}
        fresh = told.get("rtp_llm_gpu_memory_used_bytes", 0) >= told["rtp_llm_kv_cache_memory_bytes"]
        return told if fresh else {}

    told = part.until(readings, "readings of the GPU", 15)
    assert told["rtp_llm_gpu_up"] == 1
    assert told["rtp_llm_gpu_memory_total_bytes"] > GIB
    assert told["rtp_llm_gpu_temperature_celsius"] > 0


def test_a_killed_rank_costs_the_client_a_pause(part: Part, expected: str, note: Note) -> None:
    epoch = part.epoch
    stream = Stream(part, GREEDY).wait_flowing()
    killed = time.monotonic()
    part.kill("rank0")
    num_chunks = len(stream.chunks)
    assert stream.text() == expected
    assert num_chunks < len(expected)
    part.wait_healthy(epoch + 1)
    assert "rank0 (killed by a signal)" in part.log
    note("reason", f"the whole text {time.monotonic() - killed:.1f} s after the kill")


def test_sigterm_ends_it_and_leaves_nothing(part: Part, free_before: int, device: torch.device) -> None:
    part.stop(signal.SIGTERM)
    assert part.wait_end(60) == 0, part.log
    assert "Traceback" not in part.log
    part.assert_nothing_left()
    if device.type == "cuda":
        deadline = time.monotonic() + RETURN_SECONDS
        while free_memory() < free_before - GIB // 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert free_memory() >= free_before - GIB // 4, "memory of the GPU did not come back"
