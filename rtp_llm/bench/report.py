"""The report of a benchmark: its JSON, its table, and the comparison of two reports."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rtp_llm.bench.bound import MachineRates
from rtp_llm.bench.campaign import Case, Run
from rtp_llm.bench.catalogue import GROUPS
from rtp_llm.errors import ConfigError


@dataclass(frozen=True)
class TargetInfo:
    """Description of a target (an engine or server), such as its version, and how many seconds it took to start."""

    description: str
    start_seconds: float


@dataclass
class Report:
    """The results of a benchmark; complete after its last run.

    environment  machine, commit, command, date
    targets      the measured engines and servers by name, in the order of the table
    absent       {target name: why it could not be measured}
    rates        bytes and operations per second of the machine, measured between the runs
    """

    environment: dict[str, Any]
    cases: list[Case] = field(default_factory=list)
    targets: dict[str, TargetInfo] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    rates: list[MachineRates] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def add(self, run: Run, rates: MachineRates | None) -> None:
        self.runs.append(run)
        if rates and rates not in self.rates:
            self.rates.append(rates)

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_JSON.dump_json(self, indent=1) + b"\n")

    @classmethod
    def read(cls, file: Path) -> "Report":
        """Returns the report in a JSON file. Raises ConfigError if the file cannot be read or is not a report."""
        try:
            return _JSON.validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(f"{file}: is not a report of rtp-llm-bench: {error}") from None

    def runs_of(self, case: str, target: str) -> list[Run]:
        """Returns the runs of a target (an engine or server) with a case (a load), in order."""
        return [run for run in self.runs if (run.case, run.target) == (case, target)]

    def median(self, case: Case, target: str, value: Callable[[Run], float]) -> float:
        """Returns the median of `value` over the runs of a target with a case; 0 if there are none."""
        return median([value(run) for run in self.runs_of(case.name, target)] or [0.0])

    def rate(self, case: Case, target: str) -> float:
        """Returns a target's main rate with a case in tokens per second, the median of its runs: the input rate if the
        requests of the case have a single output token, else the output rate.
        """
        return self.median(case, target, rate_of(case))

    def bound(self, case: Case, target: str) -> float:
        """Returns the highest `rate` that the machine allows a target with a case, in tokens per second; 0 if it is not
        known.
        """
        return self.median(case, target, lambda run: getattr(run.bound, _rate_name(case), 0.0))


_JSON = TypeAdapter(Report)
Value = Callable[[Run], float]


def _rate_name(case: Case) -> str:
    """Returns the name of a case's main rate: output, or input if requests have a single output token."""
    return "output_rate" if max(outputs for _, outputs in case.workload.lengths) > 1 else "input_rate"


def rate_of(case: Case) -> Value:
    name = _rate_name(case)
    return lambda run: float(getattr(run.summary, name))


def itl_p99(run: Run) -> float:
    """Returns the 99th percentile of the inter-token latency, in milliseconds."""
    return run.summary.itl.p99 * 1e3


def ttft_p50(run: Run) -> float:
    """Returns the median time to the first token, in milliseconds."""
    return run.summary.ttft.p50 * 1e3


def _fairness(case: Case) -> Value:
    """Returns ITL p99 divided by the time in which each stream gets one token if the output rate is shared evenly."""

    def value(run: Run) -> float:
        return run.summary.itl.p99 * run.summary.output_rate / case.concurrency if case.concurrency else 0.0

    return value


HEADER: tuple[str, ...] = (
    *("case", "target", "tok/s", "decode", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "x fair"),
    *("E2E p50", "E2E p99", "goodput", "bound", "ours / it", "errors"),
)
LEGEND = """\
tok/s: of output, or of the prompt where an answer has one token. decode: of one request after its first token. Times in
ms. x fair: ITL p99 over streams / (output tok/s). goodput: requests/s within the SLO. bound: share of what bandwidth
and operations allow. Medians of the rounds; ratios are the medians of those within a round."""


def table(report: Report) -> str:
    """Returns the report as text: a table with one line per case and target, then a line for each target and a
    description of the machine.
    """
    rows = [HEADER]
    for case in report.cases:
        rows += [_row(report, case, target) for target in report.targets if report.runs_of(case.name, target)]
    lines = [_aligned(rows), "", LEGEND, ""]
    for name, info in report.targets.items():
        lines.append(f"{name}: ready after {info.start_seconds:.1f} s; {info.description}")
        runs = [run for run in report.runs if run.target == name]
        most = max((run.summary.tokens_per_event for run in runs), default=1.0)
        if most > 1.01:
            lines.append(f"{name}: up to {most:.2f} tokens per event; ITL is the time between events")
    lines += [f"{name}: absent: {reason}" for name, reason in report.absent.items()]
    env = report.environment
    lines.append(f"{env['machine']['cpu']}, {env['machine']['cores']} cores, {env['commit']}, {env['date']}")
    if report.rates:
        lines.append(_rates(report.rates))
    return "\n".join(lines)


def _row(report: Report, case: Case, target: str) -> tuple[str, ...]:
    def number(value: Value, digits: int = 0) -> str:
        """Returns the median of numbers as text for a table; empty if it is 0."""
        result = report.median(case, target, value)
        return f"{result:.{digits}f}" if result else ""

    bound, ratio = report.bound(case, target), _ratio(report, case, target)
    return (
        case.name,
        target,
        number(rate_of(case), 1),
        number(lambda run: run.summary.decode_rate, 1),
        number(ttft_p50),
        number(lambda run: run.summary.ttft.p99 * 1e3),
        number(lambda run: run.summary.itl.p50 * 1e3, 1),
        number(itl_p99, 1),
        number(_fairness(case), 2),
        number(lambda run: run.summary.e2e.p50 * 1e3),
        number(lambda run: run.summary.e2e.p99 * 1e3),
        number(lambda run: run.summary.goodput, 2),
        f"{report.rate(case, target) / bound:.0%}" if bound else "",
        f"{ratio:.2f}" if ratio else "",
        number(lambda run: run.summary.errors),
    )


def _ratio(report: Report, case: Case, target: str) -> float:
    """Returns the speed of `ours` divided by the target's: the median over the rounds, in which both ran alternately.

    `ours`: the first target of that kind with as many bits per weight. Returns 0 if there is none.
    """
    own = next((name for name in report.targets if name.startswith("ours-") and _group(name) == _group(target)), "")
    rate = rate_of(case)
    pairs = zip(report.runs_of(case.name, own), report.runs_of(case.name, target), strict=False)
    return median([rate(ours) / rate(theirs) for ours, theirs in pairs if rate(theirs)] or [0.0])


def _group(target: str) -> str:
    return GROUPS.get(target.partition("@")[0].partition("-")[2], "")


def _rates(rates: Sequence[MachineRates]) -> str:
    columns = {"GB/s read": [rate.bandwidth for rate in rates]}
    columns |= {f"{name} Gop/s": [rate.operations[name] for rate in rates] for name in rates[0].operations}
    ranges = (f"{min(values) / 1e9:.0f}-{max(values) / 1e9:.0f} {name}" for name, values in columns.items())
    return f"measured beside the runs: {', '.join(ranges)}"


def compare(before: Report, after: Report) -> str:
    """Returns a table of the cases and targets that both reports have, with ratios: above 1, `after` is better."""
    rows: list[tuple[str, ...]] = [("case", "target")]
    for title in ("tok/s", "TTFT p50", "ITL p99"):
        rows[0] += (title, title, "ratio")
    for case in after.cases:
        for target in after.targets:
            if before.runs_of(case.name, target) and after.runs_of(case.name, target):
                row: tuple[str, ...] = (case.name, target)
                for value in (rate_of(case), ttft_p50, itl_p99):
                    old, new = before.median(case, target, value), after.median(case, target, value)
                    better, worse = (old, new) if value in (ttft_p50, itl_p99) else (new, old)
                    row += (f"{old:.1f}", f"{new:.1f}", f"{better / worse:.2f}" if worse else "")
                rows.append(row)
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Returns rows as a Markdown table whose columns line up: the first two to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = tuple(("-" * width) if n < 2 else ("-" * (width - 1) + ":") for n, width in enumerate(widths))

    def line(row: tuple[str, ...]) -> str:
        cells = (c.ljust(w) if n < 2 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        return f"| {' | '.join(cells)} |"

    return "\n".join(line(row) for row in (rows[0], rule, *rows[1:]))
