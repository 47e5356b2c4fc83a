"""`rtp-llm-doctor attach`: what a running part is doing. Reads its run directory and /proc; disturbs nothing."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from doctor.host import Host, size_text
from doctor.orphans import SHM, orphans
from doctor.report import Exit
from rtp_llm.parallel.handover import Handover
from rtp_llm.parallel.plan import PlannedPort

STACK_SECONDS = 20.0
STALE_SECONDS = 3.0
STUCK_SECONDS = 10.0


def find_run_dirs() -> list[Path]:
    """Run directories of parts that are running here, newest first: by the command lines of their processes."""
    found: dict[Path, float] = {}
    for process in psutil.process_iter(["cmdline", "create_time"]):
        words = process.info["cmdline"] or []
        if "rtp_llm.api.main" in words:
            path = Path(words[words.index("rtp_llm.api.main") + 1])
            if (path / "part.json").exists():
                found[path] = process.info["create_time"]
    return sorted(found, key=lambda path: -found[path])


def is_running(start_port: int) -> bool:
    """Whether a part with this START_PORT runs here."""
    return any(Handover.load(folder).plan.start_port == start_port for folder in find_run_dirs())


def attach(run_dir: str) -> int:
    """Prints the state of a part; 1 where something of it is lost or stuck, 2 where there is none."""
    folders = [Path(run_dir)] if run_dir else find_run_dirs()
    if not folders or not (folders[0] / "part.json").exists():
        where = run_dir or f"among the processes here, nor in {tempfile.gettempdir()}"
        print(f"rtp-llm-doctor: no running part: {where}", file=sys.stderr)
        return Exit.CANNOT_RUN
    handover = Handover.load(folders[0])
    lines, healthy = describe(handover)
    print("\n".join(lines))
    return Exit.READY if healthy else Exit.ERRORS


def describe(handover: Handover) -> tuple[list[str], bool]:
    """(lines, whether all is well)."""
    plan = handover.plan
    board = _board(handover)
    lines = [f"{handover.who} of {plan.num_parts}, {plan.device}, state in {handover.run_dir}"]
    ranks, rank_ok = _ranks(plan.world_size, board)
    ports, ports_ok = _ports(plan.own_ports())
    lines += ["", "ranks", *ranks, "", "ports", *ports, "", "shared memory", *_memory()]
    stuck = [int(p["pid"]) for p in board["ranks"].values() if p["part"] == plan.part and p["idle_s"] > STUCK_SECONDS]
    if stuck:
        lines += ["", "stacks of the ranks that got nowhere", *_stacks(stuck)]
    return lines, rank_ok and ports_ok


def _board(handover: Handover) -> dict[str, Any]:
    path = handover.gang_board
    if not path.exists():
        return {"epoch": 0, "ranks": {}, "message": "nothing was posted yet", "age": 0.0}
    state: dict[str, Any] = json.loads(path.read_text())
    return state | {"age": max(0.0, time.time() - path.stat().st_mtime)}


def _ranks(world: int, board: Mapping[str, Any]) -> tuple[list[str], bool]:
    stale = board["age"] > STALE_SECONDS
    lines = [f"  epoch {board['epoch']}, as of {board['age']:.1f} s ago" + (" (stale)" if stale else "")]
    if board.get("message"):
        lines.append(f"  {board['message']}")
    well = not stale
    for number in range(world):
        pulse = board["ranks"].get(str(number))
        if pulse is None:
            lines.append(f"  rank {number}: no heartbeat")
            well = False
            continue
        lines.append(
            f"  rank {number} (part{pulse['part']}, pid {pulse['pid']}): {pulse['phase']}, step {pulse['steps']},"
            f" last progress {pulse['idle_s'] + board['age']:.1f} s ago, heartbeat {pulse['silent_s']:.1f} s ago"
        )
        well &= pulse["phase"] != "serving" or pulse["idle_s"] < STUCK_SECONDS
    return lines, well


def _ports(planned: Iterable[PlannedPort]) -> tuple[list[str], bool]:
    """The planned ports, and who listens on them."""
    try:
        listening = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.laddr and c.status == "LISTEN"}
    except psutil.AccessDenied:
        return ["  who listens can only be seen as root"], True
    lines, http = [], True
    for number, port in enumerate(planned):
        here = port.port in listening
        lines.append(f"  {port.port} {port.purpose}: " + (f"pid {listening[port.port]}" if here else "nobody listens"))
        http &= here or number > 0
    return lines, http


def _memory() -> list[str]:
    host = Host()
    space, found = host.space(SHM), orphans(host)
    return [
        f"  {size_text(space.free)} of {size_text(space.size)} free,"
        f" {len(found.files)} abandoned files hold {size_text(found.bytes)}"
    ]


def _stacks(pids: Iterable[int]) -> list[str]:
    """By py-spy, where it is installed and may look."""
    program = shutil.which("py-spy")
    if not program:
        return ["  py-spy is not installed (pip install py-spy)"]
    lines = []
    for pid in pids:
        try:
            command = [program, "dump", "--pid", str(pid)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=STACK_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            lines.append(f"  pid {pid}: py-spy gave no answer")
            continue
        lines += [f"  {line}" for line in (done.stdout or done.stderr).splitlines()]
    return lines
