"""GPUs: whether they are here, visible, whole, free and fast, and whether driver, CUDA and torch fit them.

Tier 0 asks NVML alone, so no CUDA context is made; tier 1 lets a short-lived process try each GPU.
"""

import re
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

import pynvml

from doctor import probes, xids
from doctor.check import CheckResult, Fix, Repair, Status, check, error, ok, skip, unknown, warn
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm.machine.command_line import redacted_command
from rtp_llm.machine.devices import apply_cuda_visible_devices
from rtp_llm.machine.gpus import APPLICATION_CLOCKS, THROTTLE_REASONS, Gpu

CATEGORY = "gpu"
NO_GPU = "the ranks run on CPU"
PART_IS_RUNNING = "this part is running, and holds it itself"
MIN_FOREIGN_BYTES = 1 << 30  # beyond what a driver or a display keeps for itself
MISSING_LIBRARY = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

_GIVE_GPUS = Fix(
    host="install NVIDIA's driver; nvidia-smi must list the GPUs",
    docker="docker run --gpus all …",
    compose="deploy.resources.reservations.devices: [{driver: nvidia, count: all, capabilities: [gpu]}]",
    kubernetes="resources.limits: {nvidia.com/gpu: N}, and the runtime class of the GPU operator",
)


NOT_SUPPORTED = "this GPU does not tell"


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


def _used(ctx: CheckContext) -> list[Gpu]:
    """The GPUs that the local ranks will take."""
    return ctx.gpus.visible[: ctx.local_ranks] if ctx.on_gpu else []


def _label(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name})"


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


@check(
    "G-10",
    CATEGORY,
    "every rank has a GPU of its own",
    symptoms=(
        "NCCL WARN Duplicate GPU detected : rank … and rank … both on CUDA device …",
        "Multiple Ranks are using the same GPU/Partition",
    ),
    needs=("G-09",),
)
def own_gpu(ctx: CheckContext) -> CheckResult:
    """Two parts on one machine that see the same GPUs, or MIG instances of one GPU, put two ranks on one device: NCCL
    refuses that. Between parts, the gang tier compares the GPUs' UUIDs."""
    used = _used(ctx)
    if not used:
        return skip(NO_GPU)
    twice = [uuid for uuid, count in Counter(gpu.uuid for gpu in used).items() if count > 1]
    if twice:
        return error(f"{twice[0]} would serve two ranks", "one GPU per rank", "CUDA_VISIBLE_DEVICES with distinct GPUs")
    shared = ctx.gang.shared_gpus() if ctx.gang else {}
    if shared:
        uuid, parts = next(iter(shared.items()))
        return error(
            f"{uuid} is used by {' and '.join(parts)}",
            "GPUs of its own for each part",
            "CUDA_VISIBLE_DEVICES=0,1 for the first part of a machine, 2,3 for the second",
        )
    return ok(f"{len(used)} distinct GPUs")


@check(
    "G-11",
    CATEGORY,
    "the ranks' GPUs are alike",
    severity=Status.ERROR,
    symptoms=("The memory capacity is unbalanced. Some GPUs may be occupied by other processes",),
    needs=("G-09",),
)
def same_gpu_model(ctx: CheckContext) -> CheckResult:
    """In tensor parallelism the slowest GPU and the smallest memory set the pace for all."""
    kinds = {gpu.uuid: (gpu.name, gpu.memory_total, gpu.capability) for gpu in _used(ctx)}
    if ctx.gang:
        kinds |= ctx.gang.gpu_kinds()
    if not kinds:
        return skip(NO_GPU)
    names = sorted({name for name, _, _ in kinds.values()})
    totals = [total for _, total, _ in kinds.values()]
    if len({capability for _, _, capability in kinds.values()}) > 1 or min(totals) < 0.9 * max(totals):
        return error(f"mixed: {', '.join(names)}", "GPUs of one kind", "choose alike GPUs with CUDA_VISIBLE_DEVICES")
    if len(names) > 1:
        return warn(f"mixed: {', '.join(names)}", "GPUs of one kind", "choose alike GPUs with CUDA_VISIBLE_DEVICES")
    return ok(f"{len(kinds)} x {names[0]}")


@check(
    "G-12",
    CATEGORY,
    "the compute mode lets ranks in",
    symptoms=("CUDA error: all CUDA-capable devices are busy or unavailable",),
    needs=("G-09",),
)
def compute_mode(ctx: CheckContext) -> CheckResult:
    """In mode EXCLUSIVE_PROCESS a GPU takes a single process, so a rank and anything else (an exporter, an earlier run)
    exclude each other; in mode PROHIBITED it takes none."""
    used = _used(ctx)
    if not used or ctx.running:
        return skip(PART_IS_RUNNING if used else NO_GPU)
    for gpu in used:
        if gpu.compute_mode == pynvml.NVML_COMPUTEMODE_PROHIBITED:
            return error(f"{_label(gpu)} is in mode PROHIBITED", "DEFAULT", f"nvidia-smi -i {gpu.index} -c 0")
        if gpu.compute_mode == pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS:
            judge = error if gpu.processes else warn
            busy = f", and pid {gpu.processes[0].pid} has it" if gpu.processes else ""
            return judge(
                f"{_label(gpu)} is in mode EXCLUSIVE_PROCESS{busy}", "DEFAULT", f"nvidia-smi -i {gpu.index} -c 0"
            )
    return skip(NOT_SUPPORTED) if all(gpu.compute_mode is None for gpu in used) else ok("DEFAULT")


@check(
    "G-13",
    CATEGORY,
    "no rank is on a MIG instance while there are several",
    symptoms=("device >= 0 && device < num_gpus INTERNAL ASSERT FAILED",),
    needs=("G-01", "G-02", "G-03"),
)
def mig(ctx: CheckContext) -> CheckResult:
    """A CUDA process sees one MIG instance at most, and instances cannot reach each other's memory, so tensor
    parallelism over them does not work."""
    sliced = next((gpu for gpu in _used(ctx) if gpu.mig), None)
    if not ctx.gpus.all:
        return skip(NO_GPU)
    if sliced is None:
        return ok("no MIG")
    if ctx.local_ranks > 1 or (ctx.plan and ctx.plan.world_size > 1):
        return error(
            f"{_label(sliced)} is in MIG mode",
            "whole GPUs for TP > 1",
            f"TP_SIZE=1, or nvidia-smi -i {sliced.index} -mig 0",
        )
    return ok("one rank on a MIG instance")


@check(
    "G-14",
    CATEGORY,
    "nobody else holds the GPUs' memory",
    symptoms=(
        "Free memory on device cuda:… (…/… GiB) on startup is less than desired GPU memory utilization",
        "torch.OutOfMemoryError: CUDA out of memory",
    ),
    needs=("G-09",),
    repair=Repair.RESTART,
)
def gpu_memory_free(ctx: CheckContext) -> CheckResult:
    """Another job, or a process of an earlier run that was orphaned, still holds memory. NVML gives the pids of the
    host; from a container they may not be found, which means that the owner is outside of it."""
    used = _used(ctx)
    if not used or ctx.running:
        return skip(PART_IS_RUNNING if used else NO_GPU)
    for gpu in used:
        taken = gpu.memory_total - gpu.memory_free
        if taken <= MIN_FOREIGN_BYTES:
            continue
        owners = (
            ", ".join(_owner(ctx, p.pid) + f" ({format_bytes(p.memory)})" for p in gpu.processes) or "nobody we can see"
        )
        text = f"{_label(gpu)}: {format_bytes(taken)} of {format_bytes(gpu.memory_total)} held by {owners}"
        fix = Fix(
            host=f"stop the owner (fuser -v /dev/nvidia{gpu.index}), or choose other GPUs with CUDA_VISIBLE_DEVICES",
            docker=f"on the host: fuser -v /dev/nvidia{gpu.index}, docker ps; stop the owner",
            kubernetes="find the pod that shares this GPU, or a process that outlived its own",
        )
        if gpu.memory_free < gpu.memory_total // 2:
            return error(text, "at least half of it free", fix)
        return warn(text, "all of it free", fix)
    return ok(f"{format_bytes(min(gpu.memory_free for gpu in used))} free on each")


def _owner(ctx: CheckContext, pid: int) -> str:
    command = redacted_command((ctx.host.read(f"/proc/{pid}/cmdline") or "").split("\0"))
    return f"pid {pid} ({command})" if command else f"host pid {pid}, outside of this pid namespace"


@check(
    "G-15",
    CATEGORY,
    "the GPUs' memory is sound",
    symptoms=(
        "CUDA error: uncorrectable ECC error encountered",
        "Xid (PCI:…): 48",
        "Xid (PCI:…): 94",
        "Xid (PCI:…): 63",
    ),
    needs=("G-01", "G-02", "G-03"),
    repair=Repair.REPLACE,
)
def ecc(ctx: CheckContext) -> CheckResult:
    """HBM rows that fail are replaced by spare ones. A replacement that is pending needs a reset of the GPU; one that
    failed, or errors that were not corrected, need another GPU."""
    used = _used(ctx)
    if not used:
        return skip(NO_GPU)
    for gpu in used:
        if gpu.remap_failure:
            return error(
                f"{_label(gpu)}: replacing a memory row failed", "sound memory", "take this GPU out of service"
            )
        if gpu.ecc_uncorrected:
            fix = f"nvidia-smi -i {gpu.index} -r; if it comes back, take the GPU out of service"
            return error(f"{_label(gpu)}: {gpu.ecc_uncorrected} uncorrected memory errors", "none", fix)
        if gpu.remap_pending or gpu.retired_pending:
            fix = f"nvidia-smi -i {gpu.index} -r, or reboot"
            return warn(f"{_label(gpu)}: a memory row waits to be replaced", "none pending", fix)
    if all(gpu.ecc_uncorrected is None and not gpu.remapped_rows for gpu in used):
        return skip(NOT_SUPPORTED)
    return ok("no uncorrected errors, nothing pending")


@check(
    "G-16",
    CATEGORY,
    "no GPU has fallen off the bus",
    symptoms=(
        "NVRM: Xid (PCI:…): 79, … GPU has fallen off the bus",
        "GPU is lost. Reboot the system to recover this GPU",
        "Unable to determine the device handle for GPU …",
    ),
    needs=("G-01", "G-02", "G-03"),
    repair=Repair.REBOOT,
)
def gpus_on_bus(ctx: CheckContext) -> CheckResult:
    """A GPU that lost its power or its link answers nothing any more. The kernel's log has an Xid for that and for what
    else the driver reports of its hardware; a container may often not read it."""
    if not ctx.gpus.all and not ctx.gpus.failed:
        return skip(NO_GPU)
    log = ctx.host.kernel_log
    if ctx.gpus.failed:
        index, code = ctx.gpus.failed[0]
        said = xids.xids_of_unknown_gpus(log or "", [gpu.bus for gpu in ctx.gpus.all])
        last = f"; the kernel reported Xid {said[-1][1]} of {said[-1][0]}" if said else ""
        actual = f"GPU {index}: {pynvml.NVMLError(code)}{last}"
        return error(actual, "an answer", "drain this machine and reboot it", code=code)
    reported = [(gpu, xid) for gpu in _used(ctx) for xid in xids.xids_of_gpu(log or "", gpu.bus)]
    if reported:
        gpu, xid = reported[-1]
        what, remedy = xids.MEANINGS[xid]
        count = f"; {len(reported)} such reports in all" if len(reported) > 1 else ""
        fix = remedy.format(gpu=gpu.index)
        return warn(f"{_label(gpu)} ({gpu.bus}): Xid {xid}, {what}, since the driver was loaded{count}", "no Xid", fix)
    unread = "; /dev/kmsg cannot be read, so Xids are not seen" if log is None else ", and the kernel reported no Xid"
    return ok(f"all {len(ctx.gpus.all)} GPUs answer{unread}")


@check("G-17", CATEGORY, "no GPU is slowed down by heat or power", severity=Status.WARN, needs=("G-09",))
def throttled(ctx: CheckContext) -> CheckResult:
    """A GPU that is too hot, or gets too little power, lowers its clock, and all other ranks wait for it."""
    used = _used(ctx)
    if not used:
        return skip(NO_GPU)
    for gpu in used:
        reasons = [text for bit, text in THROTTLE_REASONS.items() if (gpu.clock_reasons or 0) & bit]
        if reasons:
            return warn(
                f"{_label(gpu)}, {gpu.temperature} C: {', '.join(reasons)}", "no slowdown", "check cooling and power"
            )
        if gpu.temperature and gpu.slowdown_temperature and gpu.temperature >= gpu.slowdown_temperature - 2:
            return warn(f"{_label(gpu)}: {gpu.temperature} C", f"below {gpu.slowdown_temperature} C", "check cooling")
    temperatures = [gpu.temperature for gpu in used if gpu.temperature is not None]
    if not temperatures and all(gpu.clock_reasons is None for gpu in used):
        return skip(NOT_SUPPORTED)
    return ok(f"at most {max(temperatures)} C" if temperatures else "no slowdown")


@check("G-18", CATEGORY, "the driver stays loaded", severity=Status.WARN, needs=("G-09",))
def persistence(ctx: CheckContext) -> CheckResult:
    """Without persistence mode the driver leaves when the last process does, and every start waits seconds for it."""
    used = _used(ctx)
    if not used:
        return skip(NO_GPU)
    if all(gpu.persistence is None for gpu in used):
        return skip(NOT_SUPPORTED)
    off = [str(gpu.index) for gpu in used if gpu.persistence is False]
    return ok(
        f"persistence mode is off on GPU {', '.join(off)}: starts take longer" if off else "persistence mode is on"
    )


@check("G-19", CATEGORY, "the GPUs' PCIe links have their full width", severity=Status.WARN, needs=("G-09",))
def pcie(ctx: CheckContext) -> CheckResult:
    """A card that is not seated well trains with fewer lanes, and copies to and from it are slower by as much. (The
    link's generation is not judged: it drops when idle.)"""
    used = _used(ctx)
    if not used:
        return skip(NO_GPU)
    for gpu in used:
        if gpu.pcie_width and gpu.pcie_width_max and gpu.pcie_width < gpu.pcie_width_max:
            fix = "seat the card anew, and look at the BIOS"
            return warn(f"{_label(gpu)}: {gpu.pcie_width} PCIe lanes", f"{gpu.pcie_width_max}", fix)
    widths = [gpu.pcie_width for gpu in used if gpu.pcie_width]
    return ok(f"{min(widths)} lanes") if widths else skip(NOT_SUPPORTED)


@check("G-20", CATEGORY, "no application clocks are set", severity=Status.WARN, needs=("G-09",))
def clocks_not_lowered(ctx: CheckContext) -> CheckResult:
    """Somebody may have pinned the clocks for a measurement. For information."""
    used = _used(ctx)
    if not used:
        return skip(NO_GPU)
    if all(gpu.clock_reasons is None for gpu in used):
        return skip(NOT_SUPPORTED)
    pinned = [str(gpu.index) for gpu in used if (gpu.clock_reasons or 0) & APPLICATION_CLOCKS]
    return ok(
        f"application clocks are set on GPU {', '.join(pinned)} (nvidia-smi -rac)" if pinned else "clocks are free"
    )


@check(
    "G-04",
    CATEGORY,
    "CUDA starts and computes on every GPU",
    symptoms=("Error 802: system not yet initialized", "CUDA error: an illegal memory access was encountered"),
    needs=("G-05", "G-06", "G-07", "G-09", "G-12", "G-16"),
    timeout=60,
    repair=Repair.REBOOT,
)
def computes(ctx: CheckContext) -> CheckResult:
    """On NVSwitch machines CUDA starts only after the fabric manager, of the driver's own version, has set up the
    switches. Tier 1 lets a process of its own compute on every GPU, and kills it if it hangs."""
    used = _used(ctx)
    if not used:
        return skip(NO_GPU)
    completed = pynvml.NVML_GPU_FABRIC_STATE_COMPLETED
    waiting = next((g for g in used if g.fabric_state not in (None, 0, completed)), None)
    if waiting:
        fix = f"on the host: systemctl restart nvidia-fabricmanager (version {ctx.gpus.driver})"
        return error(f"{_label(waiting)}: its NVSwitch fabric is not set up", "fabric state completed", fix)
    if ctx.tier < 1:
        return skip("--tier 1 lets a process compute on each")
    failures = {gpu.index: text for gpu, text in probes.probe_compute(used).items() if text}
    if failures:
        index, text = next(iter(failures.items()))
        return error(f"GPU {index}: {text}", "a correct product of two matrices", "see the message; then nvidia-smi -q")
    return ok(f"{len(used)} GPUs allocate and compute")


@check(
    "G-08",
    CATEGORY,
    "torch has kernels for these GPUs",
    symptoms=(
        "no kernel image is available for execution on the device",
        "with CUDA capability sm_… is not compatible with the current PyTorch installation",
    ),
    needs=("G-04",),
    timeout=60,
)
def architectures(ctx: CheckContext) -> CheckResult:
    """A build of torch holds machine code for some GPU generations. Tier 1 asks it for the list."""
    used = _used(ctx)
    if not used:
        return skip(NO_GPU)
    if ctx.tier < 1:
        return skip("--tier 1 asks torch")
    known = probes.architectures()
    if known is None:
        return unknown("torch cannot be asked for its architectures")
    for gpu in used:
        if gpu.capability and not probes.supports_capability(known, gpu.capability):
            wanted = "sm_" + "".join(map(str, gpu.capability))
            return error(
                f"{_label(gpu)} is {wanted}, torch has {', '.join(known)}", wanted, "install a torch build that has it"
            )
    return ok(", ".join(known))
