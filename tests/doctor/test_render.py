"""The exact text of every format of the report, for each runtime.

Times and versions are masked. After an intended change, regenerate the files and review the difference:

    REGENERATE_GOLDEN=1 python -m pytest tests/doctor/test_render.py && git diff tests/doctor/golden
"""

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from doctor.check import Status
from doctor.context import CheckContext
from doctor.host import DiskSpace
from doctor.render import ASCII, DEFAULT_WIDTH, UNICODE, Style, json_text, junit, prometheus, short, table, write
from doctor.report import DoctorExitCode, Drift, Report, make_report
from doctor.runtime import Runtime
from tests.doctor.faulty import FAULTS, NoDriver, faulty_report, without_timings
from tests.doctor.fixtures import FakeHost, run_context_checks

FOLDER = Path(__file__).parent / "golden"
PLAIN, COLOUR = Style(UNICODE, False), Style(UNICODE, True)
FORMATS: dict[str, Callable[[Report], str]] = {
    "table.txt": lambda report: table(report, PLAIN),
    "verbose.txt": lambda report: table(report, PLAIN, True),
    "colour.txt": lambda report: table(report, COLOUR),
    "ascii.txt": lambda report: through_ascii(table(report, Style(ASCII, False))),
    "short.txt": lambda report: short(report, PLAIN),
    "json": lambda report: json_text(report, PLAIN),
    "junit.xml": lambda report: junit(report, PLAIN),
    "prom": lambda report: prometheus(report, PLAIN),
}


class Terminal(io.TextIOWrapper):
    """A text stream that may be a terminal."""

    def __init__(self, encoding: str, tty: bool = False):
        self.bytes = io.BytesIO()
        self.tty = tty
        super().__init__(self.bytes, encoding=encoding)

    def isatty(self) -> bool:
        return self.tty


def through_ascii(text: str) -> str:
    stream = Terminal("ascii")
    write(text, stream)
    return stream.bytes.getvalue().decode("ascii")


@pytest.fixture(params=Runtime)
def report(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    return without_timings(faulty_report(tmp_path, request.param, monkeypatch))


@pytest.fixture
def healthy(tmp_path: Path) -> Report:
    ctx = CheckContext(FakeHost(tmp_path, {"START_PORT": "29400"}), nvml=NoDriver)
    return without_timings(make_report(ctx, run_context_checks(ctx), started=0.0))


def test_faulty_report_has_the_expected_problems(report: Report) -> None:
    assert {f.id: f.status for f in report.problems()} == FAULTS
    assert (report.verdict, report.exit_code) == ("error", DoctorExitCode.ERRORS)


def test_formats_equal_golden_files(report: Report) -> None:
    for name, render in FORMATS.items():
        path = FOLDER / f"{report.node.runtime}.{name}"
        if os.environ.get("REGENERATE_GOLDEN"):
            path.write_text(render(report))
        assert path.exists(), f"no {path}: see the docstring of this file"
        assert render(report) == path.read_text(), path.name


def test_every_golden_file_has_a_test() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{runtime}.{name}" for runtime in Runtime for name in FORMATS}


def test_problems_have_a_fix(report: Report) -> None:
    for finding in report.problems():
        if finding.status in (Status.WARN, Status.ERROR):
            assert finding.fix.text(report.node.runtime), finding.id
            assert finding.expected, finding.id
        assert not finding.actual.endswith("."), finding.id


@pytest.mark.parametrize("width", [72, 80, 120])
def test_lines_fit_the_terminal_and_fixes_are_not_wrapped(report: Report, width: int) -> None:
    lines = table(report, Style(UNICODE, False, width)).splitlines()
    fixes = [row for f in report.problems() for row in f.fix.text(report.node.runtime).splitlines()]
    for line in lines[:-1]:  # the verdict is always one line
        assert len(line) <= width or any(line.endswith(row) for row in fixes), line
    for row in fixes:
        assert any(line.endswith(row) for line in lines), row
    assert len(lines) < 70


def test_healthy_report_has_at_most_12_lines(healthy: Report) -> None:
    text = table(healthy, PLAIN)
    assert len(text.splitlines()) <= 12
    assert text.splitlines()[-1].startswith("ready: ")
    assert "explain" not in text


def test_verbose_shows_every_check(healthy: Report) -> None:
    text = table(healthy, PLAIN, verbose=True)
    assert all(f" {finding.id} " in text for finding in healthy.checks)


@pytest.mark.parametrize(
    ("encoding", "tty", "environ", "colour", "unicode"),
    [
        ("utf-8", True, {"TERM": "xterm"}, True, True),
        ("utf-8", True, {"TERM": "xterm", "NO_COLOR": "1"}, False, True),
        ("utf-8", True, {"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ("utf-8", True, {"TERM": "dumb"}, False, True),
        ("utf-8", False, {"TERM": "xterm"}, False, True),
        ("ascii", True, {"TERM": "xterm"}, True, False),
        ("latin-1", False, {}, False, False),
    ],
)
def test_style_follows_the_stream(
    encoding: str, tty: bool, environ: dict[str, str], colour: bool, unicode: bool
) -> None:
    style = Style.for_stream(Terminal(encoding, tty), environ)
    assert (style.colour, style.symbols is UNICODE) == (colour, unicode)


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("20", 72), ("400", 140)])
def test_width_follows_the_terminal(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert Style.for_stream(Terminal("utf-8", tty=True), {}).width == width
    assert Style.for_stream(Terminal("utf-8"), {}).width == DEFAULT_WIDTH


def test_colour_changes_no_text(report: Report) -> None:
    coloured = table(report, COLOUR)
    for code in ("1", "2", "31", "32", "33", "35", "1;31"):
        coloured = coloured.replace(f"\033[{code}m", "")
    assert coloured.replace("\033[0m", "") == table(report, PLAIN)


def test_unencodable_characters_are_replaced() -> None:
    assert through_ascii("√ docker run … ‼\n") == "? docker run ... ?\n"


def test_symbols_have_one_width_and_differ() -> None:
    for symbols in (UNICODE, ASCII):
        assert len({len(symbol) for symbol in symbols.values()}) == 1
        assert len(set(symbols.values())) == len(Status)


def test_drift_is_shown(healthy: Report) -> None:
    drift = [Drift(key="env.NCCL_ALGO", values={"part0": "Ring", "part1": "(unset)"})]
    text = table(healthy.model_copy(update={"drift": drift}), PLAIN)
    assert "the parts differ in\n  env.NCCL_ALGO: part0=Ring   part1=(unset)\n" in text


def test_many_gpus_take_one_line(healthy: Report) -> None:
    node = healthy.node.model_copy(update={"facts": {"gpus": "8 x NVIDIA H100 80GB HBM3", "cores": "192"}})
    lines = table(healthy.model_copy(update={"node": node}), PLAIN).splitlines()
    assert lines[0].endswith("docker, 8 x NVIDIA H100 80GB HBM3, cores 192")


@pytest.mark.parametrize("text", ["/models/\x1b[31mred", "/models/\udcff", "bell\a", "null\0"])
def test_unprintable_characters_are_escaped(tmp_path: Path, text: str) -> None:
    """A path may contain terminal escape sequences and bytes that are invalid in XML and JSON."""
    host = FakeHost(tmp_path, {"CHECKPOINT_PATH": text, "START_PORT": "29400"})
    host.spaces["/dev/shm"] = DiskSpace(64 << 20, 64 << 20, -1)
    ctx = CheckContext(host, nvml=NoDriver)
    report = make_report(ctx, run_context_checks(ctx, only=["M-08", "S-01"]), started=0.0)
    for render in FORMATS.values():
        if render is not FORMATS["colour.txt"]:
            assert render(report).replace("\n", "").isprintable()
