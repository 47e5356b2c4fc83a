"""Checks that the versions of the driver, of libcuda and of torch's CUDA match."""

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from doctor.check import CheckResult, error, ok, skip, symptoms
from doctor.checks.categories import gpu_check
from doctor.checks.preconditions import GPUS_PRESENT
from doctor.context import CheckContext


@gpu_check("G-05", "no cuda-compat libcuda is older than the driver", needs=("G-01", "G-02", "G-03"))
@symptoms("Error 803: system has unsupported display driver / cuda driver combination")
def no_old_libcuda(ctx: CheckContext) -> CheckResult:
    """Images with NVIDIA's cuda-compat package contain a libcuda for forward compatibility. If the dynamic loader finds
    it before the libcuda that the container runtime mounts, and the driver is newer, CUDA does not start."""
    if not ctx.gpus.driver:
        return skip("the ranks run on CPU")
    library_path = ctx.host.environ.get("LD_LIBRARY_PATH", "").split(":")
    folders = [*(folder for folder in library_path if "compat" in folder), *_compat_folders(ctx)]
    for folder, name, libcuda in _libcudas(ctx, folders):
        if libcuda < _version_tuple(ctx.gpus.driver):
            fix = f"remove {folder}, or set LD_LIBRARY_PATH=/usr/local/nvidia/lib64"
            actual = f"{folder}/{name} (cuda-compat) is older than driver {ctx.gpus.driver}, so CUDA may not start"
            return error(actual, "the driver's own libcuda", fix)
    return ok("no cuda-compat libcuda is older than the driver")


def _compat_folders(ctx: CheckContext) -> list[str]:
    return [f"/usr/local/{name}/compat" for name in ctx.host.list_dir("/usr/local") if name.startswith("cuda")]


def _libcudas(ctx: CheckContext, folders: Iterable[str]) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    """Yields (folder, file name, version) of each libcuda.so.VERSION in the folders; libcuda.so.1 is only a link to
    one."""
    for folder in folders:
        for name in ctx.host.list_dir(folder):
            if re.fullmatch(r"libcuda\.so\.\d+(\.\d+){1,2}", name):
                yield folder, name, _version_tuple(name)


def _version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", text))


def _torch_cuda() -> tuple[int, int] | None:
    """Returns the CUDA version for which torch was built, without importing torch: from its version ("2.9.0+cu129") or
    the CUDA packages it depends on.

    Returns None if torch is a CPU build or the CUDA version is not known.
    """
    try:
        label = re.search(r"\+cu(\d+)(\d)$", version("torch"))
    except PackageNotFoundError:
        return None
    if label:
        return int(label[1]), int(label[2])
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        try:
            major, minor, *_ = _version_tuple(version(package))
            return major, minor
        except PackageNotFoundError:
            continue
    return None


@gpu_check(
    "G-07", "the driver is new enough for torch's CUDA", needs=("G-01", "G-02", "G-03"), preconditions=(GPUS_PRESENT,)
)
@symptoms(
    "The NVIDIA driver on your system is too old (found version …)",
    "CUDA driver version is insufficient for CUDA runtime version",
)
def driver_supports_cuda(ctx: CheckContext) -> CheckResult:
    """A driver supports all CUDA versions of its own major release and of older ones. A torch that was built for the
    next major release does not start on it."""
    required, supported = _torch_cuda(), ctx.gpus.cuda
    if required is None:
        return skip("torch is a CPU build, or its CUDA version is not known")
    driver = f"driver {ctx.gpus.driver} supports CUDA {supported[0]}.{supported[1]}"
    actual = f"{driver}, torch was built with {required[0]}.{required[1]}"
    if supported[0] < required[0]:
        fix = f"update the driver, or install torch built for CUDA {supported[0]}"
        return error(actual, f"a driver for CUDA {required[0]}", fix)
    return ok(actual)


@gpu_check(
    "G-06",
    "CUDA forward compatibility is used on data-centre GPUs only",
    needs=("G-01", "G-07"),
    preconditions=(GPUS_PRESENT,),
)
@symptoms("Error 804: forward compatibility was attempted on non supported HW")
def forward_compatibility_is_supported(ctx: CheckContext) -> CheckResult:
    """cuda-compat libraries that are newer than the driver work on data-centre GPUs only. On GeForce and similar cards
    CUDA fails with error 804."""
    driver = _version_tuple(ctx.gpus.driver)
    newer = [folder for folder, _, libcuda in _libcudas(ctx, _compat_folders(ctx)) if libcuda > driver]
    consumer = next((g for g in ctx.gpus.all if re.search(r"GeForce|TITAN|RTX (?!A|6000|PRO)", g.name)), None)
    if newer and consumer:
        actual = f"{newer[0]} on {consumer.name}"
        return error(actual, "no cuda-compat folder, unless all GPUs are data-centre GPUs", f"remove {newer[0]}")
    return ok("no cuda-compat library is newer than the driver, or all GPUs are data-centre GPUs")
