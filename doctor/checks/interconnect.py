"""Checks of the connections between the GPUs of this machine: peer access, NVLink, PCIe and NUMA topology."""

from collections import Counter

import pynvml

from doctor import probes
from doctor.check import CheckResult, Repair, Status, error, ok, skip, symptoms, warn
from doctor.checks.categories import interconnect_check
from doctor.checks.preconditions import GPUS_USED, RDMA_BETWEEN_PARTS, TWO_GPUS_USED
from doctor.context import CheckContext
from doctor.host import parse_number_ranges
from rtp_llm.machine.gpus import GpuPair

FEWER_THAN_TWO_GPUS = "fewer than two GPUs are used"
P2P_STATUS = {  # nvml.h, nvmlGpuP2PStatus_t
    1: "not supported by the chipset",
    2: "not supported by the topology",
    3: "disabled by a registry key",
    4: "not supported",
    5: "unknown",
}


def _pairs(ctx: CheckContext) -> list[GpuPair]:
    used = {gpu.index for gpu in ctx.used_gpus}
    return [pair for pair in ctx.gpus.pairs if {pair.a, pair.b} <= used]


@interconnect_check("P-02", "GPUs connected by NVLink have peer access", needs=("G-09", "G-16"), repair=Repair.REPLACE)
@symptoms("P2P is disabled between NVLINK connected GPUs … and …")
def nvlink_has_peer_access(ctx: CheckContext) -> CheckResult:
    """The driver reports for each pair whether one GPU can read the other's memory. Over NVLink this should always
    work; if it does not, the hardware is faulty."""
    pairs = _pairs(ctx)
    if not pairs:
        return skip(FEWER_THAN_TWO_GPUS)
    for pair in pairs:
        if pair.nvlink == 0 and pair.p2p not in (None, 0):
            reason = P2P_STATUS.get(pair.p2p or 0, "no reason reported")
            actual = f"no peer access between GPU {pair.a} and {pair.b}: {reason}"
            return error(actual, "peer access over NVLink", "drain this machine")
    if all(pair.p2p is None for pair in pairs):
        return skip("these GPUs do not report peer access")
    num_able = sum(pair.p2p == 0 for pair in pairs)
    fallback = "" if num_able else "; NCCL copies through host memory"
    return ok(f"{num_able} of {len(pairs)} pairs have peer access{fallback}")


@interconnect_check(
    "P-03", "all NVLinks are up", severity=Status.WARN, needs=("G-09", "G-16"), preconditions=(TWO_GPUS_USED,)
)
@symptoms("Xid (PCI:…): 74")
def nvlinks_are_up(ctx: CheckContext) -> CheckResult:
    """All GPUs of one model should have the same number of active NVLinks. The check expects on each GPU
    the larger of two numbers: the links that this GPU has in total, and the links that are active on most GPUs."""
    used = ctx.used_gpus
    if not any(gpu.nvlinks[1] for gpu in used):
        return skip("these GPUs have no NVLink")
    usual = Counter(gpu.nvlinks[0] for gpu in used).most_common(1)[0][0]
    for gpu in used:
        num_up, num_expected = gpu.nvlinks[0], max(usual, gpu.nvlinks[1])
        if num_up < num_expected:
            fix = "reset the GPUs, then look at the fabric manager's log"
            return warn(f"GPU {gpu.index}: {num_up} of {num_expected} NVLinks are up", "all NVLinks up", fix)
    return ok(f"{usual} NVLinks are up on each GPU")


@interconnect_check("P-04", "the NVSwitch fabric is ready", needs=("G-09", "G-16"), repair=Repair.REBOOT)
@symptoms("NCCL WARN … MNNVL …")
def fabric_is_ready(ctx: CheckContext) -> CheckResult:
    """On NVSwitch machines each GPU registers with the fabric. Until all have registered, CUDA fails with error 802."""
    unsupported = (None, pynvml.NVML_GPU_FABRIC_STATE_NOT_SUPPORTED)
    states = [gpu.fabric_state for gpu in ctx.used_gpus if gpu.fabric_state not in unsupported]
    if not states:
        return skip("these GPUs have no NVSwitch fabric")
    num_ready = sum(state == pynvml.NVML_GPU_FABRIC_STATE_COMPLETED for state in states)
    if num_ready < len(states):
        fix = "on the host: systemctl restart nvidia-fabricmanager"
        return error(f"{num_ready} of {len(states)} GPUs have joined the NVSwitch fabric", "all GPUs", fix)
    return ok(f"{num_ready} GPUs have joined the NVSwitch fabric")


@interconnect_check("P-05", "the GPUs are on one CPU socket, or connected by NVLink", severity=Status.WARN)
def gpus_share_socket(ctx: CheckContext) -> CheckResult:
    """Without NVLink, data between GPUs on different CPU sockets crosses the link between the sockets, which is
    slower."""
    pairs = _pairs(ctx)
    if not pairs:
        return skip(FEWER_THAN_TWO_GPUS)
    for pair in pairs:
        if (pair.topology or 0) >= pynvml.NVML_TOPOLOGY_SYSTEM and pair.nvlink != 0:
            actual = f"GPU {pair.a} and {pair.b} are on different CPU sockets, without NVLink"
            fix = "choose GPUs on one socket with CUDA_VISIBLE_DEVICES (nvidia-smi topo -m)"
            return warn(actual, "GPUs on one CPU socket", fix)
    return ok("no two GPUs on different sockets without NVLink")


@interconnect_check(
    "P-06", "the CPU cores are on the NUMA nodes of the GPUs", severity=Status.WARN, preconditions=(GPUS_USED,)
)
def cores_share_numa_node(ctx: CheckContext) -> CheckResult:
    """A rank whose CPU cores are on another NUMA node than its GPU launches its kernels more slowly."""
    numa_nodes = {g.index: ctx.host.read_int(f"/sys/bus/pci/devices/{g.bus}/numa_node") for g in ctx.used_gpus}
    cores_nodes = _numa_nodes_of_cores(ctx)
    remote = {i: n for i, n in numa_nodes.items() if n is not None and n >= 0 and cores_nodes and n not in cores_nodes}
    if remote:
        index, numa_node = next(iter(remote.items()))
        expected = ",".join(map(str, remote.values()))
        cores = ",".join(map(str, sorted(cores_nodes)))
        actual = f"GPU {index} is on NUMA node {numa_node}, this process's CPU cores are on NUMA node {cores}"
        fix = f"docker run --cpuset-cpus=$(cat /sys/devices/system/node/node{expected}/cpulist) …"
        return warn(actual, f"CPU cores of NUMA node {expected}", fix)
    return ok("the CPU cores are on the NUMA nodes of the GPUs")


def _numa_nodes_of_cores(ctx: CheckContext) -> set[int]:
    """Returns the NUMA nodes of the CPU cores that this process may use."""
    allowed = parse_number_ranges(ctx.host.status.get("Cpus_allowed_list", ""))
    numa_nodes = set()
    for name in ctx.host.list_dir("/sys/devices/system/node"):
        number = name.removeprefix("node")
        cpus = ctx.host.read(f"/sys/devices/system/node/{name}/cpulist") if number.isdigit() else None
        if cpus and parse_number_ranges(cpus) & allowed:
            numa_nodes.add(int(number))
    return numa_nodes


@interconnect_check("P-07", "NCCL can read the PCI topology", severity=Status.WARN, preconditions=(TWO_GPUS_USED,))
def pci_topology_is_readable(ctx: CheckContext) -> CheckResult:
    """NCCL reads the topology from /sys. If it is hidden, NCCL assumes a topology and chooses slow paths."""
    for gpu in ctx.used_gpus:
        path = f"/sys/bus/pci/devices/{gpu.bus}"
        if not ctx.host.exists(path):
            return warn(f"{path} does not exist", "the PCI devices in /sys", "mount /sys read-only into the container")
    return ok("every GPU is visible in /sys/bus/pci")


@interconnect_check("P-08", "GPUDirect RDMA is available", severity=Status.WARN, preconditions=(RDMA_BETWEEN_PARTS,))
def gpudirect_is_available(ctx: CheckContext) -> CheckResult:
    """With GPUDirect RDMA, network cards access GPU memory directly, and data between machines bypasses main memory. It
    needs nvidia-peermem, or the open kernel module with DMA-BUF."""
    modules = ("/sys/module/nvidia_peermem/version", "/sys/kernel/mm/memory_peers/nv_mem/version")
    is_open_module = "Open Kernel Module" in (ctx.host.read("/proc/driver/nvidia/version") or "")
    if is_open_module or any(ctx.host.exists(path) for path in modules):
        return ok("GPUDirect RDMA can be used")
    fix = "on the host: modprobe nvidia-peermem"
    return warn("neither nvidia-peermem nor the open kernel module is loaded", "one of the two loaded", fix)


@interconnect_check(
    "P-01", "peer writes between GPUs arrive", needs=("G-04", "P-02"), timeout=120, repair=Repair.REBOOT
)
@symptoms("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1")
def peer_writes_arrive(ctx: CheckContext) -> CheckResult:
    """Access control (ACS) on PCIe bridges, or an IOMMU that translates addresses, can lose peer writes: the first
    all-reduce then hangs with the GPUs at 100 %, or results are silently wrong. The driver still reports "supported",
    so with `--tier 1` (active tests that load the hardware) a process that can be killed writes a pattern from each GPU
    to each other GPU and reads it back."""
    if not _pairs(ctx):
        return skip(FEWER_THAN_TWO_GPUS)
    if ctx.tier < 1:
        iommu = "; an IOMMU is active" if ctx.host.list_dir("/sys/class/iommu") else ""
        return skip(f"needs --tier 1, which copies data between all GPUs{iommu}")
    indices = [gpu.index for gpu in ctx.used_gpus]
    failures = probes.probe_peer_copies(indices)
    if failures:
        source, target, failure = failures[0]
        fix = "iommu=pt and ACS off in the BIOS; until then NCCL_P2P_DISABLE=1"
        return error(f"GPU {source} -> GPU {target}: {failure}", "the pattern that was written", fix)
    return ok(f"correct copies in {len(indices) * (len(indices) - 1)} directions between GPUs")
