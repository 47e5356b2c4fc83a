"""What this machine has: GPUs, found out without creating a CUDA context, and network addresses."""

import os
from pathlib import Path

import psutil
import pynvml


def visible_gpus() -> int:
    """Number of GPUs visible to CUDA: NVML's count, narrowed by CUDA_VISIBLE_DEVICES. 0 without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        count = int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
    return _narrow(count, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _narrow(count: int, visible: str | None) -> int:
    """CUDA takes the listed devices up to the first invalid entry (CUDA programming guide, environment variables)."""
    if visible is None:
        return count
    found = 0
    for entry in visible.split(","):
        name = entry.strip()
        if not name or name.startswith("-") or (name.isdigit() and int(name) >= count):
            break
        found += 1
    return found


def local_addresses() -> set[str]:
    """Every address of every interface, without scope: `10.0.0.2`, `fe80::1`."""
    return {entry.address.split("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}


def interface_of(address: str) -> str | None:
    """Name of the interface that holds this address; None where none does."""
    wanted = address.split("%")[0]
    if wanted.startswith("127."):  # all of 127.0.0.0/8 is loopback, whether listed or not
        return "lo"
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == wanted for entry in entries):
            return str(name)
    return None


def usable_cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: its affinity, and below that the container's CPU quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except OSError:
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
