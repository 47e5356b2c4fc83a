"""Commands that do not inspect the machine: `explain`, `explain-log` and `manual`."""

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from doctor import checks as _checks  # noqa: F401  # registers all checks
from doctor.check import REGISTRY, Check
from rtp_llm.errors import ExitCode

WIDTH = 100
# Exit code of this server: ids of checks that may find the cause.
EXIT_CODES = {
    64: ("M-14", "C-01", "C-02", "M-08"),
    65: ("M-04", "M-05", "M-06", "M-07", "M-12"),
    69: ("C-09", "N-01", "C-01", "C-02"),
    71: ("N-01", "N-02", "N-03"),
    72: ("N-02", "P-01", "C-06"),
    73: ("G-04", "G-14", "G-15", "G-16"),
}
# Exit code of a process killed by SIGBUS (/dev/shm is full) or SIGKILL (out of memory): id of the check.
KILLED = {135: "S-01", -7: "S-01", 137: "L-05", -9: "L-05"}
KILLED_TEXT = {"Signal 7 (SIGBUS)": "S-01", "Signal 9 (SIGKILL)": "L-05", "(killed by a signal)": "L-05"}
EXIT_CODE_TEXT = re.compile(
    r"\bexit(?:ed)?[ _]?(?:with )?(?:code|status)\"?[ :=]+(-?\d+)|\bExited \((\d+)\)", re.IGNORECASE
)
# A log line of this server with level INFO or DEBUG, as text or JSON. The container runtime may add a prefix.
INFO_LINE = re.compile(
    r"\[(?:start_server|part\d[^\]]*)\] [\d:]+ (?:INFO|DEBUG) |\{\"time\": .*\"level\": \"(?:INFO|DEBUG)\""
)
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
WAITING_TEXT = "waiting for part"
FORMED_TEXT = re.compile(r"ranks are here and agree|ranks kept their weights")


@dataclass(frozen=True)
class SymptomMatch:
    """A line of a log that contains a symptom of `check`. `number`: the line's number, counted from 1."""

    number: int
    line: str
    check: Check


def find_symptoms(text: str) -> list[SymptomMatch]:
    """Searches the text of a log for symptoms: messages that show the problem which a check detects. Returns, for each
    check, the first line with one of its symptoms, sorted by line.

    A line "waiting for part…" counts only if no later line reports that all ranks joined. If no symptom matches, but
    the log contains an exit code of this server, returns the checks that may explain the last such code.
    """
    symptoms = [(c, max(re.split("[… ]", s.text), key=len), s.pattern) for c in REGISTRY.values() for s in c.symptoms]
    matches: dict[str, SymptomMatch] = {}
    waiting: dict[str, SymptomMatch] = {}
    by_exit_code: list[SymptomMatch] = []
    for number, raw_line in enumerate(text.splitlines(), 1):
        line = ANSI_COLOUR.sub("", raw_line).strip().replace('\\"', '"')  # quotes are escaped in JSON logs
        target = matches
        if INFO_LINE.search(line):
            if FORMED_TEXT.search(line):
                waiting.clear()
            if WAITING_TEXT not in line:
                continue
            target = waiting
        for check, longest_word, pattern in symptoms:
            # The substring test is much faster than the pattern.
            if longest_word in line and check.id not in target and pattern.search(line):
                target[check.id] = SymptomMatch(number, line, check)
        for id in _killed(line):
            target.setdefault(id, SymptomMatch(number, line, REGISTRY[id]))
        server_codes = [code for code in _exit_codes(line) if code in list(ExitCode)]
        if server_codes:
            ids = EXIT_CODES.get(server_codes[-1], ())
            by_exit_code = [SymptomMatch(number, line, REGISTRY[id]) for id in ids]
    all_matches = list((waiting | matches).values()) or by_exit_code
    return sorted(all_matches, key=lambda match: match.number)


def _exit_codes(line: str) -> list[int]:
    """Returns the exit codes that a log line reports in the words of this server, a container runtime or torch."""
    return [int(code or docker_code) for code, docker_code in EXIT_CODE_TEXT.findall(line)]


def _killed(line: str) -> Iterable[str]:
    """Yields the ids of checks that may explain why the kernel killed a process, if the line reports this."""
    yield from (KILLED[code] for code in _exit_codes(line) if code in KILLED)
    yield from (id for text, id in KILLED_TEXT.items() if text in line)


def explain(check: Check) -> str:
    """Returns the text that `rtp-llm-doctor explain ID` prints: title, explanation, symptoms, and needed checks."""
    lines = [f"{check.id}  {check.title}", f"category {check.category}, tier {check.tier}, {check.severity}", ""]
    lines += ["\n\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in check.explanation.split("\n\n"))]
    if check.symptoms:
        lines += ["", "Seen in logs as:", *(f"  {symptom.text}" for symptom in check.symptoms)]
    if check.needs:
        lines += ["", f"Skipped if one of these fails: {', '.join(check.needs)}"]
    return "\n".join(lines) + "\n"


def manual() -> str:
    """Returns the text of docs/doctor.md, which `rtp-llm-doctor manual` prints."""
    lines = [MANUAL_HEAD]
    for category, group in groupby(REGISTRY.values(), key=lambda check: check.category):
        lines.append(f"\n## {category.capitalize()}\n")
        for check in group:
            lines.append(f"### {check.id} {check.title}\n")
            lines.append(f"Tier {check.tier}, {check.severity}. {check.explanation}\n")
            lines += [f"- seen as `{symptom.text}`" for symptom in check.symptoms]
            lines += [""] if check.symptoms else []
    return "\n".join(lines).rstrip() + "\n"


MANUAL_HEAD = """\
# rtp-llm-doctor

Generated from the registry of checks by `rtp-llm-doctor manual`; do not edit.

```
rtp-llm-doctor                      this part: settings, plan, ports, memory, limits, GPUs, checkpoint; under a second
rtp-llm-doctor --tier 1             also computes on every GPU, verifies peer writes, reserves memory, reads the disk
rtp-llm-doctor gang [--wait 30]     on every part at once: probes the network between them, and compares settings
rtp-llm-doctor --tier 3             also forms the process group and runs an all-reduce (with `gang`: over all parts)
rtp-llm-doctor -- --tp_size 2       with the server's flags
rtp-llm-doctor list | explain S-01 | explain-log server.log | attach | schema
rtp-llm-doctor -o table|short|json|junit|prom   --only IDS  --ignore IDS  --strict  --fix shm  --bundle out.tgz
```

It reads the environment and the files that the server would read, with the server's own code. Exit codes: **0** ready
(warnings allowed) · **1** an error · **2** the doctor could not run · **3** incomplete: a part is absent, or a value
could not be read. `--strict` exits with 1 on warnings. `start_server` runs it before anything else starts:
`RTP_DOCTOR=warn` only logs its findings, `off` skips it.

A check is skipped if one that it depends on failed, so the first error in the report is the cause. Checks run in a
process that is killed if one hangs; a value that cannot be read is unknown, and its check does not pass.
"""
