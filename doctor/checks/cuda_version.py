"""Versions of driver, libcuda and torch's CUDA."""

import re
from importlib.metadata import PackageNotFoundError, version

from doctor.check import CheckResult, check, error, ok, skip
from doctor.context import CheckContext

CATEGORY = "gpu"
NO_GPU = "the ranks run on CPU"


@check(
    "G-05",
    CATEGORY,
    "no forward-compatible libcuda hides the driver's",
    symptoms=("Error 803: system has unsupported display driver / cuda driver combination",),
    needs=("G-01", "G-02", "G-03"),
)
def compat(ctx: CheckContext) -> CheckResult:
    """Images with NVIDIA's cuda-compat package bring a libcuda of their own. If the loader finds it before the one that
    the runtime mounts, and the driver is newer, CUDA does not start."""
    if not ctx.gpus.driver:
        return skip(NO_GPU)
    path = ctx.host.environ.get("LD_LIBRARY_PATH", "")
    folders = [f for f in path.split(":") if "compat" in f] + [
        f"/usr/local/{name}/compat" for name in ctx.host.list_dir("/usr/local") if name.startswith("cuda")
    ]
    for folder in folders:
        for name in ctx.host.list_dir(folder):
            found = re.fullmatch(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)?)", name)
            if found and _numbers(found[1]) < _numbers(ctx.gpus.driver):
                fix = f"remove {folder}, or set LD_LIBRARY_PATH=/usr/local/nvidia/lib64"
                return error(f"{folder}/{name} is older than driver {ctx.gpus.driver}", "the driver's own libcuda", fix)
    return ok("only the driver's libcuda")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(piece) for piece in re.findall(r"\d+", text))


def _torch_cuda() -> tuple[int, int] | None:
    """The CUDA that torch was built with, from its label ("+cu129") or the packages it brought, without importing it;
    None where that cannot be told."""
    try:
        label = re.search(r"\+cu(\d+)(\d)$", version("torch"))
    except PackageNotFoundError:
        return None
    if label:
        return int(label[1]), int(label[2])
    for package in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        try:
            numbers = _numbers(version(package))
            return numbers[0], numbers[1]
        except PackageNotFoundError:
            continue
    return None


@check(
    "G-07",
    CATEGORY,
    "the driver is new enough for torch's CUDA",
    symptoms=(
        "The NVIDIA driver on your system is too old (found version …)",
        "CUDA driver version is insufficient for CUDA runtime version",
    ),
    needs=("G-01", "G-02", "G-03"),
)
def driver_age(ctx: CheckContext) -> CheckResult:
    """A driver serves all CUDA versions of its own major release and older ones; torch built for the next major
    release does not start on it."""
    if not ctx.gpus.all:
        return skip(NO_GPU)
    wanted = _torch_cuda()
    if wanted is None:
        return skip("this torch is a CPU build, or says nothing of its CUDA")
    have = ctx.gpus.cuda
    text = f"driver {ctx.gpus.driver} serves CUDA {have[0]}.{have[1]}, torch was built with {wanted[0]}.{wanted[1]}"
    if have[0] < wanted[0]:
        return error(
            text, f"a driver for CUDA {wanted[0]}", f"update the driver, or install torch built for CUDA {have[0]}"
        )
    return ok(text)


@check(
    "G-06",
    CATEGORY,
    "forward compatibility is not attempted where it cannot work",
    symptoms=("Error 804: forward compatibility was attempted on non supported HW",),
    needs=("G-01", "G-07"),
)
def forward(ctx: CheckContext) -> CheckResult:
    """cuda-compat libraries newer than the driver work on data-centre GPUs only."""
    if not ctx.gpus.all:
        return skip(NO_GPU)
    folders = [f"/usr/local/{n}/compat" for n in ctx.host.list_dir("/usr/local") if n.startswith("cuda")]
    newer = [f for f in folders for n in ctx.host.list_dir(f) if n.startswith("libcuda.so.") and _newer(n, ctx)]
    consumer = next((g for g in ctx.gpus.all if re.search(r"GeForce|TITAN|RTX (?!A|6000|PRO)", g.name)), None)
    if newer and consumer:
        return error(f"{newer[0]} on {consumer.name}", "a data-centre GPU, or no compat folder", f"remove {newer[0]}")
    return ok("not attempted")


def _newer(name: str, ctx: CheckContext) -> bool:
    numbers = _numbers(name.removeprefix("libcuda.so."))
    return len(numbers) > 1 and numbers > _numbers(ctx.gpus.driver)
