"""Which accelerators this process may use, found out without creating a CUDA context."""

import os

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
