"""What this machine has: GPUs, found out without creating a CUDA context, and network addresses."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml


@dataclass(frozen=True)
class VisibleDevices:
    """Which GPUs CUDA would show, by NVML index, in CUDA's order; `problem` says why there are fewer than listed."""

    indices: tuple[int, ...]
    problem: str = ""


def visible_gpus() -> int:
    """Number of GPUs visible to CUDA: NVML's, narrowed by CUDA_VISIBLE_DEVICES. 0 without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    except pynvml.NVMLError:  # one of them has fallen off the bus; the doctor says which
        return 0
    finally:
        pynvml.nvmlShutdown()
    return len(apply_cuda_visible_devices(uuids, os.environ.get("CUDA_VISIBLE_DEVICES")).indices)


def apply_cuda_visible_devices(uuids: Sequence[str], visible: str | None) -> VisibleDevices:
    """Reads CUDA_VISIBLE_DEVICES as CUDA does: indices or beginnings of UUIDs, up to the first that is not valid
    (CUDA programming guide, environment variables). A MIG instance counts as the GPU that nobody can index: -1.
    """
    if visible is None:
        return VisibleDevices(tuple(range(len(uuids))))
    found: list[int] = []
    for entry in (e.strip() for e in visible.split(",")):
        index = _device_index(entry, uuids)
        if index is None:
            why = "is empty" if not entry else f"{entry!r} is no GPU of the {len(uuids)} here"
            return VisibleDevices(tuple(found), f"{why}; CUDA ignores it and all after it")
        if index in found and index >= 0:
            return VisibleDevices((), f"{entry!r} names GPU {index} twice; CUDA then shows none at all")
        found.append(index)
    return VisibleDevices(tuple(found))


def _device_index(entry: str, uuids: Sequence[str]) -> int | None:
    if entry.isascii() and entry.isdigit():
        return int(entry) if int(entry) < len(uuids) else None
    if entry.startswith("MIG-"):
        return -1
    matches = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


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
