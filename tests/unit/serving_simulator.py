"""Simulates clients, scheduler and a machine whose steps take as long as a formula says. Deterministic; no clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rtp_llm.contract.request import Request
from rtp_llm.engine.scheduler import Scheduler
from rtp_llm.engine.step_cost import StepWork
from tests.unit.scheduling import complete, make_request


@dataclass(frozen=True)
class Machine:
    """A machine whose steps take the time of the memory or that of the arithmetic, whichever is longer.

    All in seconds. overhead: of each step. memory: to read the weights. row, logits: of each token without and with
    logits. key: of each token that is attended to. noise: standard deviation of the logarithm. hiccups: share of steps
    that take ten times as long.
    """

    overhead: float = 0.002
    memory: float = 0.022
    row: float = 1.2e-3
    logits: float = 1.6e-3
    key: float = 3e-7
    noise: float = 0.0
    hiccups: float = 0.0

    def seconds(self, work: StepWork, rng: np.random.Generator) -> float:
        arithmetic = work.logit_rows * self.logits + work.other_rows * self.row
        keys = (work.decode_keys + work.prompt_keys) * self.key
        scale = np.exp(self.noise * rng.standard_normal()) * (10 if rng.random() < self.hiccups else 1)
        return float((self.overhead + max(self.memory, arithmetic) + keys) * scale)


@dataclass
class Stream:
    """A request in the simulation. Times in seconds."""

    request: Request
    arrival: float
    token_times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrival


@dataclass
class Simulation:
    """The result: the streams that have ended, and the steps as (work, seconds)."""

    streams: list[Stream] = field(default_factory=list)
    steps: list[tuple[StepWork, float]] = field(default_factory=list)
    seconds: float = 0.0

    def gaps(self) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """Returns the times between the tokens of a stream, for all streams."""
        return np.concatenate([np.diff(stream.token_times) for stream in self.streams])

    def tokens_per_second(self) -> float:
        return sum(len(stream.token_times) for stream in self.streams) / self.seconds


def simulate(
    scheduler: Scheduler,
    machine: Machine,
    arrivals: Sequence[tuple[float, int, int]],
    follow_up: Callable[[Stream], tuple[float, int, int] | None] = lambda stream: None,
    seed: int = 0,
) -> Simulation:
    """Serves requests until all have ended.

    `arrivals`: (time in seconds, prompt tokens, output tokens) of each request. `follow_up`: returns the request that
    a client sends when its last one has ended: a closed loop.
    """
    rng = np.random.default_rng(seed)
    result, now = Simulation(), 0.0
    queue = sorted(arrivals, reverse=True)
    streams: dict[str, Stream] = {}
    while queue or scheduler.running or scheduler.waiting:
        if not (scheduler.running or scheduler.waiting):
            now = max(now, queue[-1][0])
        while queue and queue[-1][0] <= now:
            arrival, prompt, output = queue.pop()
            name = f"r{len(streams)}"
            request = make_request(name, rng.integers(1 << 30, size=prompt).tolist(), output)
            streams[name] = Stream(request, arrival)
            scheduler.add(request)
        step = scheduler.schedule()
        work = StepWork.of(step.chunks)
        seconds = machine.seconds(work, rng)
        now += seconds
        scheduler.record_seconds(step, seconds)
        complete(scheduler, step)
        result.steps.append((work, seconds))
        for chunk in step.chunks:
            stream = streams[chunk.request.id]
            stream.token_times += [now] * chunk.num_sampled
            if chunk.request.has_ended:
                result.streams.append(stream)
                if following := follow_up(stream):
                    queue = sorted([*queue, following], reverse=True)
    result.seconds = now
    return result


def closed_loop(
    scheduler: Scheduler, machine: Machine, num_clients: int, lengths: Callable[[], tuple[int, int]], rounds: int = 8
) -> Simulation:
    """Serves clients that each send a request, of (prompt tokens, output tokens), when the last one has ended.

    They start at the same time.
    """
    remaining = num_clients * (rounds - 1)

    def follow_up(stream: Stream) -> tuple[float, int, int] | None:
        nonlocal remaining
        remaining -= 1
        return (stream.token_times[-1] + 0.002, *lengths()) if remaining >= 0 else None

    return simulate(scheduler, machine, [(0.0, *lengths()) for _ in range(num_clients)], follow_up)
