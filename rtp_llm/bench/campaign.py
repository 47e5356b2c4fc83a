"""Measures several targets (servers or engines) in turn (A B A B …) under the same loads.

Also measures, before each round, the machine's memory bandwidth and matrix operations per second, because these drift
on shared machines.
"""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rtp_llm.bench.bound import Bound, MachineRates, ModelCost, Probe, machine
from rtp_llm.bench.summary import Slo, Summary
from rtp_llm.bench.target import Target
from rtp_llm.bench.workload import Traffic, Workload, poisson_arrivals

WARM_UP_TOKENS = 64  # output of the requests before the first run of a case, in which some engines compile kernels
OPEN_CONCURRENCY = 1024  # of an open loop: more than any server takes


@dataclass(frozen=True)
class Case:
    """A load to measure: a workload with a number of concurrent requests, or with a `rate` in requests per second.

    requests  number of requests in each run of the case
    """

    name: str
    workload: Workload
    requests: int
    concurrency: int = 0
    rate: float = 0.0

    def traffic(self, vocab_size: int, seed: int) -> Traffic:
        requests = self.workload.requests(self.requests, vocab_size, seed)
        if self.rate:
            return Traffic(requests, OPEN_CONCURRENCY, poisson_arrivals(self.rate, len(requests), seed))
        return Traffic(requests, self.concurrency)

    def warm_up(self, vocab_size: int, seed: int) -> Traffic:
        count = min(self.requests, self.concurrency or 1)
        requests = self.workload.requests(count, vocab_size, seed)
        return Traffic([replace(r, output_tokens=min(r.output_tokens, WARM_UP_TOKENS)) for r in requests], count)


@dataclass(frozen=True)
class Run:
    """One measurement of a target (an engine or server) with a case (a load).

    bound     the highest rates that the machine allows; None if the model is not known, or if the load has a fixed
              request rate
    requests  a summary of each request
    """

    case: str
    target: str
    round: int
    summary: Summary
    bound: Bound | None
    requests: list[dict[str, Any]]


@dataclass(frozen=True)
class Campaign:
    """The options of a benchmark that measures targets (engines or servers) with all cases (loads).

    rounds  how often each target is measured with each case
    costs   ModelCost by target name, for the bound; has no entry for a target whose checkpoint is not on this machine
    slo     the limits that a request must meet to count for goodput
    seed    seed of the first prompts; each run has other prompts, so that no prefix cache helps
    """

    cases: Sequence[Case]
    rounds: int
    vocab_size: int
    costs: dict[str, ModelCost]
    slo: Slo
    seed: int

    def run(self, targets: Sequence[Target], probe: Probe | None) -> Iterator[tuple[Run, MachineRates | None]]:
        """Measures all targets with all cases. Yields each run, and the machine's rates as `probe` measured them before
        the round of the run (None without a probe). In a round, each target runs once with the same case.

        The targets must be ready: the caller has entered them as context managers.
        """
        seed = self.seed
        for case in self.cases:
            for target in targets:
                seed += 1
                target.run(case.warm_up(self.vocab_size, seed), lambda record: None)
            for number in range(self.rounds):
                rates = probe.measure() if probe else None
                for target in targets:
                    seed += 1
                    yield self._measure(case, target, number, seed, rates), rates

    def _measure(self, case: Case, target: Target, number: int, seed: int, rates: MachineRates | None) -> Run:
        traffic = case.traffic(self.vocab_size, seed)
        with _progress_bar(f"{case.name} {target.name} {number + 1}/{self.rounds}", len(traffic.requests)) as bar:
            records = target.run(traffic, lambda record: bar.update())
        cost, bound = self.costs.get(target.name), None
        if cost and rates and case.concurrency:
            bound = Bound.of(cost, rates, case.workload, case.concurrency)
        requests = [record.summary() for record in records]
        return Run(case.name, target.name, number, Summary.of(records, self.slo), bound, requests)


@contextmanager
def _progress_bar(label: str, total: int) -> Iterator[Any]:
    with tqdm(total=total, desc=label, unit="request", leave=False, disable=None) as bar:
        yield bar


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Returns the properties of the benchmark for its report: machine, commit, command, date."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""  # no git
    return {
        "machine": machine(),
        "commit": commit or "unknown",
        "command": " ".join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
