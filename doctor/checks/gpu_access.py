"""Checks that the GPUs are in this container, and that NVML and CUDA see them."""

import re

import pynvml

from doctor import fixes
from doctor.check import CheckResult, Repair, error, ok, skip, symptoms
from doctor.checks.categories import gpu_check
from doctor.checks.preconditions import GPUS_PRESENT
from doctor.context import CheckContext
from rtp_llm.machine.devices import apply_cuda_visible_devices

MISSING_LIBRARY = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
VERSION_MISMATCH = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH


@gpu_check("G-01", "the GPUs are available in this container")
@symptoms(
    "RuntimeError: No CUDA GPUs are available",
    "Found no NVIDIA driver on your system",
    "libcuda.so.1: cannot open shared object file",
)
def gpus_are_available(ctx: CheckContext) -> CheckResult:
    """A container sees GPUs only if the container runtime mounts the device files and the driver's libraries
    (NVIDIA_DRIVER_CAPABILITIES must include compute and utility)."""
    gpus, device = ctx.gpus, ctx.config.rtp_device
    if gpus.failure == 0:
        return ok(f"{len(gpus.all)} GPUs, driver {gpus.driver}")
    if gpus.failure not in MISSING_LIBRARY:
        return ok("NVML, the driver's library libnvidia-ml.so.1, is installed")  # G-02 and G-03 report its error
    num_files = sum(bool(re.fullmatch(r"nvidia[0-9]+", name)) for name in ctx.host.list_dir("/dev"))
    if device == "cpu" or not (device == "cuda" or num_files):
        return skip("no NVIDIA GPU here: the ranks run on CPU")
    hidden = ctx.host.environ.get("NVIDIA_VISIBLE_DEVICES", "") in ("void", "none")
    library = "no NVIDIA driver library (libnvidia-ml.so.1)"
    actual = "NVIDIA_VISIBLE_DEVICES hides the GPUs" if hidden else library
    requirement = "GPUs, because RTP_DEVICE=cuda" if device == "cuda" else "GPUs, because /dev has device files of GPUs"
    return error(f"{actual}; {num_files} GPU device files in /dev", requirement, fixes.GPU_ACCESS)


@gpu_check("G-02", "the NVIDIA driver responds", needs=("G-01",), repair=Repair.RESTART)
@symptoms("Failed to initialize NVML: Unknown Error")
def nvml_responds(ctx: CheckContext) -> CheckResult:
    """After `systemctl daemon-reload` on the host, systemd applies its device rules again and removes the GPUs from
    running containers. Only a new container gets them back."""
    code = ctx.gpus.failure
    if code == 0:
        return ok("NVML responds")
    if code in (*MISSING_LIBRARY, VERSION_MISMATCH):
        return skip("the driver's library is missing (G-01), or the kernel module has another version (G-03)")
    return error(f"NVML fails: {pynvml.NVMLError(code)}", "a response of NVML", fixes.RECREATE_CONTAINER, code=code)


@gpu_check(
    "G-03", "the driver's kernel module and library have the same version", needs=("G-01",), repair=Repair.REBOOT
)
@symptoms("Failed to initialize NVML: Driver/library version mismatch")
def driver_versions_match(ctx: CheckContext) -> CheckResult:
    """Fails if the host's driver was upgraded under a running container, or without a reboot: then the old kernel
    module is still loaded, and the new library does not work with it."""
    version_file = ctx.host.read("/proc/driver/nvidia/version") or ""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", version_file)
    module, library = match[1] if match else "", ctx.gpus.driver
    if ctx.gpus.failure == VERSION_MISMATCH:
        actual = f"the kernel module has version {module or '(unknown)'}, the library another one"
        return error(actual, "the same version of both", fixes.REBOOT)
    if not library:
        return skip("NVML does not report a driver version")
    if module and module != library:
        actual = f"the driver's kernel module has version {module}, its library {library}"
        return error(actual, "the same version of both", "reboot the host")
    return ok(f"driver {library}")


@gpu_check(
    "G-09", "CUDA_VISIBLE_DEVICES names existing GPUs", needs=("G-01", "G-02", "G-03"), preconditions=(GPUS_PRESENT,)
)
@symptoms("CUDA error: invalid device ordinal", "invalid literal for int() with base 10: 'MIG-…'")
def visible_devices_exist(ctx: CheckContext) -> CheckResult:
    """CUDA reads CUDA_VISIBLE_DEVICES up to the first invalid entry and silently ignores the rest. An empty value hides
    all GPUs, and so does a list with a duplicate."""
    value = ctx.host.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return ok(f"CUDA_VISIBLE_DEVICES is unset: all {len(ctx.gpus.all)} GPUs are visible")
    if ctx.config.rtp_device == "cpu":
        return ok("CUDA_VISIBLE_DEVICES is not used, because RTP_DEVICE=cpu")
    problem = apply_cuda_visible_devices([gpu.uuid for gpu in ctx.gpus.all], value).problem
    if problem:
        indices = ",".join(str(gpu.index) for gpu in ctx.gpus.all)
        actual, fix = f"CUDA_VISIBLE_DEVICES={value!r}: {problem}", f"CUDA_VISIBLE_DEVICES={indices}"
        return error(actual, f"CUDA_VISIBLE_DEVICES with GPU indices from {indices}, or with GPU UUIDs", fix)
    return ok(f"CUDA_VISIBLE_DEVICES={value}: {len(ctx.gpus.visible)} GPUs")
