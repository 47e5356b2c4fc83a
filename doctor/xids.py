"""Xids: numbers of GPU errors that NVIDIA's driver writes to the kernel log, with their meaning and fix (NVIDIA, "Xid
Errors").

Only hardware errors are listed; most other Xids are errors of a program.
"""

import re
from collections.abc import Sequence

MEANINGS = {
    48: ("an uncorrectable memory error", "nvidia-smi -i {gpu} -r; if it comes back, take the GPU out of service"),
    63: ("remapping a memory row is pending", "nvidia-smi -i {gpu} -r, or reboot"),
    64: ("remapping a memory row failed", "take the GPU out of service"),
    74: ("an NVLink error", "nvidia-smi nvlink -e -i {gpu}; reset all GPUs that are linked to it"),
    79: ("it has fallen off the bus", "drain this machine and reboot it; if it comes back, check power and seating"),
    94: ("a contained memory error", "restart what ran on it; reset it when nothing runs: nvidia-smi -i {gpu} -r"),
    95: ("an uncontained memory error", "nvidia-smi -i {gpu} -r; if it comes back, take the GPU out of service"),
    119: ("its own processor (GSP) did not respond", "nvidia-smi -i {gpu} -r, or reboot; update the driver"),
}
DRIVER_LOADED_TEXT = "NVRM: loading NVIDIA"  # loading the driver resets all GPUs, so earlier Xids no longer apply
XID_LINE = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:]+)[^)]*\): (\d+)")


def xids_of_gpu(log: str, bus: str) -> list[int]:
    """Returns the Xids of one GPU in the kernel log, in the order of the log. Omits Xids that are not hardware errors
    (not in MEANINGS), and those from before the driver was last loaded.

    `bus`: PCI address of the GPU, such as "0000:3b:00.0". The log has it without the function: "PCI:0000:3b:00".
    """
    return [xid for address, xid in _reports(log) if bus.startswith(address)]


def xids_of_unknown_gpus(log: str, buses: Sequence[str]) -> list[tuple[str, int]]:
    """Returns (PCI address, Xid) for the hardware errors in the kernel log of GPUs whose address is not in `buses`.

    `buses`: the PCI addresses that NVML reports. NVML reports none for a GPU that it cannot open, so the errors of
    such a GPU appear only in this result.
    """
    return [(address, xid) for address, xid in _reports(log) if not any(bus.startswith(address) for bus in buses)]


def _reports(log: str) -> list[tuple[str, int]]:
    reports = [(address.lower(), int(xid)) for address, xid in XID_LINE.findall(log.split(DRIVER_LOADED_TEXT)[-1])]
    return [(address, xid) for address, xid in reports if xid in MEANINGS]
