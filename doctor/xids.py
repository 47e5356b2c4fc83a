"""What NVIDIA's driver reports to the kernel's log of its hardware, and what helps (NVIDIA, "Xid Errors"). The numbers
that are missing here are mostly a program's own faults.
"""

import re
from collections.abc import Sequence

MEANINGS = {
    48: ("an uncorrectable memory error", "nvidia-smi -i {gpu} -r; if it comes back, take the GPU out of service"),
    63: ("a memory row is to be replaced", "nvidia-smi -i {gpu} -r, or reboot"),
    64: ("replacing a memory row failed", "take the GPU out of service"),
    74: ("an NVLink error", "nvidia-smi nvlink -e -i {gpu}; reset all GPUs that are linked to it"),
    79: ("it fell off the bus", "drain this machine and reboot it; if it comes back, check power and seating"),
    94: ("a contained memory error", "restart what ran on it; reset it when nothing runs: nvidia-smi -i {gpu} -r"),
    95: ("an uncontained memory error", "nvidia-smi -i {gpu} -r; if it comes back, take the GPU out of service"),
    119: ("its own processor (GSP) did not answer", "nvidia-smi -i {gpu} -r, or reboot; update the driver"),
}
DRIVER_LOADED_TEXT = "NVRM: loading NVIDIA"  # the driver, which sets up every GPU anew: what was before is over
XID_LINE = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:]+)[^)]*\): (\d+)")


def xids_of_gpu(log: str, bus: str) -> list[int]:
    """Those of the GPU at this PCI address, in the order of the log. The driver writes the address without the
    function: `PCI:0000:3b:00`."""
    return [xid for place, xid in _reports(log) if bus.startswith(place)]


def xids_of_unknown_gpus(log: str, buses: Sequence[str]) -> list[tuple[str, int]]:
    """(address, number) of GPUs at none of these addresses: one that cannot be opened does not tell its own."""
    return [(place, xid) for place, xid in _reports(log) if not any(bus.startswith(place) for bus in buses)]


def _reports(log: str) -> list[tuple[str, int]]:
    found = [(place.lower(), int(xid)) for place, xid in XID_LINE.findall(log.split(DRIVER_LOADED_TEXT)[-1])]
    return [(place, xid) for place, xid in found if xid in MEANINGS]
