"""One machine with two ranks: the documented launch and faults. The tests share one server and run in order."""

import signal
from collections.abc import Iterator

import pytest

from tests.parallel.conftest import BODIES
from tests.parallel.parts import Part
from tests.parallel.stream import Stream
from tests.ports import free_start_port
from tests.quick import slow_except


@pytest.fixture(scope="module")
def part(settings: dict[str, str]) -> Iterator[Part]:
    """A running part, started as documented: TP_SIZE=2 WORLD_SIZE=2 MODEL_TYPE=… CHECKPOINT_PATH=… TOKENIZER_PATH=…
    python3 -m rtp_llm.start_server"""
    port = free_start_port(2)
    env = {"TP_SIZE": "2", "WORLD_SIZE": "2", **settings, "START_PORT": str(port)}
    with Part(env, port=port, ranks=2) as running:
        yield running.wait_healthy()


@pytest.mark.parametrize("name", ["greedy", "seeded"])
def test_two_ranks_have_the_outputs_of_one(part: Part, expected: dict[str, str], name: str) -> None:
    assert part.complete(BODIES[name]) == expected[name]


def test_health_and_metrics_report_all_ranks(part: Part) -> None:
    assert part.fetch("/health") == part.fetch("/liveness") == (200, '"ok"')
    status, text = part.fetch("/metrics")
    assert status == 200
    assert 'rtp_llm_gang_member_up{world_rank="1"} 1.0' in text


@pytest.mark.parametrize(("rank", "name"), slow_except([("rank1", "greedy"), ("rank0", "seeded")], ("rank0", "seeded")))
def test_killed_rank_only_delays_the_stream(part: Part, expected: dict[str, str], rank: str, name: str) -> None:
    epoch = part.epoch
    stream = Stream(part, BODIES[name]).wait_flowing()
    part.kill(rank)
    assert stream.text() == expected[name]
    part.wait_healthy(epoch + 1)
    assert f"{rank} (killed by a signal)" in part.log
    assert part.complete(BODIES[name]) == expected[name]


def test_killed_api_is_restarted(part: Part, expected: dict[str, str]) -> None:
    epoch, pid = part.epoch, part.pid("api")
    part.kill("api")
    part.until(lambda: part.pid("api") != pid, "a new API process")
    part.wait_healthy()
    assert part.epoch == epoch, "the ranks were restarted"
    assert part.complete(BODIES["greedy"]) == expected["greedy"]


@pytest.mark.slow
def test_killed_guard_is_restarted(part: Part) -> None:
    pid = part.pid("guard")
    part.kill("guard")
    part.until(lambda: part.pid("guard") != pid, "a new guard")
    part.wait_healthy()  # 503 while the guard's last status is older than 2 s: a busy machine may start it that late


def test_stop_completes_open_streams_first(part: Part, expected: dict[str, str]) -> None:
    stream = Stream(part, BODIES["greedy"]).wait_flowing()
    part.stop(signal.SIGTERM)
    assert stream.text() == expected["greedy"]
    assert part.wait_end(30) == 0, part.log
    assert "Traceback" not in part.log


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["INT8", "W8A8", "INT4"])
def test_a_server_with_quantized_weights_answers(settings: dict[str, str], quantization: str) -> None:
    port = free_start_port()
    with Part({**settings, "QUANTIZATION": quantization, "START_PORT": str(port)}, port=port) as part:
        part.wait_healthy()
        assert part.complete(BODIES["greedy"]) == part.complete(BODIES["greedy"]) != ""
