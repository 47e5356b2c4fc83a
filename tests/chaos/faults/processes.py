"""Processes that die, stop or exit."""

import signal
import time
from collections.abc import Iterator

from tests.chaos.faults.registry import Injector, Scene, fault, send_signal
from tests.chaos.ledger import Outcome
from tests.chaos.rig import Layout
from tests.chaos.roles import rank_pids

CUT = frozenset({Outcome.CUT})  # with the API process its connections are lost
DEATHS = {
    "kill_rank": ("kill -9 of a rank", signal.SIGKILL),
    "segv_rank": ("SIGSEGV in a rank", signal.SIGSEGV),
    "bus_rank": ("SIGBUS in a rank", signal.SIGBUS),
    "abort_rank": ("SIGABRT in a rank", signal.SIGABRT),
    "exit_rank": ("a rank exits with 0", signal.SIGUSR2),  # see inside/sitecustomize.py
}
MAX_LONG_PROMPTS = 20
LOADING_SECONDS = 1.0
DEADLINE_SECONDS = 30.0


def _slow_loading() -> dict[str, str]:
    return {"CHAOS_LOADING_SECONDS": f"{LOADING_SECONDS}"}  # see inside/sitecustomize.py


def _death(number: signal.Signals) -> Injector:
    def die(scene: Scene) -> Iterator[None]:
        send_signal(scene.random_rank(), number)
        yield

    return die


for name, (text, number) in DEATHS.items():
    fault(text, name=name, plain=True, in_ci=name in ("kill_rank", "exit_rank"))(_death(number))
fault("kill -9 of a rank of either of two parts", name="kill_rank_of_two_parts", layout=Layout.TWO_PARTS, in_ci=True)(
    _death(signal.SIGKILL)
)


fault("kill -9 of a rank without any request", name="kill_idle_rank", idle=True, plain=True)(_death(signal.SIGKILL))


@fault("kill -9 of a rank while a long prompt is computed", plain=True)
def kill_rank_in_prefill(scene: Scene) -> Iterator[None]:
    for _ in range(MAX_LONG_PROMPTS):
        entry = scene.load.send_long_prompt()
        time.sleep(scene.rng.uniform(0.0, 0.02))
        if not entry.response.arrivals:
            break
    assert not entry.response.arrivals, "each long prompt had a token before its rank was killed"
    send_signal(scene.random_rank(), signal.SIGKILL)
    yield


@fault("kill -9 of a rank while it loads the weights of a lost one", settings=_slow_loading, plain=True)
def kill_loading_rank(scene: Scene) -> Iterator[None]:
    send_signal(scene.random_rank(), signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (pids := [pid for part in scene.rig.parts for pid in rank_pids(part, phase="loading").values()]):
        assert time.monotonic() < deadline, "no rank loads weights"
        time.sleep(0.005)
    time.sleep(scene.rng.uniform(0.0, 0.8 * LOADING_SECONDS))
    send_signal(pids[0], signal.SIGKILL)
    yield


@fault("kill -9 of all ranks at once", plain=True)
def kill_all_ranks(scene: Scene) -> Iterator[None]:
    for part in scene.rig.parts:
        for pid in rank_pids(part).values():
            send_signal(pid, signal.SIGKILL)
    yield


@fault("kill -9 of a rank while the loss of another is repaired", plain=True)
def kill_rank_twice(scene: Scene) -> Iterator[None]:
    send_signal(scene.random_rank(), signal.SIGKILL)
    time.sleep(scene.rng.uniform(0.05, 4.0))
    if any(rank_pids(part) for part in scene.rig.parts):
        send_signal(scene.random_rank(), signal.SIGKILL)
    yield


@fault("SIGSTOP of a rank, for ever", plain=True)
def stop_rank(scene: Scene) -> Iterator[None]:
    send_signal(scene.random_rank(), signal.SIGSTOP)
    yield


@fault("SIGSTOP of a rank, SIGCONT after 0.1 to 12 s", seconds=(0.1, 12.0), plain=True)
def stop_rank_for_a_while(scene: Scene) -> Iterator[None]:
    pid = scene.random_rank()
    send_signal(pid, signal.SIGSTOP)
    yield
    send_signal(pid, signal.SIGCONT)


@fault("kill -9 of the spare", plain=True)
def kill_spare(scene: Scene) -> Iterator[None]:
    send_signal(scene.random_spare(), signal.SIGKILL)
    yield


@fault("kill -9 of the API process", allowed=CUT, plain=True, in_ci=True)
def kill_api(scene: Scene) -> Iterator[None]:
    send_signal(scene.helper("api"), signal.SIGKILL)
    yield


@fault("SIGSTOP of the API process, for ever", allowed=CUT, plain=True)
def stop_api(scene: Scene) -> Iterator[None]:
    send_signal(scene.helper("api"), signal.SIGSTOP)
    yield


@fault("kill -9 of the guard", plain=True)
def kill_guard(scene: Scene) -> Iterator[None]:
    send_signal(scene.helper("guard"), signal.SIGKILL)
    yield


@fault("kill -9 of the guard, then of a rank", plain=True)
def kill_guard_and_rank(scene: Scene) -> Iterator[None]:
    send_signal(scene.helper("guard"), signal.SIGKILL)
    send_signal(scene.random_rank(), signal.SIGKILL)
    yield


@fault("kill -9 of the coordinator", plain=True)
def kill_coordinator(scene: Scene) -> Iterator[None]:
    send_signal(scene.helper("coordinator"), signal.SIGKILL)
    yield


@fault("SIGSTOP of the coordinator, for ever", plain=True)
def stop_coordinator(scene: Scene) -> Iterator[None]:
    pid = scene.helper("coordinator")
    send_signal(pid, signal.SIGSTOP)
    yield
    deadline = time.monotonic() + DEADLINE_SECONDS
    while pid in scene.rig.parts[0].processes():  # requests do not need it, so nobody else waits for its end
        assert time.monotonic() < deadline, f"the coordinator still stands after {DEADLINE_SECONDS:g} s"
        time.sleep(0.1)


@fault("kill -9 of the coordinator and a rank at once", plain=True)
def kill_coordinator_and_rank(scene: Scene) -> Iterator[None]:
    rank = scene.random_rank()  # before the guards write that there is none
    send_signal(scene.helper("coordinator"), signal.SIGKILL)
    send_signal(rank, signal.SIGKILL)
    yield
