"""Workloads: the lengths of prompts and outputs, the prompts themselves, and the arrival times."""

import random
from dataclasses import dataclass, field
from itertools import accumulate

from rtp_llm.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """One request: a prompt of token ids, and the exact number of tokens to generate."""

    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True)
class Traffic:
    """Requests to send, at most `concurrency` at a time.

    arrivals: when each request is due, in seconds after the start; empty: as soon as fewer than `concurrency` run.
    """

    requests: list[Request]
    concurrency: int
    arrivals: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Workload:
    """A stream of requests. `lengths`: (input, output) tokens of the requests, used in turn. `shared_prefix`: number of
    tokens with which every prompt begins; they count as input.
    """

    name: str
    lengths: tuple[tuple[int, int], ...]
    shared_prefix: int = 0

    def requests(self, count: int, vocab_size: int, seed: int) -> list[Request]:
        """Returns `count` requests with prompts of random token ids below `vocab_size`. Another seed gives other
        prompts, so that no prefix cache contains them.
        """
        source = random.Random(seed)
        prefix = source.choices(range(vocab_size), k=self.shared_prefix)
        lengths = (self.lengths[number % len(self.lengths)] for number in range(count))
        return [
            Request(prefix + source.choices(range(vocab_size), k=inputs - len(prefix)), outputs)
            for inputs, outputs in lengths
        ]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("chat", ((128, 128),)),
        Workload("decode", ((128, 1024),)),
        Workload("prefill", ((1024, 128),)),
        Workload("long", ((8192, 512),)),
        Workload("mixed", ((8192, 64), *((128, 128),) * 7)),  # one long context beside seven short ones
        Workload("shared-prefix", ((1152, 128),), shared_prefix=1024),
    )
}


def find_workload(name: str, inputs: int | None, outputs: int | None) -> Workload:
    """Returns the workload `name`, or, if `inputs` and `outputs` are given, a workload whose requests all have `inputs`
    prompt tokens and `outputs` output tokens.

    Raises ConfigError if only one of the two is given, if one is less than 1, or if the name is unknown.
    """
    if (inputs is None) != (outputs is None):
        raise ConfigError("--input and --output must be given together; allowed: both, or --workload")
    if inputs is not None and outputs is not None:
        if min(inputs, outputs) < 1:
            raise ConfigError(f"--input {inputs} --output {outputs}: allowed: at least one token each")
        return Workload(f"{inputs}/{outputs}", ((inputs, outputs),))
    if name not in WORKLOADS:
        raise ConfigError(f"--workload {name}: unknown; allowed: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Returns the arrival times of a Poisson process in seconds: `rate` per second on average, exponential gaps."""
    source = random.Random(seed)
    return list(accumulate(source.expovariate(rate) for _ in range(count)))
