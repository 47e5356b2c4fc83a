"""Formats of the report: table and short for people; JSON, JUnit XML and Prometheus text for programs."""

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TextIO
from xml.etree import ElementTree

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from doctor.check import Status
from doctor.report import Finding, Report

DEFAULT_WIDTH = 118  # if the output is not a terminal
MIN_WIDTH, MAX_WIDTH = 72, 140


class _Look(NamedTuple):
    """How a status is shown: symbols, ANSI colour, number in metrics, and words for one finding and for several."""

    unicode: str
    ascii: str
    colour: str
    number: int
    singular: str
    plural: str


LOOKS = {  # by severity
    Status.ERROR: _Look("×", "XX", "31", 2, "error", "errors"),  # noqa: RUF001
    Status.CRASH: _Look("!", "##", "35", 3, "crashed", "crashed"),
    Status.UNKNOWN: _Look("?", "??", "35", 3, "unknown", "unknown"),
    Status.WARN: _Look("‼", "!!", "33", 1, "warning", "warnings"),
    Status.OK: _Look("√", "ok", "32", 0, "ok", "ok"),
    Status.SKIP: _Look("-", "--", "2", -1, "skipped", "skipped"),
}
UNICODE = {status: look.unicode for status, look in LOOKS.items()}
ASCII = {status: look.ascii for status, look in LOOKS.items()}
STATUS_NUMBERS = {status: look.number for status, look in LOOKS.items()}


@dataclass(frozen=True)
class Style:
    """How the report is printed: status symbols (Unicode or ASCII), whether to use ANSI colours, and line width in
    characters."""

    symbols: Mapping[Status, str]
    colour: bool
    width: int = DEFAULT_WIDTH

    @classmethod
    def for_stream(cls, stream: TextIO, environ: Mapping[str, str] = os.environ) -> "Style":
        """Returns the style for a stream. Uses colour on a terminal unless NO_COLOR is set (no-color.org), and ASCII
        symbols if the encoding is not UTF-8."""
        encoding = (stream.encoding or "ascii").lower()
        width = min(max(shutil.get_terminal_size().columns, MIN_WIDTH), MAX_WIDTH) if stream.isatty() else DEFAULT_WIDTH
        colour = stream.isatty() and environ.get("TERM") != "dumb" and not environ.get("NO_COLOR")
        return cls(UNICODE if "utf" in encoding else ASCII, colour, width)

    def colorize(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def symbol(self, status: Status) -> str:
        return self.colorize(self.symbols[status], LOOKS[status].colour)


def table(report: Report, style: Style, verbose: bool = False) -> str:
    """Returns the report as a table: one line per category of checks, each followed by the problems of the category
    with their fixes or, with `verbose`, by all its checks; then a summary.
    """
    lines = [*(style.colorize(line, "1") for line in _header(report, style)), ""]
    for category in dict.fromkeys(f.category for f in report.checks):
        findings = [f for f in report.checks if f.category == category]
        worst = min((f.status for f in findings), key=list(LOOKS).index)
        lines.append(f"{style.symbol(worst)} {category:<16} {_counts(findings)}")
        for finding in findings:
            if verbose or finding.status not in (Status.OK, Status.SKIP):
                lines += _entry(finding, report, style)
    if report.drift:
        lines += ["", "the parts differ in", *_drift(report)]
    lines += [""]
    if report.problems():
        lines += [f"more on each: rtp-llm-doctor explain {report.problems()[0].id}"]
    lines += [_summary_line(report, style)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def short(report: Report, style: Style) -> str:
    """Returns the report as one line per problem, without fixes, then one line with the verdict and the exit code."""
    lines = [_problem(f, style) for f in report.problems()]
    return "\n".join([*lines, _summary_line(report, style)]) + "\n"


def problem_lines(report: Report, style: Style) -> str:
    """Returns the problems in the report, one line each, followed by lines with the fix."""
    lines: list[str] = []
    for finding in report.problems():
        fixes = finding.fix.text(report.node.runtime).splitlines()
        lines += [_problem(finding, style), *(f"    fix: {fix}" for fix in fixes)]
    return "\n".join(lines) + "\n"


def _problem(finding: Finding, style: Style) -> str:
    return f"{style.symbol(finding.status)} {finding.id} {_sentence(finding)}"


def json_text(report: Report, style: Style) -> str:
    return report.to_json() + "\n"


def junit(report: Report, style: Style) -> str:
    """Returns the report as JUnit XML, for CI systems: each check is a test case. `style` is not used."""
    counts = report.counts()
    suite = ElementTree.Element(
        "testsuite",
        name="rtp-llm-doctor",
        tests=str(len(report.checks)),
        failures=str(counts[Status.ERROR]),
        errors=str(counts[Status.UNKNOWN] + counts[Status.CRASH]),
        skipped=str(counts[Status.SKIP]),
        time=str(report.duration_s),
    )
    tags = {Status.ERROR: "failure", Status.UNKNOWN: "error", Status.CRASH: "error", Status.SKIP: "skipped"}
    for finding in report.checks:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=finding.category,
            name=f"{finding.id} {finding.name}",
            time=f"{finding.duration_ms / 1000:.4f}",
        )
        if finding.status in tags:
            result = ElementTree.SubElement(case, tags[finding.status], message=_sentence(finding))
            result.text = finding.fix.text(report.node.runtime) or None
        elif finding.status == Status.WARN:
            ElementTree.SubElement(case, "system-out").text = f"warning: {_sentence(finding)}"
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def prometheus(report: Report, style: Style) -> str:
    """Returns the report as metrics in Prometheus' text format, for the textfile collector of node_exporter: the status
    of each check, and time and duration of the run. `style` is not used.
    """
    registry = CollectorRegistry()
    status = Gauge(
        "rtp_llm_doctor_check_status",
        "0 ok, 1 warning, 2 error, 3 unknown, -1 skipped",
        ["check", "part"],
        registry=registry,
    )
    part = "" if report.node.part is None else str(report.node.part)
    for finding in report.checks:
        status.labels(check=finding.id, part=part).set(STATUS_NUMBERS[finding.status])
    Gauge("rtp_llm_doctor_last_run_timestamp_seconds", "Time of the last run", registry=registry).set(report.started)
    Gauge("rtp_llm_doctor_duration_seconds", "Duration of the last run", registry=registry).set(report.duration_s)
    return generate_latest(registry).decode()


FORMATS: dict[str, Callable[[Report, Style], str]] = {
    "table": table,
    "short": short,
    "json": json_text,
    "junit": junit,
    "prom": prometheus,
}


def _header(report: Report, style: Style) -> list[str]:
    """Returns the lines about doctor, part and machine: a single line if it fits the width, else one per topic."""
    node = report.node
    sections = [f"rtp-llm-doctor {report.tool_version}"]
    if node.part is not None:
        part = f"part{node.part} of {node.parts}" + (f" ({node.name})" if node.parts and node.parts > 1 else "")
        ranks = f"rank {node.ranks[0]}" if len(node.ranks) == 1 else f"ranks {node.ranks[0]}-{node.ranks[-1]}"
        sections.append(f"{part}, {ranks} on {node.device}")
    facts = [f"{'' if name == 'gpus' else name + ' '}{value}" for name, value in node.facts.items()]
    sections.append(", ".join([node.runtime.value, *facts]))
    line = "   ".join(sections)
    return [line] if len(line) <= style.width else [row for section in sections for row in _wrap("", section, style)]


def _sentence(finding: Finding) -> str:
    text = f"{finding.actual}; expected {finding.expected}" if finding.expected else finding.actual
    return " ".join(text.split())


def _entry(finding: Finding, report: Report, style: Style) -> list[str]:
    head = f"  {style.symbols[finding.status]} {finding.id:<5}"
    indent = " " * len(head)
    lines = _wrap(head, _sentence(finding), style)
    lines[0] = lines[0].replace(style.symbols[finding.status], style.symbol(finding.status), 1)
    if finding.status not in (Status.WARN, Status.ERROR):
        return lines
    if finding.symptom:
        lines += _wrap(f"{indent}seen as ", f'"{finding.symptom[0]}"', style)
    # Fixes are not wrapped, so that a command can be copied as one line.
    fixes = finding.fix.text(report.node.runtime).splitlines()
    return lines + [f"{indent}{'fix' if number == 0 else '':<8}{fix}" for number, fix in enumerate(fixes)]


def _wrap(head: str, text: str, style: Style) -> list[str]:
    wrapped = textwrap.wrap(text, style.width - len(head), break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{head if n == 0 else ' ' * len(head)}{line}" for n, line in enumerate(wrapped)]


def _counts(findings: list[Finding]) -> str:
    counts = Counter(f.status for f in findings)
    return ", ".join(
        f"{counts[status]} {look.singular if counts[status] == 1 else look.plural}"
        for status, look in LOOKS.items()
        if counts[status]
    )


def _drift(report: Report) -> list[str]:
    return [f"  {d.key}: " + "   ".join(f"{part}={value}" for part, value in d.values.items()) for d in report.drift]


def _summary_line(report: Report, style: Style) -> str:
    text = {"ok": "ready", "warn": "ready, with warnings", "error": "not ready", "incomplete": "incomplete"}
    colours = {"ok": "32", "warn": "33", "error": "31", "incomplete": "35"}
    verdict = style.colorize(text[report.verdict], f"1;{colours[report.verdict]}")
    return f"{verdict}: {_counts(report.checks)} in {report.duration_s:.1f} s (exit {report.exit_code})"


def write(text: str, stream: TextIO | None = None) -> None:
    """Writes text to `stream` (default: stdout) and flushes. Ignores a closed pipe (`| head`), and replaces characters
    that the encoding lacks.

    Raises OSError for other failures, such as a full disk.
    """
    stream = stream or sys.stdout
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.replace("…", "...").encode(stream.encoding, "replace").decode(stream.encoding)
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        # Without this, Python would flush the stream again at exit, fail, and exit with 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise
