"""Formats the results as tables and as JSON. Imports the standard library only."""

import json
import os
import platform
import subprocess
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.gpu.environment import BUILD, ROOT, WHEELS

PUBLISHED = ROOT / "docs" / "performance" / "gpu.json"
REASON, DETAIL_LINES = 90, 15
FAILED = ("failed", "lost", "timeout", "not run")

Json = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One test. `result`: passed, skipped, failed, lost (its process died), timeout, or not run."""

    group: str
    test: str
    result: str
    seconds: float = 0.0
    reason: str = ""
    detail: str = ""


def commit() -> str:
    """Returns the commit of this tree, with a "+" if it has changes. Without git it is that of the wheels."""
    told = _git("rev-parse", "--short=12", "HEAD")
    if told:
        return told + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    note = WHEELS / "commit"
    return os.environ.get("RTP_TEST_COMMIT") or (note.read_text() if note.exists() else "unknown")


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def destination(device: str) -> Path:
    """Returns the path for the JSON. Results of a CPU never go to the file for GPU results by default."""
    chosen = os.environ.get("RTP_TEST_RESULTS")
    return Path(chosen) if chosen else PUBLISHED if device == "cuda" else BUILD / "gpu" / f"{device}.json"


def write(path: Path, machine: Json, results: Sequence[Result], speeds: Sequence[Json], seconds: float) -> None:
    content = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine | {"python": platform.python_version()},
        "seconds": round(seconds, 1),
        "counts": dict(Counter(result.result for result in results)),
        "speeds": list(speeds),
        "results": [_compact(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _compact(result: Result) -> Json:
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(result).items() if v != ""}


def details(results: Sequence[Result]) -> str:
    """Returns the last lines of each failure."""
    blocks = []
    for result in results:
        if result.result in FAILED and result.detail:
            end = "\n".join(result.detail.rstrip().splitlines()[-DETAIL_LINES:])
            blocks.append(f"--- {result.group} {result.test}\n{end}\n")
    return "\n".join(blocks)


def table(results: Sequence[Result]) -> str:
    rows = [(r.group, r.test, r.result, f"{r.seconds:.1f}", _short(r.reason)) for r in results]
    return _columns([("group", "test", "result", "s", "reason"), *rows])


def speed_table(speeds: Sequence[Json]) -> str:
    rows = [
        (s["what"], f"{s['ours']:.2f}", f"{s['transformers']:.2f}", s["unit"], f"{s['ratio']:.2f}", _floor(s))
        for s in speeds
    ]
    return _columns([("speed", "ours", "transformers", "unit", "times as fast", "floor"), *rows])


def _floor(speed: Mapping[str, Any]) -> str:
    return "" if speed["floor"] is None else f"{speed['floor']:.3f}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _short(reason: str) -> str:
    return textwrap.shorten(" ".join(reason.split()), REASON, placeholder=" …")
