"""Faults of GPUs and their links on a fake machine with eight GPUs. The doctor must find the fault that
the test adds and no other."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest

from doctor import probes
from doctor.check import REGISTRY
from doctor.context import CheckContext
from doctor.nccl import Nccl, effective_settings
from rtp_llm.machine.devices import apply_cuda_visible_devices
from rtp_llm.machine.gpus import Gpu, GpuInventory, GpuPair, GpuProcess
from tests.doctor.fixtures import GIB, FakeHost, by_id, fix, problems, run_context_checks

H100 = "NVIDIA H100 80GB HBM3"


def healthy_gpu(index: int) -> Gpu:
    return Gpu(
        index=index,
        uuid=f"GPU-{index:08d}",
        name=H100,
        bus=f"0000:{index + 16:02x}:00.0",
        memory_total=80 * GIB,
        memory_free=79 * GIB,
        capability=(9, 0),
        compute_mode=0,
        ecc_uncorrected=0,
        temperature=35,
        slowdown_temperature=87,
        persistence=True,
        pcie_width=16,
        pcie_width_max=16,
        pcie_replays=0,
        fabric_state=3,
        nvlinks=(18, 18),
    )


def healthy_gpus(count: int = 8, visible: str | None = None) -> GpuInventory:
    found = tuple(healthy_gpu(index) for index in range(count))
    pairs = tuple(GpuPair(a, b, p2p=0, nvlink=0, topology=50) for a in range(count) for b in range(a + 1, count))
    return GpuInventory(
        driver="570.86.15",
        cuda=(12, 8),
        all=found,
        pairs=pairs,
        selection=apply_cuda_visible_devices([g.uuid for g in found], visible),
    )


class FakeGpuPart:
    """A healthy part with eight GPUs and eight ranks. A test changes it to add a fault."""

    def __init__(self, root: Path):
        self.environ = {"TP_SIZE": "8", "JSON_MODEL_OVERRIDE_ARGS": '{"num_attention_heads": 16}'}
        self.host = FakeHost(root, self.environ)
        self.host.environ = self.environ | dict(self.host.environ)
        self.host.memory, self.host.fake_cores = 1024 * GIB, 64
        self.gpus = healthy_gpus()
        self.nccl_version: tuple[int, ...] = ()
        self.numa = True
        for index in range(8):
            self.host.write(f"/dev/nvidia{index}", "")
            self.host.write(f"/sys/bus/pci/devices/0000:{index + 16:02x}:00.0/numa_node", "0\n")
        self.host.write("/dev/nvidia-uvm", "")
        self.host.write("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  x\n")
        self.host.write("/proc/self/status", self.host.read("/proc/self/status").replace("0-7", "0-63"))  # type: ignore[union-attr]
        self.host.write("/sys/devices/system/node/node0/cpulist", "0-31\n")
        self.host.write("/sys/devices/system/node/node1/cpulist", "32-63\n")

    def set(self, **environ: str) -> None:
        self.host.environ = dict(self.host.environ) | environ

    def set_readings(self, index: int, **readings: Any) -> None:
        found = tuple(replace(g, **readings) if g.index == index else g for g in self.gpus.all)
        self.gpus = replace(self.gpus, all=found)

    def limit(self, name: str, value: str) -> None:
        """Sets the soft and hard limit in /proc/self/limits."""
        lines = (self.host.read("/proc/self/limits") or "").splitlines()
        changed = [f"{name:<26}{value:<21}{value:<21}" if line.startswith(name) else line for line in lines]
        self.host.write("/proc/self/limits", "\n".join(changed) + "\n")

    def nccl(self, version: tuple[int, ...], numa: bool = True) -> None:
        """Sets the NCCL version; `numa`: whether NUMA system calls are allowed."""
        self.nccl_version, self.numa = version, numa

    def use_consumer_gpus(self, compat: str) -> None:
        """Replaces the GPUs by consumer cards, and adds a libcuda newer than the driver."""
        for gpu in self.gpus.all:
            self.set_readings(gpu.index, name="NVIDIA GeForce RTX 4090", fabric_state=None, nvlinks=(0, 0))
        self.host.write(compat, "")

    def duplicate_gpu(self) -> None:
        """Gives two GPUs the same UUID, as two MIG instances of one GPU."""
        self.set_readings(1, uuid="GPU-00000000")

    def ctx(self, tier: int = 0) -> CheckContext:
        ctx = CheckContext(self.host, tier=tier)
        visible = self.host.environ.get("CUDA_VISIBLE_DEVICES")
        selection = apply_cuda_visible_devices([gpu.uuid for gpu in self.gpus.all], visible)
        ctx.__dict__["gpus"] = replace(self.gpus, selection=selection) if self.gpus.all else self.gpus
        ctx.__dict__["nccl"] = Nccl(effective_settings(self.host), self.nccl_version)
        return ctx


@pytest.fixture
def gpu_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpuPart:
    part = FakeGpuPart(tmp_path)
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", lambda planned: "")  # not this machine's ports
    monkeypatch.setattr("doctor.checks.shm.numa_allowed", lambda host: part.numa)
    monkeypatch.setattr("doctor.checks.cuda_version._torch_cuda", lambda: (12, 8))
    return part


def fail_nvml(gpu_part: FakeGpuPart, failure: int) -> None:
    gpu_part.gpus = GpuInventory(failure=failure)
    gpu_part.set(TP_SIZE="1", RTP_DEVICE="cuda")


def set_pairs(gpu_part: FakeGpuPart, *pairs: GpuPair) -> None:
    gpu_part.gpus = replace(gpu_part.gpus, pairs=pairs)


def add_rdma_cards(gpu_part: FakeGpuPart, *, files: bool = True, state: str = "4: ACTIVE") -> None:
    members = '{"x_part0": {"ip": "10.0.0.5", "port": 10000}, "x_part1": {"ip": "10.0.0.6", "port": 10000}}'
    gpu_part.set(TP_SIZE="16", LOCAL_WORLD_SIZE="8", JSON_GANG_PARTS=members)
    gpu_part.host.write("/sys/class/infiniband/mlx5_0/ports/1/state", state + "\n")
    gpu_part.host.write("/sys/module/nvidia_peermem/version", "1\n")
    gpu_part.limit("Max locked memory", "unlimited")
    if files:
        gpu_part.host.write("/dev/infiniband/uverbs0", "")


def all_of(*steps: Callable[[FakeGpuPart], object]) -> Callable[[FakeGpuPart], None]:
    """Returns a fault of several steps."""

    def apply(part: FakeGpuPart) -> None:
        for step in steps:
            step(part)

    return apply


FAULTS: dict[str, tuple[Callable[[FakeGpuPart], object], str, str]] = {
    "G-01": (lambda part: fail_nvml(part, pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), "error", "docker run --gpus all"),
    "G-02": (lambda part: fail_nvml(part, pynvml.NVML_ERROR_UNKNOWN), "error", "recreate the container"),
    "G-03": (lambda part: fail_nvml(part, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH), "error", "reboot"),
    "G-05": (
        lambda part: part.host.write("/usr/local/cuda-12.4/compat/libcuda.so.550.54.15", ""),
        "error",
        "/usr/local/cuda-12.4/compat",
    ),
    "G-09": (
        lambda part: part.set(CUDA_VISIBLE_DEVICES="0,1,9", TP_SIZE="2"),
        "error",
        "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7",
    ),
    "G-11": (
        lambda part: part.set_readings(3, memory_total=40 * GIB, memory_free=39 * GIB),
        "error",
        "CUDA_VISIBLE_DEVICES",
    ),
    "G-12": (
        lambda part: part.set_readings(2, compute_mode=pynvml.NVML_COMPUTEMODE_PROHIBITED),
        "error",
        "nvidia-smi -i 2 -c 0",
    ),
    "G-13": (lambda part: part.set_readings(1, mig=True), "error", "nvidia-smi -i 1 -mig 0"),
    "G-14": (
        lambda part: part.set_readings(4, memory_free=20 * GIB, processes=(GpuProcess(4711, 59 * GIB),)),
        "error",
        "fuser -v /dev/nvidia4",
    ),
    "G-15": (lambda part: part.set_readings(5, remap_failure=True), "error", "out of service"),
    "G-16": (
        lambda part: setattr(part, "gpus", replace(part.gpus, failed=((8, pynvml.NVML_ERROR_GPU_IS_LOST),))),
        "error",
        "reboot",
    ),
    "G-17": (lambda part: part.set_readings(6, clock_reasons=0x40, temperature=92), "warn", "cooling"),
    "G-19": (lambda part: part.set_readings(7, pcie_width=4), "warn", "BIOS"),
    "G-21": (lambda part: part.host.write("/etc/nccl.conf", "NCCL_P2P_DISABLE=1\n"), "warn", "unset NCCL_P2P_DISABLE"),
    "P-02": (lambda part: set_pairs(part, GpuPair(0, 1, p2p=4, nvlink=0, topology=50)), "error", "drain"),
    "P-03": (lambda part: part.set_readings(2, nvlinks=(12, 18)), "warn", "fabric manager"),
    "P-05": (
        lambda part: set_pairs(part, GpuPair(0, 1, p2p=0, nvlink=None, topology=50)),
        "warn",
        "CUDA_VISIBLE_DEVICES",
    ),
    "P-06": (
        lambda part: part.host.write("/proc/self/status", "CapEff:\t0\nCpus_allowed_list:\t32-63\n"),
        "warn",
        "--cpuset-cpus",
    ),
    "P-07": (lambda part: shutil.rmtree(part.host.path("/sys/bus/pci/devices/0000:10:00.0")), "warn", "/sys"),
    "L-08": (lambda part: part.host.remove("/dev/nvidia-uvm"), "error", "nvidia-modprobe -u"),
    "M-02": (lambda part: part.set(TP_SIZE="16", LOCAL_WORLD_SIZE="16"), "error", "TP_SIZE=8"),
    "S-07": (lambda part: part.host.write("/sys/fs/cgroup/memory.max", f"{6 * GIB}\n"), "warn", "--memory=8g"),
    "L-01": (
        all_of(lambda part: add_rdma_cards(part), lambda part: part.limit("Max locked memory", "8388608")),
        "error",
        "--ulimit memlock=-1",
    ),
    "L-07": (
        all_of(lambda part: part.nccl((2, 27, 5)), lambda part: part.limit("Max stack size", "unlimited")),
        "warn",
        "--ulimit stack=8388608",
    ),
    "S-06": (lambda part: part.nccl((2, 25, 1), numa=False), "error", "--cap-add SYS_NICE"),
    "G-06": (
        lambda part: part.use_consumer_gpus("/usr/local/cuda-13.0/compat/libcuda.so.580.10.1"),
        "error",
        "/usr/local/cuda-13.0",
    ),
    "G-07": (lambda part: setattr(part, "gpus", replace(part.gpus, cuda=(11, 8))), "error", "update the driver"),
    "G-10": (lambda part: part.duplicate_gpu(), "error", "CUDA_VISIBLE_DEVICES with distinct GPUs"),
    "P-08": (
        all_of(lambda part: add_rdma_cards(part), lambda part: part.host.remove("/sys/module/nvidia_peermem/version")),
        "warn",
        "modprobe nvidia-peermem",
    ),
    "N-12": (lambda part: add_rdma_cards(part, state="1: DOWN"), "error", "NCCL_IB_DISABLE=1"),
}


def test_healthy_gpus_have_no_problems(gpu_part: FakeGpuPart) -> None:
    assert problems(run_context_checks(gpu_part.ctx())) == {}


@pytest.mark.parametrize("id", FAULTS)
def test_gpu_fault_is_the_only_problem_found(id: str, gpu_part: FakeGpuPart) -> None:
    inject, status, remedy = FAULTS[id]
    inject(gpu_part)
    found = run_context_checks(gpu_part.ctx())
    assert problems(found) == {id: status}, [f.actual for f in found if f.status in ("error", "warn", "crash")]
    assert remedy in fix(by_id(found, id))


KERNEL_LOG = """\
4,1201,88211,-;NVRM: Xid (PCI:0000:12:00): 31, pid=77, name=python, MMU Fault
6,1202,88212,-;eth0: link becomes ready
4,1203,88213,-;NVRM: Xid (PCI:0000:13:00): 79, pid=0, GPU has fallen off the bus.
"""


@pytest.mark.fault("G-16")
def test_xid_in_the_kernel_log_is_a_warning(gpu_part: FakeGpuPart) -> None:
    """Xid 31 of GPU 2 is not reported, because it is an error of a program, not of the hardware."""
    gpu_part.host.write("/dev/kmsg", KERNEL_LOG)
    found = run_context_checks(gpu_part.ctx())
    assert problems(found) == {"G-16": "warn"}
    actual = by_id(found, "G-16").actual
    assert actual.startswith("GPU 3")
    assert "(0000:13:00.0): Xid 79, it has fallen off the bus" in actual
    assert "drain this machine" in fix(by_id(found, "G-16"))


def test_kernel_log_without_xids_or_unreadable_is_ok(gpu_part: FakeGpuPart) -> None:
    assert by_id(run_context_checks(gpu_part.ctx()), "G-16").actual.endswith(
        "/dev/kmsg cannot be read, so Xids are not checked"
    )
    gpu_part.host.write("/dev/kmsg", KERNEL_LOG.splitlines()[1])
    assert by_id(run_context_checks(gpu_part.ctx()), "G-16").actual.endswith("the kernel log has no Xid")


@pytest.mark.parametrize(
    ("id", "readings"),
    [
        ("G-12", {"compute_mode": None}),
        ("G-15", {"ecc_uncorrected": None, "remapped_rows": {}}),
        ("G-17", {"temperature": None, "clock_reasons": None}),
        ("G-18", {"persistence": None}),
        ("G-19", {"pcie_width": None}),
        ("G-20", {"clock_reasons": None}),
    ],
)
def test_missing_reading_is_skipped(id: str, readings: dict[str, Any], gpu_part: FakeGpuPart) -> None:
    for gpu in gpu_part.gpus.all:
        gpu_part.set_readings(gpu.index, **readings)
    assert (
        by_id(run_context_checks(gpu_part.ctx()), id).status,
        by_id(run_context_checks(gpu_part.ctx()), id).actual,
    ) == (
        "skip",
        "these GPUs do not report it",
    )


@pytest.mark.parametrize(("device", "on_gpu"), [("", True), ("cuda", True), ("cpu", False)])
def test_the_device_of_a_part_without_a_plan_is_that_of_its_setting(
    device: str, on_gpu: bool, gpu_part: FakeGpuPart
) -> None:
    gpu_part.set(TP_SIZE="4", LOCAL_WORLD_SIZE="2", RTP_DEVICE=device)
    assert gpu_part.ctx().plan is None
    assert gpu_part.ctx().on_gpu == on_gpu


def test_missing_peer_access_reading_is_skipped(gpu_part: FakeGpuPart) -> None:
    set_pairs(gpu_part, GpuPair(0, 1, p2p=None, nvlink=None, topology=None))
    assert by_id(run_context_checks(gpu_part.ctx()), "P-02").status == "skip"


def test_xids_before_the_driver_was_loaded_are_ignored(gpu_part: FakeGpuPart) -> None:
    loaded = "4,1204,88214,-;NVRM: loading NVIDIA UNIX x86_64 Kernel Module  570.86.15\n"
    gpu_part.host.write("/dev/kmsg", KERNEL_LOG + loaded)
    assert by_id(run_context_checks(gpu_part.ctx()), "G-16").status == "ok"
    gpu_part.host.write("/dev/kmsg", loaded + KERNEL_LOG)
    assert by_id(run_context_checks(gpu_part.ctx()), "G-16").status == "warn"


def test_empty_kernel_log_counts_as_unreadable(gpu_part: FakeGpuPart) -> None:
    """As if /dev/null is mounted over /dev/kmsg."""
    gpu_part.host.write("/dev/kmsg", "")
    assert by_id(run_context_checks(gpu_part.ctx()), "G-16").actual.endswith(
        "/dev/kmsg cannot be read, so Xids are not checked"
    )


def test_lost_gpu_is_reported_with_its_xid(gpu_part: FakeGpuPart) -> None:
    gpu_part.gpus = replace(gpu_part.gpus, failed=((8, pynvml.NVML_ERROR_GPU_IS_LOST),))
    gpu_part.host.write("/dev/kmsg", KERNEL_LOG.replace("0000:13:00", "0000:18:00"))
    assert by_id(run_context_checks(gpu_part.ctx()), "G-16").actual.endswith(
        "; the kernel log has Xid 79 of 0000:18:00"
    )


@pytest.mark.parametrize("id", ["G-04", "G-08", "P-01"])
def test_probes_are_skipped_at_tier_0(id: str, gpu_part: FakeGpuPart) -> None:
    assert by_id(run_context_checks(gpu_part.ctx()), id).status == "skip"


# Tier 1 with fake probe results; test_probes.py runs the probes.


@pytest.mark.fault("G-04")
def test_gpu_that_does_not_compute_is_an_error(gpu_part: FakeGpuPart, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_probes(monkeypatch, compute={3: "did not finish within 50 s and was killed"})
    found = run_context_checks(gpu_part.ctx(tier=1), tier=1)
    assert problems(found) == {"G-04": "error"}
    assert "GPU 3: did not finish" in by_id(found, "G-04").actual
    assert by_id(found, "P-01").actual == by_id(found, "G-08").actual == "not run, because G-04 did not pass"


@pytest.mark.fault("P-04")
def test_fabric_that_is_not_ready_is_an_error(gpu_part: FakeGpuPart) -> None:
    """G-04 fails as well: CUDA does not start (error 802)."""
    gpu_part.set_readings(4, fabric_state=2)
    assert problems(run_context_checks(gpu_part.ctx())) == {"G-04": "error", "P-04": "error"}


@pytest.mark.fault("G-08")
def test_torch_without_kernels_for_the_gpu_is_an_error(gpu_part: FakeGpuPart, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_probes(monkeypatch, known=["sm_80", "sm_86"])
    found = run_context_checks(gpu_part.ctx(tier=1), tier=1)
    assert problems(found) == {"G-08": "error"}
    assert by_id(found, "G-08").expected == "torch with kernels for sm_90"


@pytest.mark.fault("P-01")
def test_lost_peer_writes_are_an_error(gpu_part: FakeGpuPart, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_probes(monkeypatch, copies=[(2, 5, "1024 of 1024 numbers are wrong")])
    found = run_context_checks(gpu_part.ctx(tier=1), tier=1)
    assert problems(found) == {"P-01": "error"}
    assert by_id(found, "P-01").actual == "GPU 2 -> GPU 5: 1024 of 1024 numbers are wrong"
    assert "NCCL_P2P_DISABLE=1" in fix(by_id(found, "P-01"))


def test_healthy_gpus_at_tier_1_have_no_problems(gpu_part: FakeGpuPart, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_probes(monkeypatch)
    assert problems(run_context_checks(gpu_part.ctx(tier=1), tier=1)) == {}


def fake_probes(
    monkeypatch: pytest.MonkeyPatch,
    compute: dict[int, str] | None = None,
    known: list[str] | None = None,
    copies: list[tuple[int, int, str]] | None = None,
) -> None:
    failures = compute or {}
    monkeypatch.setattr(probes, "probe_compute", lambda used: {gpu: failures.get(gpu.index, "") for gpu in used})
    monkeypatch.setattr(probes, "architectures", lambda: known or ["sm_80", "sm_90", "compute_90"])
    monkeypatch.setattr(probes, "probe_peer_copies", lambda order: copies or [])


@pytest.mark.parametrize(
    ("capability", "links", "text"),
    [
        ((9, 0), 18, "268.1 GiB/s over 18 NVLinks, at most 419.1 GiB/s"),
        ((10, 0), 18, "268.1 GiB/s over 18 NVLinks, at most 838.2 GiB/s"),
        ((9, 0), 0, "the maximum of the slowest link is not known"),
    ],
)
def test_throughput_is_compared_with_the_link(
    gpu_part: FakeGpuPart, capability: tuple[int, int], links: int, text: str
) -> None:
    """Compares the throughput of an all-reduce with the maximum of the NVLinks. The all-reduce of 16 MiB takes 102 us;
    in a ring of eight ranks, each link carries 14/8 of the bytes."""
    for gpu in gpu_part.gpus.all:
        gpu_part.set_readings(gpu.index, capability=capability, nvlinks=(links, links))
    ctx = gpu_part.ctx(tier=3)
    sizes = {str(size): {"wrong": 0, "seconds": 1.02e-4} for size in (8, 64 << 10, 16 << 20)}
    ctx.collective = {"sizes": sizes, "backend": "TorchGroup"}
    assert text in REGISTRY["X-02"].run(ctx).actual
