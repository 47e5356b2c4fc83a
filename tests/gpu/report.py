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

PUBLISHED_RESULTS = ROOT / "docs" / "performance" / "gpu.json"
MAX_REASON_CHARS, MAX_DETAIL_LINES = 90, 15
FAILED_RESULTS = ("failed", "lost", "timeout", "not run")

Json = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Result of one test. `result`: passed, skipped, failed, lost (its process died), timeout, or not run."""

    group: str
    test: str
    result: str
    seconds: float = 0.0
    reason: str = ""
    detail: str = ""


def read_commit() -> str:
    """Returns the commit of this tree, with "+" if the tree has changes.

    Without git, returns RTP_TEST_COMMIT if it is set, else the commit that is recorded beside the downloaded wheels.
    """
    revision = _git("rev-parse", "--short=12", "HEAD")
    if revision:
        return revision + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    commit_file = WHEELS / "commit"
    return os.environ.get("RTP_TEST_COMMIT") or (commit_file.read_text() if commit_file.exists() else "unknown")


def _git(*args: str) -> str:
    try:
        completed = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return completed.stdout.strip() if completed.returncode == 0 else ""


def results_path(device: str) -> Path:
    """Returns the path for the JSON. By default, results of a CPU never overwrite GPU results."""
    path = os.environ.get("RTP_TEST_RESULTS")
    return Path(path) if path else PUBLISHED_RESULTS if device == "cuda" else BUILD / "gpu" / f"{device}.json"


def write_results(path: Path, machine: Json, results: Sequence[Result], speeds: Sequence[Json], seconds: float) -> None:
    content = {
        "commit": read_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine | {"python": platform.python_version()},
        "seconds": round(seconds, 1),
        "counts": dict(Counter(result.result for result in results)),
        "speeds": list(speeds),
        "results": [_result_to_json(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _result_to_json(result: Result) -> Json:
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(result).items() if v != ""}


def format_failures(results: Sequence[Result]) -> str:
    """Returns the last lines of output of each failed test."""
    blocks = []
    for result in results:
        if result.result in FAILED_RESULTS and result.detail:
            tail = "\n".join(result.detail.rstrip().splitlines()[-MAX_DETAIL_LINES:])
            blocks.append(f"--- {result.group} {result.test}\n{tail}\n")
    return "\n".join(blocks)


def format_results(results: Sequence[Result]) -> str:
    rows = [(r.group, r.test, r.result, f"{r.seconds:.1f}", _shorten(r.reason)) for r in results]
    return _format_columns([("group", "test", "result", "s", "reason"), *rows])


def format_speeds(speeds: Sequence[Json]) -> str:
    rows = [
        (s["name"], f"{s['ours']:.2f}", f"{s['transformers']:.2f}", s["unit"], f"{s['ratio']:.2f}", _format_floor(s))
        for s in speeds
    ]
    return _format_columns([("speed", "ours", "transformers", "unit", "times as fast", "floor"), *rows])


def _format_floor(speed: Mapping[str, Any]) -> str:
    return "" if speed["floor"] is None else f"{speed['floor']:.3f}"


def _format_columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _shorten(reason: str) -> str:
    return textwrap.shorten(" ".join(reason.split()), MAX_REASON_CHARS, placeholder=" …")
