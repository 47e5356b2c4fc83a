"""Which requests are suspects, who runs while they are tried, and who is convicted."""

import math
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from rtp_llm.api.suspects import (
    MAX_CULPRITS,
    MIN_FAILED_STEPS,
    RELAPSE_STEPS,
    TRIAL_STEPS,
    WINDOW_SECONDS,
    SuspectTracker,
)


@dataclass(frozen=True)
class Request:
    id: str
    is_poison: bool = False

    @property
    def fingerprint(self) -> str:
        return self.id


class Server:
    """An engine that dies in every step with a poison request, and the client that follows the tracker."""

    def __init__(self, *requests: Request):
        self.tracker = SuspectTracker[Request]()
        self.epoch, self.now = 1, 0.0
        self.open: list[Request] = []
        self.convicted: list[Request] = []
        self.steps_in_company: list[set[Request]] = []
        self.accept(*requests)

    def accept(self, *requests: Request) -> None:
        for request in requests:
            self.open.append(request)
            self.tracker.add(request)

    @property
    def running(self) -> list[Request]:
        return [request for request in self.open if self.tracker.may_run(request)]

    def step(self) -> bool:
        """Computes a step. Returns False if the engine dies in it."""
        running = self.running
        if any(request.is_poison for request in running):
            self.lose(running)
            return False
        self.tracker.on_step(running)
        return True

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def lose(self, launched: list[Request]) -> None:
        culprit = self.tracker.on_lost(self.epoch, launched, self.now)
        self.epoch += 1
        if culprit:
            self.convicted.append(culprit)
            self.end(culprit)

    def kill(self) -> None:
        """Kills the engine in a step, as an operator does."""
        self.lose(self.running)

    def end(self, request: Request) -> None:
        self.open.remove(request)
        self.tracker.remove(request)

    @property
    def verdicts(self) -> list[str]:
        return [self.tracker.verdicts[epoch] for epoch in range(1, self.epoch)]


INNOCENTS = [Request(f"innocent {n}") for n in range(8)]
POISON = Request("poison", is_poison=True)


def test_a_poison_among_running_requests_is_convicted_by_the_third_crash() -> None:
    server = Server(*INNOCENTS)
    server.step()
    server.accept(POISON)
    server.step()
    assert server.running == [POISON]
    assert server.verdicts == ["investigating"]
    late = Request("late")
    server.accept(late)
    assert not server.tracker.may_run(late)
    server.step()
    assert server.running == [POISON]
    server.step()
    assert server.convicted == [POISON]
    assert server.verdicts == ["investigating"] * 3  # the crashes are free once the others finish a step without it
    assert server.running == [*INNOCENTS, late]
    server.step()
    assert server.verdicts == ["request"] * 3


def test_two_kills_in_a_row_convict_nobody() -> None:
    """The second kill hits a new request that is tried alone."""
    server = Server(*INNOCENTS)
    server.step()
    new = Request("new")
    server.accept(new)
    server.kill()
    assert server.running == [new]
    server.kill()
    assert server.running == [new]
    server.steps(TRIAL_STEPS)
    assert server.convicted == []
    assert server.running == [*INNOCENTS, new]
    assert server.verdicts == ["engine"] * 2
    server.kill()
    server.kill()
    server.steps(RELAPSE_STEPS * len(server.open))
    assert server.convicted == [], "its first failures count no longer"


@given(st.integers(1, 40), st.data())
def test_one_poison_among_new_requests_is_found_in_logarithmic_time(num_requests: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, num_requests - 1))
    requests = [Request(str(n), is_poison=n == index) for n in range(num_requests)]
    server = Server(*requests)
    for _ in range(10 * num_requests):
        if not server.step() and server.tracker.is_investigating:
            assert len(server.running) <= math.ceil(num_requests / 2)
    assert server.convicted == [requests[index]]
    assert len(server.verdicts) <= max(MIN_FAILED_STEPS, 2 + math.ceil(math.log2(num_requests)))
    assert set(server.verdicts) == ({"request"} if num_requests > 1 else {"investigating"})
    assert server.running == server.open


@given(st.lists(st.booleans(), min_size=1, max_size=24))
def test_any_number_of_poisons_ends_and_nobody_else_is_convicted(are_poison: list[bool]) -> None:
    requests = [Request(str(n), is_poison) for n, is_poison in enumerate(are_poison)]
    server = Server(*requests)
    server.steps(20 * len(requests))
    assert set(server.convicted) == {request for request in requests if request.is_poison}
    assert server.running == server.open == [request for request in requests if not request.is_poison]


@given(st.lists(st.sampled_from(["step", "step", "kill", "accept", "end"]), max_size=60))
def test_no_order_of_events_blocks_requests_for_ever(events: list[str]) -> None:
    server = Server(*INNOCENTS)
    for n, event in enumerate(events):
        if event == "accept":
            server.accept(Request(f"later {n}"))
        elif event == "end" and server.open:
            server.end(server.open[0])
        elif event == "kill":
            server.kill()
        else:
            server.step()
        assert not server.open or server.running
    server.steps(TRIAL_STEPS * (len(server.open) + 1))
    assert server.running == server.open
    assert len(server.convicted) <= max(0, events.count("kill") - MIN_FAILED_STEPS + 1)
    assert server.tracker.verdicts.keys() == set(range(1, server.epoch))


def test_a_killed_engine_convicts_nobody_and_holds_nobody() -> None:
    server = Server(*INNOCENTS)
    for _ in range(5):
        server.steps(RELAPSE_STEPS)
        server.kill()
        assert server.running == INNOCENTS
    assert server.verdicts == ["engine"] * 5


def test_a_kill_while_a_new_request_starts_costs_two_steps_alone() -> None:
    server = Server(*INNOCENTS)
    server.step()
    new = Request("new")
    server.accept(new)
    server.kill()
    for _ in range(TRIAL_STEPS):
        assert server.running == [new]
        server.step()
    assert server.running == [*INNOCENTS, new]
    assert server.verdicts == ["engine"]


def test_requests_that_fail_again_at_once_are_tried_in_halves() -> None:
    """One of them fails at a position that it has reached: it ran before, and fails in its first step."""
    late_poison = Request("late", is_poison=True)
    innocents = INNOCENTS[:7]
    server = Server(*innocents)
    server.accept(late_poison)
    server.tracker.on_step(server.open)
    server.step()
    assert server.verdicts == ["engine"]
    assert server.running == server.open
    server.step()
    assert server.running == server.open[:4]
    server.steps(20)
    assert server.convicted == [late_poison]
    assert server.running == innocents
    assert server.verdicts == ["engine", *["request"] * (len(server.verdicts) - 1)]
    assert len(server.verdicts) <= 5


def test_a_loss_without_a_computed_request_is_the_engines() -> None:
    server = Server(*INNOCENTS)
    server.lose([])
    assert server.verdicts == ["engine"]
    assert server.running == INNOCENTS
    server.step()
    server.accept(POISON)
    server.step()
    server.lose([])  # before the trial has begun
    assert server.running == [POISON]
    assert server.verdicts[-2:] == ["investigating", "engine"]
    server.steps(MIN_FAILED_STEPS - 1)
    assert server.convicted == [POISON]


def test_a_suspect_that_leaves_ends_its_trial_without_a_culprit() -> None:
    server = Server(*INNOCENTS)
    server.step()
    server.accept(POISON)
    server.step()
    server.end(POISON)
    assert server.running == INNOCENTS
    assert server.verdicts == ["engine"]


def test_a_crash_before_the_others_finish_a_step_is_the_engines() -> None:
    """The engine crashes without the convicted request, too."""
    server = Server(*INNOCENTS)
    server.step()
    server.accept(POISON)
    server.steps(MIN_FAILED_STEPS)
    assert server.convicted == [POISON]
    server.kill()
    assert server.verdicts[:3] == ["engine"] * 3


def test_three_culprits_in_ten_minutes_are_the_engines_fault() -> None:
    server = Server(*INNOCENTS)
    server.step()
    poisons = [Request(f"poison {n}", is_poison=True) for n in range(MAX_CULPRITS + 1)]
    for poison in poisons:
        assert not server.tracker.is_known_culprit(poison, server.now)
        server.accept(poison)
        server.steps(MIN_FAILED_STEPS + 1)
    assert server.convicted == poisons
    assert server.verdicts == [
        *["request"] * MIN_FAILED_STEPS * MAX_CULPRITS,
        *["engine"] * MIN_FAILED_STEPS,
    ]
    server.now += WINDOW_SECONDS
    server.accept(POISON)
    server.steps(MIN_FAILED_STEPS + 1)
    assert server.verdicts[-3:] == ["request"] * 3


def test_a_culprit_is_known_for_ten_minutes() -> None:
    server = Server(*INNOCENTS, POISON)
    server.steps(20)
    assert server.tracker.is_known_culprit(Request(POISON.id), server.now)
    assert not server.tracker.is_known_culprit(Request("another"), server.now)
    assert not server.tracker.is_known_culprit(Request(POISON.id), server.now + WINDOW_SECONDS)
