"""How a part ends: asked to at any moment, robbed of a process that holds it together, or after one loss too many."""

import json
import signal
from collections.abc import Mapping

import pytest

from tests.parallel.conftest import BODIES, GREEDY
from tests.parallel.parts import Part
from tests.parallel.stream import Stream
from tests.ports import free_start_port

LOADING = "collectives use interface"


def start(settings: Mapping[str, str], *args: str, ranks: int = 2) -> Part:
    """A part told by flags, in both spellings, how many ranks it has."""
    port = free_start_port(ranks)
    flags = ["--start_port", str(port), f"--tp_size={ranks}", "--world_size", str(ranks), *args]
    return Part(settings, flags, port=port, ranks=ranks)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "HTTP on port"),  # start_server says it, and starts supervisord
        (signal.SIGINT, "HTTP on port"),
        (signal.SIGTERM, "are here and agree"),  # the ranks load torch
        (signal.SIGINT, LOADING),
    ],
)
def test_asked_to_stop_before_it_serves(settings: dict[str, str], moment: str, number: signal.Signals) -> None:
    with start(settings) as part:
        part.wait_log(moment)
        part.stop(number)
        assert part.wait_end(30) == 0, part.log
        assert "Traceback" not in part.log


@pytest.mark.usefixtures("expected")  # what the others want of it has been asked
def test_a_stream_that_outlasts_the_time_it_is_given_is_cut(alone: Part) -> None:
    stream = Stream(alone, {**GREEDY, "max_tokens": 900}).flowing()
    alone.kill("rank0", signal.SIGSTOP)  # however fast the machine is, the stream has not ended by then
    alone.stop(signal.SIGINT)
    stream.wait()
    assert stream.finish is None
    assert alone.wait_end(30) == 0, alone.log
    assert "Traceback" not in alone.log
    alone.assert_nothing_left()


def test_while_it_drains_it_says_so_and_takes_nothing_new(settings: dict[str, str]) -> None:
    with start(settings) as part:
        part.wait_healthy()
        stream = Stream(part, {**GREEDY, "max_tokens": 900}).flowing()
        part.kill("rank1", signal.SIGSTOP)  # the stream cannot end before the questions are asked
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
def test_nothing_outlives_what_held_it_together(settings: dict[str, str], victim: str, code: int) -> None:
    """Least of all a process that was still starting, and could not yet ask the kernel to die with its parent."""
    part = start(settings)
    try:
        part.pid("rank0")
        part.kill(victim)
        assert part.wait_end() == code, part.log
        part.assert_no_process_left()
        if victim == "supervisord":
            part.assert_nothing_left()
    finally:
        part.destroy()


def test_the_budget_of_restarts(settings: dict[str, str], expected: dict[str, str]) -> None:
    """The first loss, while loading, is made good; the second one ends the part."""
    with start(settings, "--restart_limit=1") as part:
        part.wait_log(LOADING, times=2)
        part.kill("rank1")
        part.wait_healthy(2)
        assert part.complete(BODIES["greedy"]) == expected["greedy"]
        part.kill("rank0")
        assert part.wait_end() == 70, part.log
        assert "the budget of 1 restarts in 10 minutes is spent; the part ends with exit code 70" in part.log
