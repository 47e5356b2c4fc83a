"""The report for people (table, short) and for machines (JSON, JUnit, Prometheus text)."""

import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TextIO
from xml.etree import ElementTree

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from doctor.check import Status
from doctor.report import Finding, Report

WIDTH = 118
STATUS_NUMBERS = {
    Status.SKIP: -1,
    Status.OK: 0,
    Status.WARN: 1,
    Status.ERROR: 2,
    Status.UNKNOWN: 3,
    Status.CRASH: 3,
}


@dataclass(frozen=True)
class Style:
    """Symbols and colours of a terminal; plain text elsewhere."""

    symbols: Mapping[Status, str]
    colour: bool

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str] = os.environ) -> "Style":
        """Colour on a TTY unless NO_COLOR is set (no-color.org); ASCII where the encoding has no symbols."""
        encoding = (stream.encoding or "ascii").lower()
        tty = stream.isatty() and environ.get("TERM") != "dumb"
        return cls(UNICODE if "utf" in encoding else ASCII, tty and not environ.get("NO_COLOR"))

    def paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def mark(self, status: Status) -> str:
        return self.paint(self.symbols[status], COLOURS[status])


UNICODE = {
    Status.OK: "√",
    Status.WARN: "‼",
    Status.ERROR: "×",  # noqa: RUF001
    Status.UNKNOWN: "?",
    Status.CRASH: "!",
    Status.SKIP: "-",
}
ASCII = {**UNICODE, Status.OK: "ok", Status.WARN: "!!", Status.ERROR: "XX"}
COLOURS = {
    Status.OK: "32",
    Status.WARN: "33",
    Status.ERROR: "31",
    Status.UNKNOWN: "35",
    Status.CRASH: "35",
    Status.SKIP: "2",
}
WORST = (Status.ERROR, Status.CRASH, Status.UNKNOWN, Status.WARN, Status.OK, Status.SKIP)
COUNT_WORDS = (
    (Status.ERROR, "error", "errors"),
    (Status.CRASH, "crashed", "crashed"),
    (Status.UNKNOWN, "unknown", "unknown"),
    (Status.WARN, "warning", "warnings"),
    (Status.OK, "ok", "ok"),
    (Status.SKIP, "skipped", "skipped"),
)


def table(report: Report, style: Style, verbose: bool = False) -> str:
    """One line a category, and under it whatever is not well; `verbose` shows every check."""
    lines = [style.paint(_title(report), "1"), ""]
    for category, group in groupby(report.checks, key=lambda f: f.category):
        findings = list(group)
        worst = min((f.status for f in findings), key=WORST.index)
        lines.append(f"{style.mark(worst)} {category:<16} {_counts(findings)}")
        for each in findings:
            if verbose or each.status not in (Status.OK, Status.SKIP):
                lines += _entry(each, report, style)
    if report.drift:
        lines += ["", "the parts differ in", *_drift(report)]
    lines += ["", _last(report, style)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def short(report: Report, style: Style) -> str:
    """What is not well, a line each, and the verdict."""
    lines = [f"{style.mark(f.status)} {f.id} {_sentence(f)}" for f in report.problems()]
    return "\n".join([*lines, _last(report, style)]) + "\n"


def json_text(report: Report, style: Style) -> str:
    return report.to_json() + "\n"


def junit(report: Report, style: Style) -> str:
    """A test case a check, for CI systems."""
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
    kinds = {Status.ERROR: "failure", Status.UNKNOWN: "error", Status.CRASH: "error", Status.SKIP: "skipped"}
    for each in report.checks:
        seconds = f"{each.duration_ms / 1000:.4f}"
        case = ElementTree.SubElement(suite, "testcase", classname=each.category, name=f"{each.id} {each.name}")
        case.set("time", seconds)
        if each.status in kinds:
            result = ElementTree.SubElement(case, kinds[each.status], message=_sentence(each))
            result.text = each.fix.text(report.node.runtime) or None
        elif each.status == Status.WARN:
            ElementTree.SubElement(case, "system-out").text = f"warning: {_sentence(each)}"
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def prometheus(report: Report, style: Style) -> str:
    """For node_exporter's text file collector; the server exposes the same names itself."""
    registry = CollectorRegistry()
    status = Gauge(
        "rtp_llm_doctor_check_status",
        "0 ok, 1 warning, 2 error, 3 unknown, -1 skipped",
        ["check", "part"],
        registry=registry,
    )
    part = "" if report.node.part is None else str(report.node.part)
    for each in report.checks:
        status.labels(check=each.id, part=part).set(STATUS_NUMBERS[each.status])
    Gauge("rtp_llm_doctor_last_run_timestamp_seconds", "When", registry=registry).set(report.started)
    Gauge("rtp_llm_doctor_duration_seconds", "How long", registry=registry).set(report.duration_s)
    return generate_latest(registry).decode()


FORMATS: dict[str, Callable[[Report, Style], str]] = {
    "table": table,
    "short": short,
    "json": json_text,
    "junit": junit,
    "prom": prometheus,
}


def _title(report: Report) -> str:
    node = report.node
    words = [f"rtp-llm-doctor {report.tool_version}"]
    if node.part is not None:
        who = f"part{node.part} of {node.parts}" + (f" ({node.name})" if node.parts and node.parts > 1 else "")
        ranks = f"rank {node.ranks[0]}" if len(node.ranks) == 1 else f"ranks {node.ranks[0]}-{node.ranks[-1]}"
        words.append(f"{who}, {ranks} on {node.device}")
    facts = [f"{'' if name == 'gpus' else name + ' '}{value}" for name, value in node.facts.items()]
    return "   ".join([*words, ", ".join([node.runtime.value, *facts])])


def _sentence(finding: Finding) -> str:
    return f"{finding.actual}; expected {finding.expected}" if finding.expected else finding.actual


def _entry(finding: Finding, report: Report, style: Style) -> list[str]:
    lines = _wrap(f"  {style.symbols[finding.status]} {finding.id:<5}", _sentence(finding))
    lines[0] = lines[0].replace(style.symbols[finding.status], style.mark(finding.status), 1)
    if finding.status not in (Status.WARN, Status.ERROR):
        return lines
    if finding.symptom:
        lines += _wrap("          seen as ", f'"{finding.symptom[0]}"')
    for number, row in enumerate(finding.fix.text(report.node.runtime).splitlines()):
        lines += _wrap("          fix     " if number == 0 else "                  ", row)
    return [*lines, f"          more    rtp-llm-doctor explain {finding.id}"]


def _wrap(head: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, WIDTH - len(head), break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{head if n == 0 else ' ' * len(head)}{line}" for n, line in enumerate(wrapped)]


def _counts(findings: list[Finding]) -> str:
    found = [(sum(f.status == status for f in findings), one, many) for status, one, many in COUNT_WORDS]
    return ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in found if count)


def _drift(report: Report) -> list[str]:
    return [f"  {d.key}: " + "   ".join(f"{part}={value}" for part, value in d.values.items()) for d in report.drift]


def _last(report: Report, style: Style) -> str:
    words = {"ok": "ready", "warn": "ready, with warnings", "error": "not ready", "incomplete": "incomplete"}
    colours = {"ok": "32", "warn": "33", "error": "31", "incomplete": "35"}
    verdict = style.paint(words[report.verdict], f"1;{colours[report.verdict]}")
    return f"{verdict}: {_counts(report.checks)} in {report.duration_s:.1f} s (exit {report.exit_code})"


def write(text: str, stream: TextIO = sys.stdout) -> None:
    """A reader that closes its end early (`| head`) is no error."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
