"""`rtp-llm-doctor attach`: shows whether a running part is healthy, from its run directory and /proc."""

import http.client
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

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
HEALTH_SECONDS = 2.0
MAX_HEALTH_BYTES = 500  # of the answer, which names the phase


class _RankStatusView(BaseModel):
    """The fields of a rank's status (parallel/rank_status.py) that `attach` prints.

    `idle_s`: seconds from its last progress to its last heartbeat; `silent_s`: seconds since its last heartbeat.
    """

    part: int
    pid: int
    phase: str
    steps: int
    idle_s: float
    silent_s: float

    @property
    def idle_seconds(self) -> float:
        """Returns the seconds from the rank's last known progress to the time when gang.json was written."""
        return self.idle_s + self.silent_s


class _GangStatusView(BaseModel):
    """The fields of gang.json that `attach` prints. `age`: seconds since the file was written."""

    epoch: int
    ranks: dict[str, _RankStatusView]
    message: str = ""
    age: float = 0.0


def find_run_dirs() -> list[Path]:
    """Returns the run directories of the parts that run on this machine, the most recently started first.

    Finds them in the command lines of the API processes. Omits run directories that this user cannot read.
    """
    started: dict[Path, float] = {}
    for process in psutil.process_iter(["cmdline", "create_time"]):
        for module, argument in pairwise(process.info["cmdline"] or []):
            path = Path(argument)
            # The test for part.json skips other users' parts, and unrelated programs with such a command line.
            if module == "rtp_llm.api.server" and os.access(path / "part.json", os.R_OK):
                started[path] = process.info["create_time"]
    return sorted(started, key=lambda path: -started[path])


def running_part(start_port: int) -> PartSpec | None:
    """Returns the part with this START_PORT that runs on this machine, whatever its other settings, or None."""
    for run_dir in find_run_dirs():
        with suppress(ConfigError):
            part_spec = _load(run_dir)
            if part_spec.plan.start_port == start_port:
                return part_spec
    return None


def describe_running(part_spec: PartSpec) -> str:
    """Sends GET /health to the part. Returns a sentence for the user, such as "part0 of this server already runs here
    and is healthy"."""
    return f"{part_spec.label} of this server already runs here and {_health(part_spec.plan.start_port)}"


def _health(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HEALTH_SECONDS)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        text = response.read(MAX_HEALTH_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"does not answer GET /health: {error or type(error).__name__}"
    finally:
        connection.close()
    return "is healthy" if response.status == http.HTTPStatus.OK else f"is not healthy: {response.status} {text}"


def is_running(ctx: CheckContext) -> bool:
    """Returns whether a part with this START_PORT, plan (rank layout and addresses) and checkpoint runs on this
    machine.

    The device is not compared, nor is the checkpoint if this process has no CHECKPOINT_PATH.
    """
    return any(_has_same_settings(ctx, run_dir) for run_dir in find_run_dirs())


def _has_same_settings(ctx: CheckContext, run_dir: Path) -> bool:
    try:
        running = _load(run_dir)
    except ConfigError:
        return False
    if running.plan.start_port != ctx.config.start_port or ctx.plan is None:
        return False
    # CHECKPOINT_PATH may be unset in this process. The device depends on what the driver reports now, so it is not
    # compared.
    checkpoints = {str(Path(c.checkpoint_path).absolute()) for c in (running.config, ctx.config) if c.checkpoint_path}
    return replace(running.plan, device=ctx.plan.device) == ctx.plan and len(checkpoints) < 2


def _load(run_dir: Path) -> PartSpec:
    """Loads part.json, the settings and the plan of a running part. Raises ConfigError if the file is invalid."""
    try:
        return PartSpec.load(run_dir)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{run_dir / 'part.json'} is invalid: {reason}; it must be written by start_server of the same version"
        ) from None


def attach(run_dir: str) -> int:
    """Prints the state of the part with this run directory. If `run_dir` is "", takes the newest part on this machine.

    Returns the exit code: 0 if the part is healthy, 1 if there is a problem, 2 if no part runs.
    """
    run_dirs = [Path(run_dir)] if run_dir else find_run_dirs()
    if not run_dirs or not (run_dirs[0] / "part.json").exists():
        scope = f"in {run_dir}" if run_dir else "among the visible processes; set --run-dir to name its run directory"
        print(f"rtp-llm-doctor: no running part {scope}", file=sys.stderr)
        return DoctorExitCode.CANNOT_RUN
    lines, is_healthy = describe(_load(run_dirs[0]))
    write("\n".join(lines) + "\n")
    return DoctorExitCode.READY if is_healthy else DoctorExitCode.ERRORS


def describe(part_spec: PartSpec) -> tuple[list[str], bool]:
    """Returns (lines that describe the state of the part, whether the part is healthy)."""
    plan = part_spec.plan
    gang_status = _gang_status(part_spec)
    lines = [f"{part_spec.label} of {plan.num_parts}, {plan.device}, state in {part_spec.run_dir}"]
    ranks, problems = _ranks(plan.world_size, gang_status)
    ports, port_problems = _ports(plan.local_ports())
    problems += port_problems
    lines += ["", "ranks", *ranks, "", "ports", *ports, "", "shared memory", _memory()]
    stuck_pids = [
        rank.pid
        for rank in gang_status.ranks.values()
        if rank.part == plan.part and rank.idle_seconds + gang_status.age > STUCK_SECONDS
    ]
    if stuck_pids:
        lines += ["", "stacks of ranks that make no progress", *_stack_dumps(stuck_pids)]
    lines += ["", f"unhealthy: {'; '.join(problems)}" if problems else "healthy"]
    return lines, not problems


def _gang_status(part_spec: PartSpec) -> _GangStatusView:
    path = part_spec.gang_status_path
    if not path.exists():
        return _GangStatusView(epoch=0, ranks={}, message=f"{path.name} was not written yet")
    try:
        status = _GangStatusView.model_validate_json(files.read(path))
        return status.model_copy(update={"age": max(0.0, time.time() - path.stat().st_mtime)})
    except (OSError, ValueError):
        return _GangStatusView(epoch=0, ranks={}, message=f"{path} is not a valid status file")


def _ranks(world_size: int, gang_status: _GangStatusView) -> tuple[list[str], list[str]]:
    """Returns (lines to print, problems) about the ranks. `world_size`: how many ranks the gang should have."""
    age = gang_status.age
    is_stale = age > STALE_SECONDS
    lines = [
        f"  epoch {gang_status.epoch} (starts of the gang so far), as of {age:.1f} s ago"
        + (" (stale)" if is_stale else "")
    ]
    if gang_status.message:
        lines.append(f"  {gang_status.message}")
    problems = [f"no status from the ranks for {age:.1f} s"] if is_stale else []
    for number in range(world_size):
        rank = gang_status.ranks.get(str(number))
        if rank is None:
            lines.append(f"  rank {number}: no heartbeat")
            problems.append(f"rank {number} is missing")
            continue
        is_silent = rank.silent_s > STALE_SECONDS
        lines.append(
            f"  rank {number} (part{rank.part}, pid {rank.pid}): {rank.phase}, step {rank.steps}, last progress"
            f" {rank.idle_seconds + age:.1f} s ago, heartbeat {rank.silent_s:.1f} s ago"
            + (" (silent)" if is_silent else "")
        )
        if is_silent:
            problems.append(f"rank {number} is silent")
        elif rank.phase == "serving" and rank.idle_seconds > STUCK_SECONDS:
            problems.append(f"rank {number} makes no progress")
    return lines, problems


def _ports(planned: Iterable[PlannedPort]) -> tuple[list[str], list[str]]:
    """Returns (lines to print, texts of the problems) about this part's ports.

    Only a missing listener on the HTTP port, which comes first, is a problem: the others may be closed after the
    rendezvous.
    """
    try:
        listening = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.laddr and c.status == "LISTEN"}
    except psutil.AccessDenied:
        return ["  only root can see the listening processes"], []
    lines, problems = [], []
    for number, port in enumerate(planned):
        is_open = port.port in listening
        lines.append(f"  {port.port} {port.purpose}: " + (f"pid {listening[port.port]}" if is_open else "no listener"))
        if number == 0 and not is_open:
            problems.append(f"no process listens on port {port.port}")
    return lines, problems


def _memory() -> str:
    host = Host()
    space, orphans = host.space(SHM), find_orphans(host)
    return (
        f"  {format_bytes(space.free)} of {format_bytes(space.size)} free,"
        f" {len(orphans.files)} orphaned files hold {format_bytes(orphans.bytes)}"
    )


def _stack_dumps(pids: Iterable[int]) -> list[str]:
    """Returns py-spy's stack dump of each process, or the reason why there is none."""
    program = shutil.which("py-spy")
    if not program:
        return ["  py-spy is not installed (pip install py-spy)"]
    lines = []
    for pid in pids:
        try:
            command = [program, "dump", "--pid", str(pid)]
            process = subprocess.run(command, capture_output=True, text=True, timeout=STACK_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            lines.append(f"  pid {pid}: py-spy did not finish within {STACK_SECONDS:g} s")
            continue
        lines += [f"  {line}" for line in (process.stdout or process.stderr).splitlines()]
    return lines
