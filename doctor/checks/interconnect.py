"""How the GPUs of this machine reach each other: peer access, NVLink, PCIe topology, NUMA."""

from collections import Counter

import pynvml

from doctor import probes
from doctor.check import CheckResult, Repair, Status, check, error, ok, skip, warn
from doctor.context import CheckContext
from rtp_llm.machine.gpus import GpuPair

CATEGORY = "interconnect"
FEWER_THAN_TWO_GPUS = "fewer than two GPUs are used"
P2P_STATUS = {
    1: "chipset does not support it",
    2: "topology does not support it",
    3: "disabled by a registry key",
    4: "not supported",
    5: "unknown",
}


def _pairs(ctx: CheckContext) -> list[GpuPair]:
    used = {gpu.index for gpu in ctx.gpus.visible[: ctx.local_ranks]} if ctx.on_gpu else set()
    return [pair for pair in ctx.gpus.pairs if {pair.a, pair.b} <= used]


@check(
    "P-02",
    CATEGORY,
    "GPUs joined by NVLink reach each other's memory",
    symptoms=("P2P is disabled between NVLINK connected GPUs … and …",),
    needs=("G-09", "G-16"),
    repair=Repair.REPLACE,
)
def nvml_p2p(ctx: CheckContext) -> CheckResult:
    """The driver says for each pair whether one GPU can read the other's memory. Between GPUs with NVLink it always
    should; where it does not, the hardware is at fault."""
    pairs = _pairs(ctx)
    if not pairs:
        return skip(FEWER_THAN_TWO_GPUS)
    bad = [pair for pair in pairs if pair.nvlink == 0 and pair.p2p not in (None, 0)]
    if bad:
        pair = bad[0]
        why = P2P_STATUS.get(pair.p2p or 0, "no reason given")
        return error(f"GPU {pair.a} and {pair.b}: {why}", "peer access over NVLink", "drain this machine")
    if all(pair.p2p is None for pair in pairs):
        return skip("these GPUs do not tell")
    able = sum(pair.p2p == 0 for pair in pairs)
    return ok(f"{able} of {len(pairs)} pairs have peer access" + ("" if able else "; NCCL goes through host memory"))


@check(
    "P-03", CATEGORY, "all NVLinks are up", severity=Status.WARN, symptoms=("Xid (PCI:…): 74",), needs=("G-09", "G-16")
)
def nvlinks(ctx: CheckContext) -> CheckResult:
    """The number of links that are up should be the same on all GPUs of one kind: the majority says what is right."""
    used = ctx.gpus.visible[: ctx.local_ranks] if ctx.on_gpu else []
    ups = Counter(gpu.nvlinks[0] for gpu in used)
    if len(used) < 2 or not any(gpu.nvlinks[1] for gpu in used):
        return skip("no NVLink" if len(used) > 1 else FEWER_THAN_TWO_GPUS)
    usual = ups.most_common(1)[0][0]
    low = next((gpu for gpu in used if gpu.nvlinks[0] < max(usual, gpu.nvlinks[1])), None)
    if low:
        text = f"GPU {low.index}: {low.nvlinks[0]} of {max(usual, low.nvlinks[1])} NVLinks are up"
        return warn(text, "all of them", "reset the GPUs, then look at the fabric manager's log")
    return ok(f"{usual} links up on each GPU")


@check(
    "P-04",
    CATEGORY,
    "the NVSwitch fabric is ready",
    symptoms=("NCCL WARN … MNNVL …",),
    needs=("G-09", "G-16"),
    repair=Repair.REBOOT,
)
def fabric(ctx: CheckContext) -> CheckResult:
    """On NVSwitch machines each GPU registers with the fabric; until all have, CUDA answers error 802."""
    states = [gpu.fabric_state for gpu in ctx.gpus.visible[: ctx.local_ranks]] if ctx.on_gpu else []
    known = [state for state in states if state not in (None, pynvml.NVML_GPU_FABRIC_STATE_NOT_SUPPORTED)]
    if not known:
        return skip("no NVSwitch fabric")
    ready = sum(state == pynvml.NVML_GPU_FABRIC_STATE_COMPLETED for state in known)
    if ready < len(known):
        fix = "on the host: systemctl restart nvidia-fabricmanager"
        return error(f"{ready} of {len(known)} GPUs have joined the fabric", "all of them", fix)
    return ok(f"{ready} GPUs have joined the fabric")


@check("P-05", CATEGORY, "the GPUs are near each other", severity=Status.WARN, needs=("G-09",))
def topology(ctx: CheckContext) -> CheckResult:
    """Without NVLink, data between GPUs under different CPU sockets crosses the link between the sockets."""
    pairs = _pairs(ctx)
    if not pairs:
        return skip(FEWER_THAN_TWO_GPUS)
    far = [p for p in pairs if p.topology is not None and p.topology >= pynvml.NVML_TOPOLOGY_SYSTEM and p.nvlink != 0]
    if far:
        fix = "choose GPUs under one socket with CUDA_VISIBLE_DEVICES (nvidia-smi topo -m)"
        return warn(f"GPU {far[0].a} and {far[0].b} are under different sockets, without NVLink", "one socket", fix)
    return ok("no pair crosses the sockets without NVLink")


@check("P-06", CATEGORY, "the cores are on the GPUs' side of the machine", severity=Status.WARN, needs=("G-09",))
def numa(ctx: CheckContext) -> CheckResult:
    """A rank whose cores are on the other socket launches its kernels more slowly."""
    used = ctx.gpus.visible[: ctx.local_ranks] if ctx.on_gpu else []
    if not used:
        return skip("the ranks run on CPU")
    nodes = {g.index: ctx.host.read_int(f"/sys/bus/pci/devices/{g.bus}/numa_node") for g in used}
    cores = _numa_of_cores(ctx)
    away = [
        index for index, number in nodes.items() if number is not None and number >= 0 and cores and number not in cores
    ]
    if away:
        wanted = ",".join(str(nodes[i]) for i in away)
        return warn(
            f"GPU {away[0]} is on NUMA node {nodes[away[0]]}, the cores are on {sorted(cores)}",
            f"cores of node {wanted}",
            f"docker run --cpuset-cpus=$(cat /sys/devices/system/node/node{wanted}/cpulist) …",
        )
    return ok("cores and GPUs share their NUMA nodes")


def _numa_of_cores(ctx: CheckContext) -> set[int]:
    """NUMA nodes that have one of the cores this process may use."""
    allowed = parse_cpu_list(ctx.host.status.get("Cpus_allowed_list", ""))
    found = set()
    for name in ctx.host.list_dir("/sys/devices/system/node"):
        number = name.removeprefix("node")
        listed = ctx.host.read(f"/sys/devices/system/node/{name}/cpulist") if number.isdigit() else None
        if listed and parse_cpu_list(listed) & allowed:
            found.add(int(number))
    return found


def parse_cpu_list(text: str) -> set[int]:
    """ "0-3,8" as the kernel writes it."""
    found: set[int] = set()
    for piece in filter(None, text.strip().split(",")):
        first, _, last = piece.partition("-")
        if piece.isascii() and first.isdigit() and (last or first).isdigit():
            found |= set(range(int(first), int(last or first) + 1))
    return found


@check("P-07", CATEGORY, "NCCL can see the PCI tree", severity=Status.WARN, needs=("G-09",))
def sysfs(ctx: CheckContext) -> CheckResult:
    """NCCL reads the topology from /sys. Where that is hidden it assumes one, and chooses slow ways."""
    used = ctx.gpus.visible[: ctx.local_ranks] if ctx.on_gpu else []
    if len(used) < 2:
        return skip(FEWER_THAN_TWO_GPUS)
    hidden = [gpu for gpu in used if not ctx.host.exists(f"/sys/bus/pci/devices/{gpu.bus}")]
    if hidden:
        return warn(
            f"/sys/bus/pci/devices/{hidden[0].bus} is not there",
            "the PCI tree",
            "mount /sys read-only into the container",
        )
    return ok("every GPU is in /sys")


@check("P-08", CATEGORY, "network cards can reach the GPUs' memory", severity=Status.WARN, needs=("G-09",))
def gpudirect(ctx: CheckContext) -> CheckResult:
    """With GPUDirect RDMA data between machines skips main memory. It needs nvidia-peermem, or the open kernel module
    with DMA-BUF."""
    if not ctx.on_gpu or not ctx.plan or not ctx.plan.is_multi_part or not ctx.host.list_dir("/sys/class/infiniband"):
        return skip("no RDMA between parts")
    modules = ("/sys/module/nvidia_peermem/version", "/sys/kernel/mm/memory_peers/nv_mem/version")
    open_module = "Open Kernel Module" in (ctx.host.read("/proc/driver/nvidia/version") or "")
    if open_module or any(ctx.host.exists(path) for path in modules):
        return ok("GPUDirect RDMA can be used")
    return warn(
        "neither nvidia-peermem nor the open kernel module", "one of them", "on the host: modprobe nvidia-peermem"
    )


@check(
    "P-01",
    CATEGORY,
    "what one GPU writes into another's memory arrives",
    symptoms=("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1",),
    needs=("G-04", "P-02"),
    timeout=120,
    repair=Repair.REBOOT,
)
def peer_writes(ctx: CheckContext) -> CheckResult:
    """Access control (ACS) on PCIe bridges and a translating IOMMU can make peer writes vanish: the first all-reduce
    then hangs with the GPUs at 100 %, or numbers are wrong in silence. The driver still says "supported", so tier 1
    writes a pattern on each GPU and reads it on every other, both directions, in a process that can be killed."""
    pairs = _pairs(ctx)
    if not pairs:
        return skip(FEWER_THAN_TWO_GPUS)
    if ctx.tier < 1:
        iommu = ctx.host.list_dir("/sys/class/iommu")
        return skip("--tier 1 writes and reads back" + ("; an IOMMU is active" if iommu else ""))
    order = [gpu.index for gpu in ctx.gpus.visible[: ctx.local_ranks]]
    failures = probes.probe_peer_copies(order)
    if failures:
        one, other, text = failures[0]
        fix = "iommu=pt and ACS off in the BIOS; until then NCCL_P2P_DISABLE=1"
        return error(f"GPU {one} -> GPU {other}: {text}", "the pattern that was written", fix)
    return ok(f"{len(order) * (len(order) - 1)} directions verified")
