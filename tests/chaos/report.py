"""Writes docs/reliability.md from the records."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

from tests.chaos.driver import Injection
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.health import HANG_SECONDS, SAMPLE_SECONDS
from tests.chaos.ledger import Outcome

HEAD = """\
# Reliability

What clients see when something fails, measured by `make chaos`: it runs the real processes on a small model with random
weights (two ranks on CPU, one thread each), keeps eight clients busy with streams, chats, long prompts and batches,
injects a fault at a random moment, and compares every response with an undisturbed run. The seconds are of machines
with {cores} cores, on which up to five such gangs and other work ran at a time: alone they are fewer. What holds
everywhere is the ledger: **lost** counts accepted requests that did not end exactly once with their undisturbed text,
where the fault permits it. With the API process its open connections are lost, and nothing else.

[reliability.jsonl](reliability.jsonl) has one line per injection: the seed with which it can be repeated, what was hit,
how the requests ended, and the times.

- **pause**: the longest silence of a stream that was in flight, in seconds, from the fault on (median / maximum). For
  faults that last for a while, it contains that time.
- **noticed**, **well**: from the fault until `/health` says something else than 200, and until it says 200 for good.
- **wrong**: seconds for which `/health` said 200 while a completion hung. It is asked every {sample:g} ms; a completion
  hangs if it takes more than {hang:g} s from then on.
- **unclean**: injections after which something else was wrong: a KV block held by nobody, a process that did not come
  back, or a process, port, file or exit code at the stop.

{summary}

| Fault | Injections | Requests | Lost | Cut | Refused | Pause | Noticed | Well | Wrong | Unclean |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def write(path: Path, injections: Iterable[Injection], skipped: Mapping[str, str]) -> None:
    """Writes the report. `skipped`: reasons by name of the fault."""
    by_fault: dict[str, list[Injection]] = {}
    for injection in injections:
        by_fault.setdefault(injection.fault, []).append(injection)
    rows = [_row(FAULTS[name], by_fault[name]) for name in FAULTS if name in by_fault]
    found = [injection for name in FAULTS for injection in by_fault.get(name, [])]
    requests, lost = sum(sum(i.outcomes.values()) for i in found), sum(i.lost for i in found)
    cores = " or ".join(str(number) for number in sorted({injection.cores for injection in found}))
    summary = f"**{len(found):,} faults of {len(rows)} kinds, {requests:,} requests, {lost:,} lost.**"
    text = (
        HEAD.format(sample=SAMPLE_SECONDS * 1000, hang=HANG_SECONDS, cores=cores, summary=summary)
        + "\n".join(rows)
        + "\n"
    )
    if missing := [f"- {FAULTS[name].text}: {reason}\n" for name, reason in skipped.items() if name not in by_fault]:
        text += "\nNot injected here:\n\n" + "".join(missing)
    path.write_text(text)


def _row(fault: Fault, injections: list[Injection]) -> str:
    outcomes: Counter[str] = Counter()
    for injection in injections:
        outcomes.update(injection.outcomes)
    unclean = sum(len(i.problems) > min(i.lost, len(i.problems)) for i in injections)
    cells = [
        fault.text,
        f"{len(injections)}",
        f"{outcomes.total():,}",
        f"{sum(i.lost for i in injections)}",
        f"{outcomes[Outcome.CUT]}",
        f"{outcomes[Outcome.REFUSED]}",
        _spread([i.pause for i in injections]),
        _spread([i.noticed for i in injections if i.noticed is not None]),
        _spread([i.healthy for i in injections]),
        _spread([i.wrong for i in injections]),
        f"{unclean}",
    ]
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    """Returns median and maximum; a dash without values."""
    return f"{median(values):.1f} / {max(values):.1f}" if values else "-"
