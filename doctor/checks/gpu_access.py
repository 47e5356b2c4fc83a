"""GPU access: whether the GPUs are in this container, and whether NVML and CUDA see them."""

import re

import pynvml

from doctor.check import CheckResult, Fix, Repair, check, error, ok, skip
from doctor.context import CheckContext
from rtp_llm.machine.devices import apply_cuda_visible_devices

CATEGORY = "gpu"
NO_GPU = "the ranks run on CPU"
MISSING_LIBRARY = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
_GIVE_GPUS = Fix(
    host="install NVIDIA's driver; nvidia-smi must list the GPUs",
    docker="docker run --gpus all …",
    compose="deploy.resources.reservations.devices: [{driver: nvidia, count: all, capabilities: [gpu]}]",
    kubernetes="resources.limits: {nvidia.com/gpu: N}, and the runtime class of the GPU operator",
)


def _nodes(ctx: CheckContext) -> list[str]:
    return [name for name in ctx.host.list_dir("/dev") if re.fullmatch(r"nvidia[0-9]+", name)]


def _wants_gpu(ctx: CheckContext) -> bool:
    """Whether GPUs are asked for, or seem to be meant: their device files or driver are here."""
    return ctx.config.rtp_device != "cpu" and (ctx.config.rtp_device == "cuda" or bool(_nodes(ctx)))


def _driver_module(ctx: CheckContext) -> str:
    """The version of the kernel module, from /proc."""
    text = ctx.host.read("/proc/driver/nvidia/version") or ""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else ""


@check(
    "G-01",
    CATEGORY,
    "the GPUs are in this container",
    symptoms=(
        "RuntimeError: No CUDA GPUs are available",
        "Found no NVIDIA driver on your system",
        "libcuda.so.1: cannot open shared object file",
    ),
)
def present(ctx: CheckContext) -> CheckResult:
    """A container sees GPUs only if the runtime was asked to mount them: device files, and the driver's libraries
    (NVIDIA_DRIVER_CAPABILITIES must name compute and utility)."""
    if ctx.gpus.failure == 0:
        return ok(f"{len(ctx.gpus.all)} GPUs, driver {ctx.gpus.driver}")
    if ctx.gpus.failure not in MISSING_LIBRARY:
        return ok("the driver's library is here")  # G-02 and G-03 say what is wrong with it
    if not _wants_gpu(ctx):
        return skip("no NVIDIA GPU here: the ranks run on CPU")
    environ = ctx.host.environ
    hidden = environ.get("NVIDIA_VISIBLE_DEVICES", "") in ("void", "none")
    files = _nodes(ctx)
    actual = "NVIDIA_VISIBLE_DEVICES hides them" if hidden else "no NVIDIA driver library here"
    return error(f"{actual}; {len(files)} device files in /dev", "GPUs, as RTP_DEVICE=cuda asks", _GIVE_GPUS)


@check(
    "G-02",
    CATEGORY,
    "the driver answers",
    symptoms=("Failed to initialize NVML: Unknown Error",),
    needs=("G-01",),
    repair=Repair.RESTART,
)
def nvml_responds(ctx: CheckContext) -> CheckResult:
    """After `systemctl daemon-reload` on the host, systemd applies its device rules again and takes the GPUs away from
    running containers. Only a new container gets them back."""
    code = ctx.gpus.failure
    if code == 0:
        return ok("NVML answers")
    if code in (*MISSING_LIBRARY, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH):
        return skip("no driver here")
    fix = Fix(
        host="nvidia-smi; restart the driver, or reboot",
        docker="recreate the container; with cgroup v2 use CDI (--device nvidia.com/gpu=all)",
        compose="docker compose up --force-recreate",
        kubernetes="delete the pod",
    )
    return error(f"NVML says {pynvml.NVMLError(code)}", "an answer", fix, code=code)


@check(
    "G-03",
    CATEGORY,
    "driver and library are of one version",
    symptoms=("Failed to initialize NVML: Driver/library version mismatch",),
    needs=("G-01",),
    repair=Repair.REBOOT,
)
def mismatch(ctx: CheckContext) -> CheckResult:
    """The host's driver was upgraded under a running container, or without a reboot: the kernel module is still the
    old one."""
    module = _driver_module(ctx)
    if ctx.gpus.failure == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return error(
            f"the kernel module is {module or 'another version'}, the library is not",
            "one version",
            Fix(host="reboot", docker="restart the container; if that does not help, reboot the host"),
        )
    if not ctx.gpus.driver:
        return skip("no driver here")
    if module and module != ctx.gpus.driver:
        return error(f"kernel module {module}, library {ctx.gpus.driver}", "one version", "reboot the host")
    return ok(f"driver {ctx.gpus.driver}")


@check(
    "G-09",
    CATEGORY,
    "CUDA_VISIBLE_DEVICES names GPUs that are here",
    symptoms=("CUDA error: invalid device ordinal", "invalid literal for int() with base 10: 'MIG-…'"),
    needs=("G-01", "G-02", "G-03"),
)
def visible(ctx: CheckContext) -> CheckResult:
    """CUDA reads the list up to the first entry that is not valid, and ignores the rest in silence; an empty value
    hides all GPUs, and a GPU that stands twice hides all as well."""
    value = ctx.host.environ.get("CUDA_VISIBLE_DEVICES")
    if not ctx.gpus.all:
        return skip(NO_GPU)
    if value is None:
        return ok(f"unset: all {len(ctx.gpus.all)} GPUs")
    if ctx.config.rtp_device == "cpu":
        return ok("not used: RTP_DEVICE=cpu")
    problem = apply_cuda_visible_devices([gpu.uuid for gpu in ctx.gpus.all], value).problem
    if problem:
        every = ",".join(str(gpu.index) for gpu in ctx.gpus.all)
        return error(
            f"CUDA_VISIBLE_DEVICES={value!r}: {problem}",
            f"indices from {every}, or UUIDs",
            f"CUDA_VISIBLE_DEVICES={every}",
        )
    return ok(f"{value}: {len(ctx.gpus.visible)} GPUs")
