"""`rtp-llm-doctor attach`: what a running part is doing. Reads its run directory and /proc; disturbs nothing."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from doctor.context import CheckContext
from doctor.host import Host, format_bytes
from doctor.orphans import SHM, find_orphans
from doctor.render import write
from doctor.report import DoctorExitCode
from rtp_llm import files
from rtp_llm.errors import ConfigError
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.plan import PlannedPort

STACK_SECONDS = 20.0
STALE_SECONDS = 3.0
STUCK_SECONDS = 10.0


class _RankStatusView(BaseModel):
    """What is shown of a rank's sign of life (parallel/pulse.py)."""

    part: int
    pid: int
    phase: str
    steps: int
    idle_s: float
    silent_s: float


class _GangStatusView(BaseModel):
    """`gang.json`, as far as it is shown."""

    epoch: int
    ranks: dict[str, _RankStatusView]
    message: str = ""


def find_run_dirs() -> list[Path]:
    """Run directories of parts that are running here, newest first: by the command lines of their processes."""
    found: dict[Path, float] = {}
    for process in psutil.process_iter(["cmdline", "create_time"]):
        words = process.info["cmdline"] or []
        for module, folder in pairwise(words):
            path = Path(folder)
            # Another user's may not be looked into; and what merely has these words in its command line is no part.
            if module == "rtp_llm.api.main" and os.access(path / "part.json", os.R_OK):
                found[path] = process.info["create_time"]
    return sorted(found, key=lambda path: -found[path])


def is_running(ctx: CheckContext) -> bool:
    """Whether the part that these settings describe runs here, and not another deployment on its port."""
    return any(_is_ours(ctx, folder) for folder in find_run_dirs())


def _is_ours(ctx: CheckContext, folder: Path) -> bool:
    try:
        there = _load(folder)
    except ConfigError:
        return False
    if there.plan.start_port != ctx.config.start_port or ctx.plan is None:
        return False
    # Where CHECKPOINT_PATH is not set here, nothing speaks against it. The device is what the driver says today.
    models = {str(Path(c.checkpoint_path).absolute()) for c in (there.config, ctx.config) if c.checkpoint_path}
    return replace(there.plan, device=ctx.plan.device) == ctx.plan and len(models) < 2


def _load(folder: Path) -> PartSpec:
    """Raises ConfigError where the folder's part.json is none."""
    try:
        return PartSpec.load(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{folder / 'part.json'}: is not what start_server writes: {why}") from None


def attach(run_dir: str) -> int:
    """Prints the state of a part; 1 where something of it is lost or stuck, 2 where there is none."""
    folders = [Path(run_dir)] if run_dir else find_run_dirs()
    if not folders or not (folders[0] / "part.json").exists():
        where = f"in {run_dir}" if run_dir else "among the processes that can be seen here; --run-dir may name one"
        print(f"rtp-llm-doctor: no running part {where}", file=sys.stderr)
        return DoctorExitCode.CANNOT_RUN
    part_spec = _load(folders[0])
    lines, healthy = describe(part_spec)
    write("\n".join(lines) + "\n")
    return DoctorExitCode.READY if healthy else DoctorExitCode.ERRORS


def describe(part_spec: PartSpec) -> tuple[list[str], bool]:
    """(lines, whether all is well)."""
    plan = part_spec.plan
    gang_status = _gang_status(part_spec)
    lines = [f"{part_spec.label} of {plan.num_parts}, {plan.device}, state in {part_spec.run_dir}"]
    ranks, troubles = _ranks(plan.world_size, gang_status)
    ports, unheard = _ports(plan.local_ports())
    troubles += unheard
    lines += ["", "ranks", *ranks, "", "ports", *ports, "", "shared memory", *_memory()]
    own = [rank_status for rank_status in gang_status["ranks"].values() if rank_status["part"] == plan.part]
    stuck = [int(rank_status["pid"]) for rank_status in own if _idle(rank_status) + gang_status["age"] > STUCK_SECONDS]
    if stuck:
        lines += ["", "stacks of the ranks that got nowhere", *_stack_dumps(stuck)]
    lines += ["", f"not well: {'; '.join(troubles)}" if troubles else "well"]
    return lines, not troubles


def _gang_status(part_spec: PartSpec) -> dict[str, Any]:
    path = part_spec.gang_status_path
    nothing = {"epoch": 0, "ranks": {}, "age": 0.0}
    if not path.exists():
        return {**nothing, "message": "nothing was posted yet"}
    try:
        state = _GangStatusView.model_validate_json(files.read(path))
        return {**state.model_dump(), "age": max(0.0, time.time() - path.stat().st_mtime)}
    except (OSError, ValueError):
        return {**nothing, "message": f"{path} is not what the ranks post"}


def _ranks(world: int, gang_status: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(lines, what is not well)."""
    stale = gang_status["age"] > STALE_SECONDS
    lines = [f"  epoch {gang_status['epoch']}, as of {gang_status['age']:.1f} s ago" + (" (stale)" if stale else "")]
    if gang_status.get("message"):
        lines.append(f"  {gang_status['message']}")
    troubles = [f"nothing was heard of the ranks for {gang_status['age']:.1f} s"] if stale else []
    for number in range(world):
        rank_status = gang_status["ranks"].get(str(number))
        if rank_status is None:
            lines.append(f"  rank {number}: no heartbeat")
            troubles.append(f"rank {number} is not here")
            continue
        silent = rank_status["silent_s"] > STALE_SECONDS
        lines.append(
            f"  rank {number} (part{rank_status['part']}, pid {rank_status['pid']}): {rank_status['phase']}, step {rank_status['steps']},"
            f" last progress {_idle(rank_status) + gang_status['age']:.1f} s ago, heartbeat {rank_status['silent_s']:.1f} s ago"
            + (" (silent)" if silent else "")
        )
        if silent:
            troubles.append(f"rank {number} is silent")
        elif rank_status["phase"] == "serving" and _idle(rank_status) > STUCK_SECONDS:
            troubles.append(f"rank {number} gets nowhere")
    return lines, troubles


def _idle(rank_status: Mapping[str, Any]) -> float:
    """Seconds without progress: up to its last heartbeat, and since then, when nobody knows."""
    return float(rank_status["idle_s"] + rank_status["silent_s"])


def _ports(planned: Iterable[PlannedPort]) -> tuple[list[str], list[str]]:
    """The planned ports and who listens on them; what is not well. Only HTTP needs a listener once the ranks met."""
    try:
        listening = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.laddr and c.status == "LISTEN"}
    except psutil.AccessDenied:
        return ["  who listens can only be seen as root"], []
    lines, troubles = [], []
    for number, port in enumerate(planned):
        here = port.port in listening
        lines.append(f"  {port.port} {port.purpose}: " + (f"pid {listening[port.port]}" if here else "no listener now"))
        if number == 0 and not here:
            troubles.append(f"nobody listens on port {port.port}")
    return lines, troubles


def _memory() -> list[str]:
    host = Host()
    space, found = host.space(SHM), find_orphans(host)
    return [
        f"  {format_bytes(space.free)} of {format_bytes(space.size)} free,"
        f" {len(found.files)} abandoned files hold {format_bytes(found.bytes)}"
    ]


def _stack_dumps(pids: Iterable[int]) -> list[str]:
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
