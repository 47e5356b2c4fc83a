"""A fake host with many faults, for the tests of the report's formats."""

import re
from pathlib import Path
from typing import Any

import pynvml
import pytest

from doctor.context import CheckContext
from doctor.host import DiskSpace
from doctor.report import Report, make_report
from doctor.runtime import Runtime
from rtp_llm.parallel.plan import PlannedPort
from tests.doctor.fixtures import LIMITS, FakeHost, run_context_checks

MIB = 1 << 20
ENVIRON = {
    "TP_SIZE": "2",
    "START_PORT": "10000",
    "CHECKPOINT_PATH": "/models/org/model",
    "LOG_LEVLE": "DEBUG",
    "NCCL_SOCKET_IFNAME": "bond0",
    "PROMETHEUS_MULTIPROC_DIR": "/tmp/metrics",
    "http_proxy": "http://proxy:3128",
}
# The checks that find a problem on a FaultyHost, and their status.
FAULTS = {
    "M-13": "warn",
    "M-15": "warn",
    "M-08": "error",
    "M-09": "crash",
    "S-01": "error",
    "L-02": "unknown",
    "L-03": "error",
    "L-05": "warn",
    "L-06": "warn",
    "N-08": "error",
    "N-06": "error",
    "N-11": "warn",
}


class FaultyHost(FakeHost):
    """A `FakeHost` with low limits, little memory and a failing disk."""

    def __init__(self, root: Path, runtime: Runtime):
        super().__init__(root, {**ENVIRON, "RTP_RUNTIME": runtime})
        self.fake_cores = 1
        self.spaces["/dev/shm"] = DiskSpace(64 * MIB, MIB, -1)
        self.write("/proc/self/limits", "\n".join(row for row in LIMITS.splitlines() if "open files" not in row))
        self.write("/sys/fs/cgroup/memory.events", "low 0\noom_kill 2\n")
        self.write("/sys/fs/cgroup/pids.max", "30\n")

    def space(self, path: str) -> DiskSpace:
        if path == "/tmp":
            raise OSError(5, "Input/output error")
        return super().space(path)


class NoDriver:
    """Replaces pynvml, as on a machine without NVIDIA's driver."""

    @staticmethod
    def nvmlInit() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def faulty_report(root: Path, runtime: Runtime, patch: pytest.MonkeyPatch) -> Report:
    """Returns the report of all checks without --tier for a FaultyHost. The check for free ports gets a fake result
    instead of trying ports."""

    def port_conflict(planned: PlannedPort) -> str:
        return "in use by pid 4711 (nginx: master process nginx)" if planned.port == 10000 else ""

    patch.setattr("doctor.checks.listen_ports.port_conflict", port_conflict)
    ctx = CheckContext(FaultyHost(root, runtime), nvml=NoDriver)
    return make_report(ctx, run_context_checks(ctx), started=0.0)


def without_timings(report: Report) -> Report:
    """Returns the report with fixed values in place of those that change between runs and releases."""
    checks = [
        c.model_copy(update={"duration_ms": 0.5, "actual": re.sub(r"\ball \d+ settings", "all settings", c.actual)})
        for c in report.checks
    ]
    fixed: dict[str, Any] = {"started": 1.5e9, "duration_s": 0.1, "tool_version": "1.2.3", "checks": checks}
    return report.model_copy(update=fixed)
