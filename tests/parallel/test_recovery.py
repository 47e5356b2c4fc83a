"""Faults of a server with two ranks under a stream: it pauses, ends with the undisturbed text, and survivors keep their
weights. The tests of a server run in order.
"""

import os
import re
import signal
from collections.abc import Iterator, Mapping

import pytest

from tests.parallel.conftest import GREEDY, SHORT
from tests.parallel.parts import Part
from tests.parallel.stream import Stream
from tests.ports import free_start_port

pytestmark = pytest.mark.slow

LONG = {**GREEDY, "max_tokens": 500}


def start(settings: Mapping[str, str], **env: str) -> Part:
    port = free_start_port(2)
    sizes = {"TP_SIZE": "2", "WORLD_SIZE": "2", "START_PORT": str(port)}
    return Part({**settings, **sizes, **env}, port=port, ranks=2)


@pytest.fixture(scope="module")
def part(settings: dict[str, str]) -> Iterator[Part]:
    with start(settings, HEARTBEAT_TIMEOUT="5") as running:
        yield running.wait_healthy()


@pytest.fixture(scope="module")
def undisturbed(part: Part) -> str:
    return part.complete(LONG)


def num_loads(log: str, rank: int) -> int:
    """Returns how often a process of this rank has read weights."""
    return len(re.findall(rf"\[part0 rank{rank}\].* read [\d.]+ MB of weights", log))


def rank_pids(part: Part) -> list[int]:
    return [part.pid("rank0"), part.pid("rank1")]


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (1, signal.SIGKILL),
        (0, signal.SIGKILL),
        (1, signal.SIGSEGV),
        (0, signal.SIGABRT),
        (1, signal.SIGSTOP),
        (0, signal.SIGSTOP),
    ],
)
def test_survivor_of_a_lost_rank_keeps_its_weights(
    part: Part, undisturbed: str, rank: int, number: signal.Signals
) -> None:
    epoch, pids, log = part.epoch, rank_pids(part), len(part.log)
    stream = Stream(part, LONG).wait_flowing()
    os.kill(pids[rank], number)
    if number == signal.SIGSTOP:
        part.until(lambda: part.fetch("/health")[0] == 503, "503 from /health")
    assert stream.text() == undisturbed
    part.wait_healthy(epoch + 1)
    assert part.epoch == epoch + 1, "one fault, one new epoch"
    new_pids = rank_pids(part)
    assert (new_pids[1 - rank], new_pids[rank] != pids[rank]) == (pids[1 - rank], True)
    assert [num_loads(part.log[log:], r) for r in range(2)] == [int(r == rank) for r in range(2)]
    assert undisturbed.startswith(part.complete(SHORT))
    part.pid("spare")


def test_lost_coordinator_costs_no_rank(part: Part, undisturbed: str) -> None:
    epoch, pids, log = part.epoch, rank_pids(part), len(part.log)
    stream = Stream(part, LONG).wait_flowing()
    part.kill("coordinator")
    assert stream.text() == undisturbed
    part.wait_healthy(epoch + 1)
    assert rank_pids(part) == pids
    assert [num_loads(part.log[log:], rank) for rank in range(2)] == [0, 0]


def test_lost_spare_disturbs_nobody(part: Part, undisturbed: str) -> None:
    epoch, spare = part.epoch, part.pid("spare")
    stream = Stream(part, LONG).wait_flowing()
    part.kill("spare")
    assert stream.text() == undisturbed
    part.until(lambda: part.pid("spare") != spare, "a new spare")
    part.wait_healthy()
    assert part.epoch == epoch


def test_hung_api_process_is_replaced(part: Part, undisturbed: str) -> None:
    epoch, api = part.epoch, part.pid("api")
    part.kill("api", signal.SIGSTOP)
    part.until(lambda: part.pid("api") != api, "a new API process")
    part.wait_healthy()
    assert part.epoch == epoch
    assert undisturbed.startswith(part.complete(SHORT))


def test_recovery_by_restart(settings: dict[str, str]) -> None:
    """Where aborting the collectives of a GPU fails, all ranks start anew."""
    with start(settings, RTP_RECOVERY="restart") as part:
        part.wait_healthy()
        undisturbed, pids = part.complete(LONG), rank_pids(part)
        stream = Stream(part, LONG).wait_flowing()
        part.kill("rank1")
        assert stream.text() == undisturbed
        part.wait_healthy(2)
        assert not set(rank_pids(part)) & set(pids)
        assert [num_loads(part.log, rank) for rank in range(2)] == [2, 2]
