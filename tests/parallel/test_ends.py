"""The end of a part: stop signals at any time, loss of a supervising process, a spent restart budget."""

import json
import signal
from collections.abc import Mapping

import pytest

from tests.parallel.conftest import BODIES, GREEDY
from tests.parallel.parts import Part
from tests.parallel.stream import Stream
from tests.ports import free_start_port

LOADING = "collectives use shared memory"


def start(settings: Mapping[str, str], *args: str, ranks: int = 2) -> Part:
    """Starts a part with TP_SIZE and WORLD_SIZE as flags, in both spellings (--name value, --name=value)."""
    port = free_start_port(ranks)
    flags = ["--start_port", str(port), f"--tp_size={ranks}", "--world_size", str(ranks), *args]
    return Part(settings, flags, port=port, ranks=ranks)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "HTTP on port"),  # logged before start_server starts supervisord
        pytest.param(signal.SIGINT, "HTTP on port", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "are here and agree", marks=pytest.mark.slow),  # the ranks load torch
        pytest.param(signal.SIGINT, LOADING, marks=pytest.mark.slow),
    ],
)
def test_stop_signal_during_start_exits_0(settings: dict[str, str], moment: str, number: signal.Signals) -> None:
    with start(settings) as part:
        part.wait_log(moment)
        part.stop(number)
        assert part.wait_end(30) == 0, part.log
        assert "Traceback" not in part.log


@pytest.mark.slow
@pytest.mark.usefixtures("expected")  # has its outputs before this test stops it
def test_stream_is_cut_after_the_shutdown_timeout(single_rank: Part) -> None:
    stream = Stream(single_rank, {**GREEDY, "max_tokens": 900}).wait_flowing()
    single_rank.kill("rank0", signal.SIGSTOP)  # the stream cannot end, also on a fast machine
    single_rank.stop(signal.SIGINT)
    stream.wait()
    assert stream.finish is None
    assert single_rank.wait_end(30) == 0, single_rank.log
    assert "Traceback" not in single_rank.log
    single_rank.assert_nothing_left()


@pytest.mark.slow
def test_draining_part_reports_503_and_rejects_requests(settings: dict[str, str]) -> None:
    with start(settings, "--shutdown_timeout=300") as part:
        part.wait_healthy()
        stream = Stream(part, {**GREEDY, "max_tokens": 900}).wait_flowing()
        part.kill("rank1", signal.SIGSTOP)  # the stream cannot end before the requests below
        part.stop()
        part.until(lambda: part.fetch("/health")[0] == 503, "503 from /health")
        assert json.loads(part.fetch("/health")[1])["phase"] == "draining"
        status, text = part.fetch("/v1/completions", BODIES["short"])
        assert (status, "the server is stopping" in text) == (503, True)
        assert part.fetch("/liveness") == (200, '"ok"')
        part.kill("rank1", signal.SIGCONT)
        assert stream.wait().finish == "length"
        assert stream.done
        assert part.wait_end() == 0


@pytest.mark.parametrize(("victim", "code"), [("supervisord", 70), ("start_server", -signal.SIGKILL)])
def test_no_process_outlives_a_killed_supervisor(settings: dict[str, str], victim: str, code: int) -> None:
    """Also tests processes that have not called prctl(PR_SET_PDEATHSIG) yet when supervisord is killed."""
    part = start(settings)
    try:
        part.pid("worker0")
        part.kill(victim)
        assert part.wait_end() == code, part.log
        part.assert_no_process_left()
        if victim == "supervisord":
            part.assert_nothing_left()
    finally:
        part.destroy()


@pytest.mark.slow
def test_spent_restart_budget_ends_the_part(settings: dict[str, str], expected: dict[str, str]) -> None:
    """With RESTART_LIMIT=1 the ranks restart after the first lost rank; the second one ends the part."""
    with start(settings, "--restart_limit=1") as part:
        part.wait_log(LOADING, times=2)
        part.kill("rank1")
        part.wait_healthy(2)
        assert part.complete(BODIES["greedy"]) == expected["greedy"]
        part.kill("rank0")
        assert part.wait_end() == 70, part.log
        assert "the budget of 1 restarts in 10 minutes is spent; the part ends with exit code 70" in part.log
