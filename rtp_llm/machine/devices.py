"""GPUs, network addresses and CPU cores of this machine. Creates no CUDA context."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import pynvml

from rtp_llm.machine.cgroup import Cgroup
from rtp_llm.machine.memory import read_text


@dataclass(frozen=True)
class VisibleDevices:
    """NVML indices of the GPUs visible to CUDA, in CUDA's order. `problem`: the invalid entry of CUDA_VISIBLE_DEVICES
    that hides GPUs, and why; empty if there is none.
    """

    indices: tuple[int, ...]
    problem: str = ""


def visible_gpus() -> int:
    """Returns the number of GPUs visible to CUDA, with CUDA_VISIBLE_DEVICES applied. 0 without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    except pynvml.NVMLError:  # one GPU has fallen off the bus; the doctor reports which
        return 0
    finally:
        pynvml.nvmlShutdown()
    return len(apply_cuda_visible_devices(uuids, os.environ.get("CUDA_VISIBLE_DEVICES")).indices)


def apply_cuda_visible_devices(uuids: Sequence[str], visible: str | None) -> VisibleDevices:
    """Parses CUDA_VISIBLE_DEVICES as CUDA does: indices or UUID prefixes, up to the first invalid entry (CUDA
    programming guide, environment variables).

    Returns the NVML indices of the visible GPUs, -1 for a MIG instance. `uuids`: by NVML index. `visible`: the
    variable's value, None if unset.
    """
    if visible is None:
        return VisibleDevices(tuple(range(len(uuids))))
    indices: list[int] = []
    for entry in (e.strip() for e in visible.split(",")):
        index = _device_index(entry, uuids)
        if index is None:
            reason = "is empty" if not entry else f"{entry!r} is not one of the {len(uuids)} GPUs of this machine"
            return VisibleDevices(tuple(indices), f"{reason}; CUDA ignores it and all after it")
        if index in indices and index >= 0:
            return VisibleDevices((), f"{entry!r} lists GPU {index} twice; CUDA then hides all GPUs")
        indices.append(index)
    return VisibleDevices(tuple(indices))


def _device_index(entry: str, uuids: Sequence[str]) -> int | None:
    if entry.isascii() and entry.isdigit():
        return int(entry) if int(entry) < len(uuids) else None
    if entry.startswith("MIG-"):
        return -1
    matches = [i for i, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def local_addresses() -> set[str]:
    """Returns the addresses of all interfaces, without the scope suffix (`%eth0`): `10.0.0.2`, `fe80::1`."""
    return {entry.address.split("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}


def interface_of(address: str) -> str | None:
    """Returns the name of the interface with this address; None if no interface has it."""
    address = address.split("%")[0]
    if address.startswith("127."):  # the kernel accepts all of 127.0.0.0/8 on loopback, but lists one address
        return "lo"
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in entries):
            return str(name)
    return None


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may use, at least 1: the cores of its affinity, or the CPU
    quota of its cgroup, rounded down, if that is less.
    """
    cores, quota = len(os.sched_getaffinity(0)), Cgroup.read(read_text).cpus
    return max(1, min(cores, int(quota))) if quota else cores
