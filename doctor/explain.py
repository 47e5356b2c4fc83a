"""What the doctor can say without looking at anything: a check explained, a log read for symptoms, the manual page."""

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from doctor import checks  # noqa: F401  # registers them
from doctor.check import REGISTRY, Check
from rtp_llm.errors import ExitCode

WIDTH = 100
# This server's own codes: what each of them may come from.
EXIT_CODES = {
    64: ("M-14", "C-01", "C-02", "M-08"),
    65: ("M-04", "M-05", "M-06", "M-07", "M-12"),
    69: ("C-09", "N-01", "C-01", "C-02"),
    71: ("N-01", "N-02", "N-03"),
    72: ("N-02", "P-01", "C-06"),
    73: ("G-04", "G-14", "G-15", "G-16"),
}
# Of processes that the kernel ended: SIGBUS, and SIGKILL where memory ran out.
KILLED = {135: "S-01", -7: "S-01", 137: "L-05", -9: "L-05"}
KILLED_WORDS = {"Signal 7 (SIGBUS)": "S-01", "Signal 9 (SIGKILL)": "L-05", "(killed by a signal)": "L-05"}
EXIT_CODE_TEXT = re.compile(
    r"\bexit(?:ed)?[ _]?(?:with )?(?:code|status)\"?[ :=]+(-?\d+)|\bExited \((\d+)\)", re.IGNORECASE
)
# What this server says while all is well, in either form of its log, behind whatever a runtime puts before it.
INFO_LINE = re.compile(
    r"\[(?:start_server|part\d[^\]]*)\] [\d:]+ (?:INFO|DEBUG) |\{\"time\": .*\"level\": \"(?:INFO|DEBUG)\""
)
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
WAITING_TEXT, FORMED_TEXT = "waiting for part", "ranks are here and agree"


@dataclass(frozen=True)
class SymptomMatch:
    """A line of a log and the check that it speaks of."""

    number: int
    line: str
    check: Check


def find_symptoms(text: str) -> list[SymptomMatch]:
    """The first line for each check whose symptom is in the text, in order of lines.

    That this server waits for a part is a symptom only where nothing tells that it came. Its exit code says less than
    any message: the last one names its checks where nothing else names any.
    """
    patterns = [(c, max(re.split("[… ]", s.text), key=len), s.pattern) for c in REGISTRY.values() for s in c.symptoms]
    found: dict[str, SymptomMatch] = {}
    waiting: dict[str, SymptomMatch] = {}
    last: tuple[int, str, tuple[str, ...]] = (0, "", ())
    for number, raw in enumerate(text.splitlines(), 1):
        line = COLOUR.sub("", raw).strip().replace('\\"', '"')  # a line of JSON
        into = found
        if INFO_LINE.search(line):
            if FORMED_TEXT in line:
                waiting.clear()
            if WAITING_TEXT not in line:
                continue
            into = waiting
        for check, word, pattern in patterns:
            if word in line and check.id not in into and pattern.search(line):  # `in` alone is fast
                into[check.id] = SymptomMatch(number, line, check)
        for id in _killed(line):
            into.setdefault(id, SymptomMatch(number, line, REGISTRY[id]))
        own = [code for code in _exit_codes(line) if code in list(ExitCode)]
        last = (number, line, EXIT_CODES.get(own[-1], ())) if own else last
    hits = waiting | found or {id: SymptomMatch(last[0], last[1], REGISTRY[id]) for id in last[2]}
    return sorted(hits.values(), key=lambda hit: hit.number)


def _exit_codes(line: str) -> list[int]:
    """As this server's guard, container runtimes and torch print them."""
    return [int(code or other) for code, other in EXIT_CODE_TEXT.findall(line)]


def _killed(line: str) -> Iterable[str]:
    """The checks for what the kernel ends a process for."""
    yield from (KILLED[code] for code in _exit_codes(line) if code in KILLED)
    yield from (id for words, id in KILLED_WORDS.items() if words in line)


def explain(check: Check) -> str:
    """All that is known of a check, as text."""
    lines = [f"{check.id}  {check.title}", f"category {check.category}, tier {check.tier}, {check.severity}", ""]
    lines += ["\n\n".join(textwrap.fill(part, WIDTH) for part in check.explanation.split("\n\n"))]
    if check.symptoms:
        lines += ["", "Seen in logs as:", *(f"  {symptom.text}" for symptom in check.symptoms)]
    if check.needs:
        lines += ["", f"Is not asked where one of these found an error: {', '.join(check.needs)}"]
    return "\n".join(lines) + "\n"


def manual() -> str:
    """docs/doctor.md."""
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
rtp-llm-doctor gang [--wait 30]     on every part at once: tries the network between them, and compares them
rtp-llm-doctor --tier 3             also forms the process group and sums numbers (with `gang`: over all parts)
rtp-llm-doctor -- --tp_size 2       with the server's flags
rtp-llm-doctor list | explain S-01 | explain-log server.log | attach | schema
rtp-llm-doctor -o table|short|json|junit|prom   --only IDS  --ignore IDS  --strict  --fix shm  --bundle out.tgz
```

It reads the environment and the files that the server would read, with the server's own code. Exit codes: **0** ready
(warnings allowed) · **1** an error · **2** the doctor could not run · **3** incomplete: a part is absent, or something
could not be read. `--strict` makes warnings 1. `start_server` runs it before anything else starts: `RTP_DOCTOR=warn`
only logs what it finds, `off` leaves it out.

A check that depends on another is skipped where that found an error, so the first red line is the cause. Checks run in
a process that is killed when one hangs; what cannot be read is unknown, and never green.
"""
