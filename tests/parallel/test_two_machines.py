"""Two machines with one rank each, here two parts on one address with two ports as in the documentation's example: the
documented launch and faults. The tests share one gang and run in order.
"""

import json
import os
import signal
from collections.abc import Iterator

import pytest

from tests.parallel.conftest import BODIES
from tests.parallel.parts import Gang, Part
from tests.parallel.stream import Stream
from tests.ports import free_start_port


@pytest.fixture(scope="module")
def gang(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    """Two running parts, started as documented: START_PORT=10000 DISTRIBUTE_CONFIG_FILE=… WORLD_RANK=0 TP_SIZE=2
    WORLD_SIZE=2 LOCAL_WORLD_SIZE=1 … python3 -m rtp_llm.start_server, and the same with START_PORT=20000 WORLD_RANK=1
    """
    ports = [free_start_port(), free_start_port()]
    file = tmp_path_factory.mktemp("gang") / "gang.json"
    members = {f"x_part{n}": {"name": f"x_part{n}", "ip": "127.0.0.1", "port": port} for n, port in enumerate(ports)}
    file.write_text(json.dumps(members))
    common = {"DISTRIBUTE_CONFIG_FILE": str(file), "TP_SIZE": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    common["HEARTBEAT_TIMEOUT"] = "5"  # a test waits until a frozen rank is killed
    parts = [
        Part({**common, **settings, "START_PORT": str(port), "WORLD_RANK": str(rank)}, port=port)
        for rank, port in enumerate(ports)
    ]
    with Gang(*parts) as running:
        yield running.wait_healthy()


def test_two_parts_have_the_outputs_of_one_rank(gang: Gang, expected: dict[str, str]) -> None:
    for name in ("greedy", "seeded"):
        assert gang.leader.complete(BODIES[name]) == expected[name]


@pytest.mark.parametrize("index", [0, 1])
def test_each_part_reports_health_and_metrics(gang: Gang, index: int) -> None:
    part = gang.parts[index]
    assert part.fetch("/health") == part.fetch("/liveness") == (200, '"ok"')
    status, text = part.fetch("/metrics")
    assert status == 200
    assert 'rtp_llm_gang_member_up{world_rank="1"} 1.0' in text


def test_only_part_0_serves_the_model(gang: Gang) -> None:
    status, _ = gang.parts[1].fetch("/v1/completions", BODIES["greedy"])
    assert status == 404


@pytest.mark.slow
def test_killed_rank_of_part_1_only_delays_the_stream(gang: Gang, expected: dict[str, str]) -> None:
    epoch = gang.leader.epoch
    stream = Stream(gang.leader, BODIES["seeded"]).wait_flowing()
    gang.parts[1].kill("rank1")
    assert stream.text() == expected["seeded"]
    gang.wait_healthy(epoch + 1)
    assert gang.leader.complete(BODIES["greedy"]) == expected["greedy"]


@pytest.mark.slow
def test_guard_kills_a_frozen_rank_without_local_peers(gang: Gang, expected: dict[str, str]) -> None:
    epoch = gang.leader.epoch
    stream = Stream(gang.leader, BODIES["greedy"]).wait_flowing()
    pid = gang.parts[1].pid("rank1")
    os.kill(pid, signal.SIGSTOP)
    assert stream.text() == expected["greedy"]
    gang.wait_healthy(epoch + 1)
    assert "lost rank 1 (127.0.0.1:" in gang.leader.log
    assert f"worker with pid {pid}: no heartbeat for" in gang.parts[1].log
    assert "exit code" not in gang.leader.log, "no process of part 0 has exited"


@pytest.mark.slow
def test_stopping_both_parts_completes_the_open_stream(gang: Gang, expected: dict[str, str]) -> None:
    """The ranks of part 1 keep running until part 0 has finished its open streams."""
    stream = Stream(gang.leader, {**BODIES["greedy"], "max_tokens": 600}).wait_flowing()
    for part in gang.parts:
        part.stop()
    assert stream.wait().finish == "length"
    assert stream.done
    assert stream.text().startswith(expected["greedy"])
    assert [part.wait_end(40) for part in gang.parts] == [0, 0]
    assert not any("Traceback" in part.log for part in gang.parts)
