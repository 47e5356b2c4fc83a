"""`rtp-llm-doctor`: the command line."""

import argparse
import json
import math
import os
import stat
import sys
import traceback
from collections.abc import Container, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from doctor import checks  # noqa: F401  # registers them
from doctor.attach import attach
from doctor.bundle import redact, write_bundle
from doctor.check import REGISTRY, Check
from doctor.examine import RunOptions, run_doctor
from doctor.explain import SymptomMatch, explain, find_symptoms, manual
from doctor.host import Host, format_bytes, is_secret
from doctor.orphans import remove_orphans
from doctor.render import FORMATS, Style, table, write
from doctor.report import DoctorExitCode, Report, escape_unprintable
from rtp_llm.errors import FatalError

COMMANDS = ("node", "gang", "list", "explain", "explain-log", "attach", "schema", "manual")
TIERS = range(4)


class UsageError(Exception):
    """The command line asks for something that does not exist."""


class _DoctorParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        server = (
            "; the server's flags follow after `--`" if message.startswith(("unrecognized", "argument command")) else ""
        )
        raise UsageError(message + server)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code. What was asked for goes to stdout, everything else to stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _ensure_standard_streams()
    try:
        own, server = _split(words)
        try:
            return _run(_parser().parse_intermixed_args(own), server)
        finally:
            write("")  # what argparse has printed; where it cannot be written, that is an error as any other
    except UsageError as error:
        return _print_error(str(error))
    except (OSError, FatalError) as error:
        return _print_error(f"cannot run: {error}")
    except KeyboardInterrupt:
        return DoctorExitCode.CANNOT_RUN
    except Exception:  # Python would end with 1, which means that errors were found
        return _print_error(f"cannot run:\n{traceback.format_exc().rstrip()}")


def _print_error(text: str) -> DoctorExitCode:
    """On stderr; where that takes nothing there is nobody left to tell."""
    with suppress(OSError):
        write(f"rtp-llm-doctor: {text}\n", sys.stderr)
    return DoctorExitCode.CANNOT_RUN


def _ensure_standard_streams() -> None:
    """Who starts this without a stdin or a stdout asks for the exit code alone: Python has None in their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # as long as the process


def seconds(text: str) -> float:
    """Of --wait."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a float from 0, in seconds")
    return value


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The doctor's own words, and after `--` the server's flags."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = _DoctorParser(
        prog="rtp-llm-doctor",
        description="Says what is wrong with this machine, this plan and this gang, and what to type. After `--`: the"
        " server's flags. Exit codes: 0 ready, 1 an error, 2 could not run, 3 incomplete.",
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", default="node", choices=COMMANDS, help="what to do (default: node)")
    parser.add_argument("argument", nargs="?", default="", help="id for explain, file or - for explain-log")
    parser.add_argument("--tier", type=int, choices=TIERS, help="0 static, 1 uses GPUs and disk, 2 gang, 3 collective")
    parser.add_argument("-o", "--output", choices=FORMATS, default="table", help="form of the report")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what is well, too")
    parser.add_argument(
        "--only",
        default="",
        metavar="IDS",
        help="checks, or categories as far as the tier reaches, with commas between; one that it does not reach is"
        " refused",
    )
    parser.add_argument("--ignore", default="", metavar="IDS", help="checks whose errors count as warnings")
    parser.add_argument("--strict", action="store_true", help="warnings end with 1")
    parser.add_argument("--wait", type=seconds, default=30.0, metavar="S", help="seconds to wait for other parts (30)")
    parser.add_argument("--fix", choices=("shm",), help="shm: remove abandoned segments of this server, and no others")
    parser.add_argument("--bundle", metavar="FILE", help="write report, settings and logs, secrets left out, to a .tgz")
    parser.add_argument("--run-dir", default="", metavar="DIR", help="attach: the running part's RTP_RUN_DIR")
    parser.add_argument("--starting", action="store_true", help="a start follows: a part that runs here is in its way")
    parser.add_argument("--save", metavar="FILE", help="also write the JSON report to a file")
    return parser


def _run(asked: argparse.Namespace, server: list[str]) -> int:
    simple = {"list": _list, "explain": _explain, "attach": _attach, "schema": _schema, "manual": _manual}
    if asked.argument and asked.command not in ("explain", "explain-log"):
        raise UsageError(f"{asked.command} takes no argument {asked.argument!r}")
    if asked.command in simple:
        return simple[asked.command](asked)
    if asked.command == "explain-log":
        return _explain_log(asked, server)
    if asked.fix:
        _fix_shm()
    return _report(asked, server, select(asked.only, _selected_tiers(asked)))


def _tier(asked: argparse.Namespace) -> int:
    tier = asked.tier or 0
    return max(tier, 2) if asked.command == "gang" else tier


def _selected_tiers(asked: argparse.Namespace) -> set[int]:
    """The tiers that are examined: what the parts say together is not asked of one of them alone."""
    tier = _tier(asked)
    return {t for t in range(tier + 1) if t != 2 or tier == 2 or asked.command == "gang"}


def _report(asked: argparse.Namespace, server: list[str], chosen: list[Check] | None) -> int:
    wanted = RunOptions(
        tier=_tier(asked),
        gang=2 in _selected_tiers(asked),
        only=chosen,
        ignore=tuple(_known(asked.ignore)),
        strict=asked.strict,
        wait=asked.wait,
        starting=asked.starting,
    )
    report = run_doctor(Host(), server, wanted, lambda text: print(text, file=sys.stderr, flush=True))
    _print_report(asked, report)
    if asked.save:
        save(report, Path(asked.save))
    if asked.bundle:
        names = write_bundle(Path(asked.bundle), report, Host(), asked.run_dir)
        print(f"{asked.bundle}: {', '.join(names)}; read it before you pass it on", file=sys.stderr)
    return report.exit_code


def _print_report(asked: argparse.Namespace, report: Report) -> None:
    style = Style.for_stream(sys.stdout)
    write(
        table(report, style, True)
        if asked.output == "table" and asked.verbose
        else FORMATS[asked.output](report, style)
    )


def save(report: Report, path: Path) -> None:
    """Whole or not at all: the API process reads it at any time."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(report.to_json())
    scratch.replace(path)


def select(only: str, reach: Container[int] = (0,)) -> list[Check] | None:
    """The checks that --only names, by id or category, with what they need; None for all. Raises UsageError where the
    tiers in `reach` hold nothing of a word: what was not looked at must not be called ready."""
    words = sorted({word.strip().upper() for word in only.split(",")} - {""})
    if not words:
        return None
    named = {word: [c for c in REGISTRY.values() if word in (c.id, c.category.upper())] for word in words}
    unknown = [word for word, found in named.items() if not found]
    if unknown:
        raise UsageError(f"no check or category {', '.join(unknown)}; `rtp-llm-doctor list` shows them")
    beyond = [c for found in named.values() if all(c.tier not in reach for c in found) for c in found]
    if beyond:
        raise UsageError(
            f"{', '.join(c.id for c in beyond)}: asked by {_command_for_tier(min(c.tier for c in beyond))}"
        )
    return with_dependencies([c for found in named.values() for c in found])


def _command_for_tier(tier: int) -> str:
    return "`rtp-llm-doctor gang` on every part" if tier == 2 else f"--tier {tier}"


def with_dependencies(chosen: Sequence[Check]) -> list[Check]:
    """The checks and, before them, whatever must be well for them to mean anything; in the registry's order."""
    ids: set[str] = set()
    pending = [c.id for c in chosen]
    while pending:
        id = pending.pop()
        if id not in ids:
            ids.add(id)
            pending += REGISTRY[id].needs
    return [c for c in REGISTRY.values() if c.id in ids]


def _known(text: str) -> list[str]:
    ids = [word.strip().upper() for word in text.split(",") if word.strip()]
    unknown = [id for id in ids if id not in REGISTRY]
    if unknown:
        raise UsageError(f"no check {', '.join(unknown)}; `rtp-llm-doctor list` shows them")
    return ids


def _list(asked: argparse.Namespace) -> int:
    if asked.output not in ("table", "json"):
        raise UsageError(f"list has no form {asked.output} (choose from 'table', 'json')")
    if asked.output == "json":
        rows = [
            {"id": c.id, "category": c.category, "tier": c.tier, "severity": c.severity, "title": c.title}
            for c in REGISTRY.values()
        ]
        write(json.dumps(rows, indent=1) + "\n")
    else:
        write("".join(f"{c.id:<5} {c.tier}  {c.severity:<5}  {c.category:<14} {c.title}\n" for c in REGISTRY.values()))
    return DoctorExitCode.READY


def _explain(asked: argparse.Namespace) -> int:
    if not asked.argument:
        raise UsageError("explain needs the id of a check; `rtp-llm-doctor list` shows them")
    if asked.argument.upper() not in REGISTRY:
        raise UsageError(f"explain: no check {asked.argument!r}; `rtp-llm-doctor list` shows them")
    write(explain(REGISTRY[asked.argument.upper()]))
    return DoctorExitCode.READY


def _explain_log(asked: argparse.Namespace, server: list[str]) -> int:
    if not asked.argument:
        raise UsageError("explain-log needs a file, or - for stdin")
    hits = find_symptoms(_log_text(asked.argument))
    if not hits:
        print(
            "nothing in this log is a symptom that the doctor knows; `rtp-llm-doctor` looks at the machine itself",
            file=sys.stdout if asked.output == "table" else sys.stderr,
        )
        return DoctorExitCode.READY if asked.output == "table" else _report(asked, server, None)
    if asked.output == "table":
        write(
            "".join(
                f"line {hit.number}: {_redacted_line(hit)}\n  {_check_label(hit, _selected_tiers(asked))}\n"
                for hit in hits
            )
            + "\n"
        )
    return _report(asked, server, with_dependencies([hit.check for hit in hits]))


def _log_text(name: str) -> str:
    """Of a file, of stdin (-), or of a FIFO that somebody has open for writing, as a shell's <(…) is."""
    if name == "-":
        return sys.stdin.read()
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFIFO):
            raise UsageError(f"explain-log: {name} is no file that has an end; `explain-log -` reads stdin")
        first = _first_bytes(fd)
        if kind == stat.S_IFIFO and first == b"":
            raise UsageError(f"explain-log: {name} is a FIFO that nobody writes to")
        os.set_blocking(fd, True)
        with os.fdopen(fd, "rb", closefd=False) as stream:
            return ((first or b"") + stream.read()).decode(errors="replace")
    finally:
        os.close(fd)


def _first_bytes(fd: int) -> bytes | None:
    """What can be read at once; empty at the end, or where nobody writes, None where somebody has yet to."""
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return None


def _redacted_line(hit: SymptomMatch) -> str:
    """A log may hold secrets, and bytes that a terminal takes for orders."""
    secrets = [value for name, value in os.environ.items() if is_secret(name)]
    return escape_unprintable(redact(hit.line, secrets))[:160]


def _check_label(hit: SymptomMatch, reach: Container[int]) -> str:
    check = hit.check
    return f"{check.id} {check.title}" + ("" if check.tier in reach else f" (asked by {_command_for_tier(check.tier)})")


def _attach(asked: argparse.Namespace) -> int:
    return attach(asked.run_dir)


def _schema(asked: argparse.Namespace) -> int:
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    write(json.dumps(dialect | Report.model_json_schema(mode="serialization"), indent=1) + "\n")
    return DoctorExitCode.READY


def _manual(asked: argparse.Namespace) -> int:
    write(manual())
    return DoctorExitCode.READY


def _fix_shm() -> None:
    removed = remove_orphans(Host())
    total = format_bytes(sum(orphan.bytes for orphan in removed))
    names = "".join(f"\n  {orphan.name}" for orphan in removed)
    print(f"--fix shm: removed {len(removed)} abandoned segments, {total}{names}", file=sys.stderr)
