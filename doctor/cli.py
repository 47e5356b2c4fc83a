"""The command line of `rtp-llm-doctor`."""

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

from doctor import checks as _checks  # noqa: F401  # registers all checks
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
    """The command line is invalid."""


class _DoctorParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith(("unrecognized", "argument command")):
            message += "; the server's flags follow after `--`"
        raise UsageError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs rtp-llm-doctor with command-line `arguments` (default: sys.argv[1:]). Returns the exit code, a
    DoctorExitCode.

    Prints results to stdout, and errors and progress to stderr.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _ensure_standard_streams()
    try:
        doctor_flags, server_flags = _split(arguments)
        try:
            return _run(_parser().parse_intermixed_args(doctor_flags), server_flags)
        finally:
            write("")  # flushes argparse's output (--help), so that a failed write is reported below
    except UsageError as error:
        return _print_error(str(error))
    except (OSError, FatalError) as error:
        return _print_error(f"cannot run: {error}")
    except KeyboardInterrupt:
        return DoctorExitCode.CANNOT_RUN
    except Exception:  # Python would exit with 1, which means that checks found errors
        return _print_error(f"cannot run:\n{traceback.format_exc().rstrip()}")


def _print_error(text: str) -> DoctorExitCode:
    with suppress(OSError):  # stderr may be closed or full
        write(f"rtp-llm-doctor: {text}\n", sys.stderr)
    return DoctorExitCode.CANNOT_RUN


def _ensure_standard_streams() -> None:
    """Opens /dev/null for closed standard streams, which Python represents as None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # open until exit


def parse_seconds(text: str) -> float:
    """Returns the value of --wait as a number of seconds. Raises argparse.ArgumentTypeError unless `text` is a finite
    number, 0 or more.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: a number of seconds, 0 or more")
    return value


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns (the doctor's arguments, the server's flags, which follow after `--`)."""
    if "--" not in arguments:
        return arguments, []
    index = arguments.index("--")
    return arguments[:index], arguments[index + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = _DoctorParser(
        prog="rtp-llm-doctor",
        description="Finds problems of this machine, the configuration and the gang, and prints how to fix them. After"
        " `--`: the server's flags. Exit codes: 0 ready, 1 an error, 2 could not run, 3 incomplete.",
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", default="node", choices=COMMANDS, help="default: node")
    parser.add_argument("argument", nargs="?", default="", help="id for explain, file or - for explain-log")
    parser.add_argument(
        "--tier", type=int, choices=TIERS, help="0 reads settings and files, 1 uses GPUs and disk, 2 gang, 3 all-reduce"
    )
    parser.add_argument("-o", "--output", choices=FORMATS, default="table", help="format of the report")
    parser.add_argument("-v", "--verbose", action="store_true", help="also show checks that are ok")
    parser.add_argument(
        "--only",
        default="",
        metavar="IDS",
        help="comma-separated check ids or categories to run; an error if the selected tiers do not contain them",
    )
    parser.add_argument(
        "--ignore", default="", metavar="IDS", help="comma-separated check ids whose errors count as warnings"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 on warnings")
    parser.add_argument(
        "--wait", type=parse_seconds, default=30.0, metavar="S", help="seconds to wait for other parts (30)"
    )
    parser.add_argument("--fix", choices=("shm",), help="shm: remove orphaned segments of this server")
    parser.add_argument("--bundle", metavar="FILE", help="write report, settings and logs without secrets to a .tgz")
    parser.add_argument("--run-dir", default="", metavar="DIR", help="attach: the running part's RTP_RUN_DIR")
    parser.add_argument(
        "--starting", action="store_true", help="the server starts next: ports in use by a running part are an error"
    )
    parser.add_argument("--save", metavar="FILE", help="also write the JSON report to a file")
    return parser


def _run(args: argparse.Namespace, server_flags: list[str]) -> int:
    if args.argument and args.command not in ("explain", "explain-log"):
        raise UsageError(f"{args.command} takes no argument {args.argument!r}")
    simple = {"list": _list, "explain": _explain, "attach": _attach, "schema": _schema, "manual": _manual}
    if args.command in simple:
        return simple[args.command](args)
    if args.command == "explain-log":
        return _explain_log(args, server_flags)
    if args.fix:
        _fix_shm()
    return _report(args, server_flags, select(args.only, _selected_tiers(args)))


def _tier(args: argparse.Namespace) -> int:
    tier = args.tier or 0
    return max(tier, 2) if args.command == "gang" else tier


def _selected_tiers(args: argparse.Namespace) -> set[int]:
    """Returns the tiers (groups of checks, numbered from the cheapest) to run: all up to --tier.

    Without the command `gang`, --tier 3 excludes tier 2, which needs the doctors of all parts.
    """
    tier = _tier(args)
    return {t for t in range(tier + 1) if t != 2 or tier == 2 or args.command == "gang"}


def _report(args: argparse.Namespace, server_flags: list[str], checks: list[Check] | None) -> int:
    options = RunOptions(
        tier=_tier(args),
        gang=2 in _selected_tiers(args),
        only=checks,
        ignore=tuple(_parse_ids(args.ignore)),
        strict=args.strict,
        wait=args.wait,
        starting=args.starting,
    )
    report = run_doctor(Host(), server_flags, options, lambda text: print(text, file=sys.stderr, flush=True))
    style = Style.for_stream(sys.stdout)
    verbose_table = args.output == "table" and args.verbose
    write(table(report, style, verbose=True) if verbose_table else FORMATS[args.output](report, style))
    if args.save:
        report.save(Path(args.save))
    if args.bundle:
        names = write_bundle(Path(args.bundle), report, Host(), args.run_dir)
        print(f"{args.bundle}: {', '.join(names)}; read it before you pass it on", file=sys.stderr)
    return report.exit_code


def select(only: str, tiers: Container[int] = (0,)) -> list[Check] | None:
    """Returns the checks that --only names, by id or category, and the checks that these need. Returns None, which
    means all checks, if `only` is empty.

    `tiers`: the groups of checks that this run includes (--tier). Raises UsageError if a name does not exist, or if
    none of its checks is in `tiers`: a report without these checks would look as if they had passed.
    """
    names = sorted({name.strip().upper() for name in only.split(",")} - {""})
    if not names:
        return None
    matches = {name: [c for c in REGISTRY.values() if name in (c.id, c.category.upper())] for name in names}
    unknown = [name for name, checks in matches.items() if not checks]
    if unknown:
        raise UsageError(f"--only: no check or category {', '.join(unknown)}; `rtp-llm-doctor list` shows all")
    excluded = [c for checks in matches.values() if all(c.tier not in tiers for c in checks) for c in checks]
    if excluded:
        ids = {tier: ", ".join(c.id for c in excluded if c.tier == tier) for tier in sorted({c.tier for c in excluded})}
        raise UsageError("; ".join(f"to run {ids[tier]}, use {_command_for_tier(tier)}" for tier in ids))
    return with_dependencies([c for checks in matches.values() for c in checks])


def _command_for_tier(tier: int) -> str:
    return "`rtp-llm-doctor gang` on every part" if tier == 2 else f"--tier {tier}"


def with_dependencies(checks: Sequence[Check]) -> list[Check]:
    """Returns the checks and those that they need, directly or indirectly, in the order of the report."""
    ids: set[str] = set()
    pending = [c.id for c in checks]
    while pending:
        id = pending.pop()
        if id not in ids:
            ids.add(id)
            pending += REGISTRY[id].needs
    return [c for c in REGISTRY.values() if c.id in ids]


def _parse_ids(text: str) -> list[str]:
    """Parses a comma-separated list of check ids. Raises UsageError if one does not exist."""
    ids = [id.strip().upper() for id in text.split(",") if id.strip()]
    unknown = [id for id in ids if id not in REGISTRY]
    if unknown:
        raise UsageError(f"--ignore: no check {', '.join(unknown)}; `rtp-llm-doctor list` shows all")
    return ids


def _list(args: argparse.Namespace) -> int:
    if args.output not in ("table", "json"):
        raise UsageError(f"--output={args.output} is not available for `list` (choose from 'table', 'json')")
    if args.output == "json":
        rows = [
            {"id": c.id, "category": c.category, "tier": c.tier, "severity": c.severity, "title": c.title}
            for c in REGISTRY.values()
        ]
        write(json.dumps(rows, indent=1) + "\n")
    else:
        write("".join(f"{c.id:<5} {c.tier}  {c.severity:<5}  {c.category:<14} {c.title}\n" for c in REGISTRY.values()))
    return DoctorExitCode.READY


def _explain(args: argparse.Namespace) -> int:
    if not args.argument:
        raise UsageError("explain needs the id of a check; `rtp-llm-doctor list` shows all")
    if args.argument.upper() not in REGISTRY:
        raise UsageError(f"explain: no check {args.argument!r}; `rtp-llm-doctor list` shows all")
    write(explain(REGISTRY[args.argument.upper()]))
    return DoctorExitCode.READY


def _explain_log(args: argparse.Namespace, server_flags: list[str]) -> int:
    if not args.argument:
        raise UsageError("explain-log needs a file, or - for stdin")
    matches = find_symptoms(_log_text(args.argument))
    if not matches:
        print(
            "no line of this log is a known symptom; `rtp-llm-doctor` checks the machine itself",
            file=sys.stdout if args.output == "table" else sys.stderr,
        )
        return DoctorExitCode.READY if args.output == "table" else _report(args, server_flags, None)
    if args.output == "table":
        tiers = _selected_tiers(args)
        lines = (f"line {m.number}: {_redacted_line(m)}\n  {_check_label(m.check, tiers)}\n" for m in matches)
        write("".join(lines) + "\n")
    return _report(args, server_flags, with_dependencies([match.check for match in matches]))


def _log_text(name: str) -> str:
    """Returns the text of a file, of stdin (if `name` is "-"), or of a FIFO that is open for writing, such as a shell's
    <(…).

    Raises UsageError for other file types and for a FIFO without a writer, which would block forever.
    """
    if name == "-":
        return sys.stdin.read()
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        file_type = stat.S_IFMT(os.fstat(fd).st_mode)
        if file_type not in (stat.S_IFREG, stat.S_IFIFO):
            raise UsageError(f"explain-log: {name} is not a regular file; `explain-log -` reads stdin")
        first = _read_available(fd)
        if file_type == stat.S_IFIFO and first == b"":
            raise UsageError(f"explain-log: {name} is a FIFO without a writer; start the writer first")
        os.set_blocking(fd, True)
        with os.fdopen(fd, "rb", closefd=False) as stream:
            return ((first or b"") + stream.read()).decode(errors="replace")
    finally:
        os.close(fd)


def _read_available(fd: int) -> bytes | None:
    """Returns up to 64 KiB without blocking: empty at the end of the file or if a FIFO has no writer, None if a writer
    has written nothing yet."""
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return None


def _redacted_line(match: SymptomMatch) -> str:
    """Returns the log line without secrets and without terminal escape sequences."""
    secrets = [value for name, value in os.environ.items() if is_secret(name)]
    return escape_unprintable(redact(match.line, secrets))[:160]


def _check_label(check: Check, tiers: Container[int]) -> str:
    hint = "" if check.tier in tiers else f" (needs {_command_for_tier(check.tier)})"
    return f"{check.id} {check.title}{hint}"


def _attach(args: argparse.Namespace) -> int:
    return attach(args.run_dir)


def _schema(args: argparse.Namespace) -> int:
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    write(json.dumps(dialect | Report.model_json_schema(mode="serialization"), indent=1) + "\n")
    return DoctorExitCode.READY


def _manual(args: argparse.Namespace) -> int:
    write(manual())
    return DoctorExitCode.READY


def _fix_shm() -> None:
    removed = remove_orphans(Host())
    total = format_bytes(sum(orphan.bytes for orphan in removed))
    names = "".join(f"\n  {orphan.name}" for orphan in removed)
    print(f"--fix shm: removed {len(removed)} orphaned segments, {total}{names}", file=sys.stderr)
