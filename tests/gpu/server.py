"""Tests a real server on this device: requests, metrics, recovery from a killed rank, and shutdown."""

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
from tests.gpu.plugin import RECORD_VARIABLE, Note
from tests.parallel.conftest import pytest_runtest_makereport  # noqa: F401  # shows the log of a part if a test fails
from tests.parallel.parts import Part
from tests.parallel.stream import Stream
from tests.ports import free_start_port

# Variables with which a process finds its libraries and its GPU. The server inherits no others.
INHERITED_VARIABLES = ("PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "USER", "LANG", RECORD_VARIABLE)
INHERITED_PREFIXES = ("CUDA_", "NVIDIA_", "TRITON_", "XDG_")
# Long enough that a GPU has not finished it when the rank is killed.
LONG_REQUEST: dict[str, Any] = {
    "prompt": "A large language model is",
    "max_tokens": 1200,
    "ignore_eos": True,
    "temperature": 0,
}
SHORT_REQUEST = {**LONG_REQUEST, "max_tokens": 12}
GIB = 1 << 30
MEMORY_RELEASE_SECONDS = 15  # until the driver has freed the memory of ended processes


@pytest.fixture(scope="module")
def initial_free_bytes() -> int:
    """Returns the bytes of GPU memory that are free before the server starts; 0 without a GPU."""
    return free_gpu_bytes()


@pytest.fixture(scope="module")
def part(device: torch.device, initial_free_bytes: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Part]:
    """Starts a server as documented, with warm-up and, on a GPU, a measured KV cache size."""
    checkpoint = tmp_path_factory.mktemp("random") / "model"
    random_model.write(checkpoint)
    port = free_start_port()
    with Part(server_environment(device, checkpoint) | {"START_PORT": str(port)}, port=port) as running:
        yield running.wait_healthy()


def server_environment(device: torch.device, checkpoint: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k in INHERITED_VARIABLES or k.startswith(INHERITED_PREFIXES)}
    variables = {
        "CHECKPOINT_PATH": str(checkpoint),
        "RTP_DEVICE": device.type,
        "RTP_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        # Findings of the doctor on this machine must not prevent the tests of the server.
        "RTP_DOCTOR": "warn",
    }
    return inherited | variables | ({"TEST_BLOCK_NUM": "256"} if device.type == "cpu" else {})


def free_gpu_bytes() -> int:
    return sum(gpu.memory_free for gpu in read_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES")).visible)


@pytest.fixture(scope="module")
def expected(part: Part) -> str:
    return part.complete(LONG_REQUEST)


def test_server_starts_and_completes_requests(part: Part, note: Note) -> None:
    assert part.fetch("/health") == part.fetch("/liveness") == (200, '"ok"')
    first, second = part.complete(SHORT_REQUEST), part.complete(SHORT_REQUEST)
    assert first == second != ""
    note("reason", f"started in {startup_seconds(part):.1f} s")


def startup_seconds(part: Part) -> float:
    return sum(value for name, _, value in read_metrics(part) if name == "rtp_llm_startup_seconds")


def read_metrics(part: Part) -> list[tuple[str, dict[str, str], float]]:
    status, text = part.fetch("/metrics")
    assert status == 200
    return [
        (sample.name, dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def test_metrics_count_requests(part: Part, expected: str) -> None:
    values = {name: value for name, _, value in read_metrics(part)}
    assert values["rtp_llm_ready"] == 1
    assert values["rtp_llm_generation_tokens_total"] >= LONG_REQUEST["max_tokens"]
    assert values["rtp_llm_gang_member_up"] == 1
    assert values["rtp_llm_kv_cache_memory_bytes"] > 0
    assert values["rtp_llm_weight_memory_bytes"] > 0


def test_metrics_contain_gpu_readings(part: Part, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("no GPU here")

    def gpu_readings() -> dict[str, float]:
        """Returns metrics of rank 0 and its GPU; {} while the GPU's metrics are older than the KV cache."""
        values = {name: value for name, labels, value in read_metrics(part) if labels.get("rank", "0") == "0"}
        is_fresh = values.get("rtp_llm_gpu_memory_used_bytes", 0) >= values["rtp_llm_kv_cache_memory_bytes"]
        return values if is_fresh else {}

    values = part.until(gpu_readings, "readings of the GPU", 15)
    assert values["rtp_llm_gpu_up"] == 1
    assert values["rtp_llm_gpu_memory_total_bytes"] > GIB
    assert values["rtp_llm_gpu_temperature_celsius"] > 0


def test_stream_continues_after_killed_rank(part: Part, expected: str, note: Note) -> None:
    epoch = part.epoch
    stream = Stream(part, LONG_REQUEST).wait_flowing()
    killed = time.monotonic()
    part.kill("rank0")
    num_chunks = len(stream.chunks)
    assert stream.text() == expected
    assert num_chunks < len(expected)
    part.wait_healthy(epoch + 1)
    assert "rank0 (killed by a signal)" in part.log
    note("reason", f"the complete text arrived {time.monotonic() - killed:.1f} s after the kill")


def test_sigterm_stops_server_and_frees_memory(part: Part, initial_free_bytes: int, device: torch.device) -> None:
    part.stop(signal.SIGTERM)
    assert part.wait_end(60) == 0, part.log
    assert "Traceback" not in part.log
    part.assert_nothing_left()
    if device.type == "cuda":
        deadline = time.monotonic() + MEMORY_RELEASE_SECONDS
        while free_gpu_bytes() < initial_free_bytes - GIB // 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert free_gpu_bytes() >= initial_free_bytes - GIB // 4, "GPU memory was not freed"
