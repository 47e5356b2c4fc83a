"""What the doctor can say without looking at anything: a check explained, a log read for symptoms, the manual page."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from doctor import checks  # noqa: F401  # registers them
from doctor.check import REGISTRY, Check

EXIT_CODES = {
    64: ("M-14", "C-01", "C-02", "M-08"),
    65: ("M-04", "M-05", "M-06", "M-07", "M-12"),
    69: ("C-09", "N-01", "C-01", "C-02"),
    71: ("N-01", "N-02", "N-03"),
    72: ("N-02", "P-01", "C-06"),
    73: ("G-04", "G-14", "G-15", "G-16"),
}


@dataclass(frozen=True)
class Hit:
    """A line of a log and the check that it speaks of."""

    number: int
    line: str
    check: Check


def read_log(text: str) -> list[Hit]:
    """The first line for each check whose symptom is in the text, in order of lines."""
    patterns = [(check, symptom.pattern) for check in REGISTRY.values() for symptom in check.symptoms]
    found: dict[str, Hit] = {}
    for number, line in enumerate(text.splitlines(), 1):
        for check, pattern in patterns:
            if check.id not in found and pattern.search(line):
                found[check.id] = Hit(number, line.strip(), check)
        for id in _by_exit_code(line):
            found.setdefault(id, Hit(number, line.strip(), REGISTRY[id]))
    return sorted(found.values(), key=lambda hit: hit.number)


def _by_exit_code(line: str) -> Iterable[str]:
    """This server's own codes, as its guard and the container's runtime print them."""
    for code in re.findall(r"\bexit(?:ed)?[ _]?(?:with )?(?:code|status)[ :=]+(\d+)", line, re.IGNORECASE):
        yield from EXIT_CODES.get(int(code), ())


def explain(check: Check) -> str:
    """All that is known of a check, as text."""
    lines = [f"{check.id}  {check.title}", f"category {check.category}, tier {check.tier}, {check.severity}", ""]
    lines += [check.explanation]
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
