"""Fake hosts in a folder, and helpers that run the doctor on them or as a process.

`FakeHost` is a healthy container that a test changes. Faults that need the real kernel (tmpfs, mounts, namespaces,
limits) use the doctor as a process: see `doctor`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import rtp_llm
from doctor import checks  # noqa: F401  # registers them
from doctor.check import REGISTRY, Status
from doctor.context import CheckContext
from doctor.executor import run_checks
from doctor.host import DiskSpace, Host, Interface
from doctor.report import Finding
from doctor.runtime import Runtime

REPOSITORY = Path(rtp_llm.__file__).parents[1]
DEMO = REPOSITORY / "image" / "demo" / "model"  # a checkpoint, without which no machine is ready
GIB = 1 << 30
HEALTHY = (Status.OK, Status.SKIP)

LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max stack size            8388608              unlimited            bytes
Max processes             unlimited            unlimited            processes
Max open files            1048576              1048576              files
Max locked memory         8388608              8388608              bytes
"""
MOUNTS = """\
1 0 0:30 / / rw,relatime - overlay overlay rw
2 1 0:31 / /proc rw,nosuid - proc proc rw
3 1 0:32 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755
4 3 0:33 / /dev/shm rw,nosuid,nodev - tmpfs shm rw,size=2097152k
5 1 0:34 / /sys ro,nosuid - sysfs sysfs ro
6 5 0:35 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw
"""
FILES = {
    "/.dockerenv": "",
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nrtp:x:1000:1000::/home/rtp:/bin/sh\n",
    "/proc/self/limits": LIMITS,
    "/proc/self/mountinfo": MOUNTS,
    "/proc/self/cgroup": "0::/\n",
    "/proc/self/status": "Name:\tpython\nCapEff:\t00000000a80425fb\nSeccomp:\t2\nCpus_allowed_list:\t0-7\n",
    "/proc/sys/kernel/random/boot_id": "8b0b3f3c-0000-4000-8000-000000000001\n",
    "/proc/sys/net/ipv4/ip_local_port_range": "32768\t60999\n",
    "/proc/sys/net/ipv4/ip_local_reserved_ports": "\n",
    "/proc/sys/net/ipv4/ip_unprivileged_port_start": "1024\n",
    "/sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n",
    "/sys/fs/cgroup/cpu.max": "max 100000\n",
    "/sys/fs/cgroup/cpu.stat": "nr_periods 0\nnr_throttled 0\n",
    "/sys/fs/cgroup/memory.max": "max\n",
    "/sys/fs/cgroup/memory.current": "1048576\n",
    "/sys/fs/cgroup/memory.events": "low 0\noom_kill 0\n",
    "/sys/fs/cgroup/memory.stat": "inactive_file 0\nactive_file 0\n",
    "/sys/fs/cgroup/pids.max": "max\n",
    "/sys/fs/cgroup/pids.current": "20\n",
}
FOLDERS = ("/dev/shm", "/tmp", "/root", "/proc", "/sys/class/net")


class FakeHost(Host):
    """A Docker container on a machine with 8 cores and 64 GiB, whose files are below `root`."""

    def __init__(self, root: Path, environ: Mapping[str, str] | None = None):
        super().__init__(root, {"HOME": "/root", "TMPDIR": "/tmp", "CHECKPOINT_PATH": str(DEMO), **(environ or {})})
        self.spaces = {"/dev/shm": DiskSpace(2 * GIB, 2 * GIB, -1)}
        self.fake_uid, self.fake_cores = 0, 8
        self.memory = 64 * GIB
        self.host_names: dict[str, list[str]] = {}
        self.routes: dict[str, str] = {}
        self.fake_hostname = "box"
        for folder in FOLDERS:
            self.path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            self.write(name, text)
        self.__dict__["interfaces"] = [
            Interface("lo", ("127.0.0.1",), 65536, 0),
            Interface("eth0", ("10.0.0.5",), 1500, 25000),
        ]

    def write(self, name: str, text: str) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def remove(self, name: str) -> None:
        self.path(name).unlink()

    def space(self, path: str) -> DiskSpace:
        return self.spaces.get(path, DiskSpace(100 * GIB, 50 * GIB, 1 << 20))

    @property
    def uid(self) -> int:
        return self.fake_uid

    @property
    def cores(self) -> int:
        return self.fake_cores

    @property
    def machine(self) -> str:
        return "x86_64"

    def memory_available(self) -> int:
        return min(self.memory, self.cgroup.available_memory)

    @property
    def hostname(self) -> str:
        return self.fake_hostname

    def resolve(self, name: str) -> list[str]:
        if name.replace(".", "").isdigit():
            return [name]
        if name not in self.host_names:
            raise OSError(-2, "Name or service not known")
        return self.host_names[name]

    def source_address(self, ip: str) -> str:
        return self.routes.get(ip, "127.0.0.1" if ip.startswith("127.") else "10.0.0.5")


def run_context_checks(ctx: CheckContext, *, tier: int = 0, only: Sequence[str] = ()) -> list[Finding]:
    """Runs the checks of this part in the tiers (groups of checks) from 0 to `tier`, and returns their findings.

    Gives each check ten times its timeout, because other tests use the cores.
    """
    selected = [c for c in REGISTRY.values() if c.tier <= tier and (not only or c.id in only)]
    return run_checks([replace(check, timeout=10 * check.timeout) for check in selected], ctx)


def problems(findings: Sequence[Finding]) -> dict[str, Status]:
    """Returns the status by id of all findings that are neither ok nor skipped."""
    return {f.id: f.status for f in findings if f.status not in HEALTHY}


def by_id(findings: Sequence[Finding], id: str) -> Finding:
    return next(f for f in findings if f.id == id)


def fix(finding: Finding, runtime: Runtime = Runtime.DOCKER) -> str:
    return finding.fix.text(runtime)


def doctor(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    inside: Sequence[str] = (),
    timeout: float = 60,
    code: Path = REPOSITORY,
) -> subprocess.CompletedProcess[str]:
    """Runs the doctor as a process. `inside`: a command that runs it, such as nsenter; `code`: folder with the doctor's
    packages."""
    clean = {"PATH": os.environ["PATH"], "HOME": "/root", "CHECKPOINT_PATH": str(DEMO), **(env or {})}
    command = [*inside, sys.executable, "-m", "doctor", *arguments]
    return subprocess.run(command, env=clean, cwd=code, capture_output=True, text=True, timeout=timeout, check=False)


def report(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Returns the report that `-o json` printed."""
    assert process.stdout, process.stderr
    parsed: dict[str, Any] = json.loads(process.stdout)
    return parsed


def failed_checks(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns the status by id of all checks in a report that are neither ok nor skipped."""
    return {c["id"]: c["status"] for c in report["checks"] if c["status"] not in HEALTHY}
