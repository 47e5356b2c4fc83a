"""Every fault of settings, plan, checkpoint, memory, limits and network, on a played container: the doctor finds that
one, no other, and says what to type. What the kernel can do for real is in test_real_faults.py.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from doctor.context import CheckContext
from doctor.host import DiskSpace, Interface
from rtp_llm.machine.gpus import GpuInventory
from rtp_llm.parallel.plan import PlannedPort
from tests.doctor.fixtures import GIB, REPOSITORY, FakeHost, by_id, fix, problems, run_context_checks

MEMBERS = {f"x_part{n}": {"name": f"x_part{n}", "ip": f"10.0.0.{5 + n}", "port": 10000} for n in range(2)}
TWO = {"TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "WORLD_RANK": "0", "JSON_GANG_PARTS": json.dumps(MEMBERS)}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, "-m", "tests.random_model", str(path)], cwd=REPOSITORY, check=True)
    return path


class FaultyPart:
    """A healthy container with a model and a part of two ranks."""

    def __init__(self, root: Path, demo: Path):
        self.model = root / "checkpoint"
        shutil.copytree(demo, self.model)
        self.host = FakeHost(root / "root", {"TP_SIZE": "2", "CHECKPOINT_PATH": str(self.model)})
        self.gpus: GpuInventory | None = None

    def set(self, **environ: str) -> None:
        self.host.environ = {**self.host.environ, **environ}

    def unset(self, name: str) -> None:
        self.host.environ = {n: v for n, v in self.host.environ.items() if n != name}

    def members(self, **changes: str) -> None:
        """A part of two, whose member list and settings differ by `changes`."""
        self.set(**{**TWO, **changes})

    def write(self, name: str, text: str) -> None:
        self.host.write(name, text)

    def config(self, **changes: object) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    @property
    def shard(self) -> Path:
        return next(self.model.glob("*.safetensors"))

    def truncate(self, size: int) -> None:
        data = self.shard.read_bytes()
        self.shard.write_bytes(data[:size])

    def index(self, *shards: str) -> None:
        table = {f"tensor{n}": name for n, name in enumerate(shards)}
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))

    def dangle(self, name: str) -> None:
        """A link to what is not mounted."""
        (self.model / name).unlink()
        (self.model / name).symlink_to("../../blobs/0123abcd")

    def fifo(self, name: str) -> None:
        (self.model / name).unlink(missing_ok=True)
        os.mkfifo(self.model / name)

    def listed_in(self, path: Path) -> None:
        """A part of two, whose members stand in a file."""
        self.members(DISTRIBUTE_CONFIG_FILE=str(path), JSON_GANG_PARTS="")

    def limit(self, name: str, value: str) -> None:
        """A soft and hard limit of /proc/self/limits."""
        lines = (self.host.read("/proc/self/limits") or "").splitlines()
        changed = [f"{name:<26}{value:<21}{value:<21}" if line.startswith(name) else line for line in lines]
        self.write("/proc/self/limits", "\n".join(changed) + "\n")

    def ctx(self) -> CheckContext:
        ctx = CheckContext(self.host)
        ctx.__dict__["gpus"] = self.gpus or GpuInventory(failure=12)
        return ctx


@pytest.fixture
def box(tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyPart:
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", lambda planned: "")  # not this machine's ports
    return FaultyPart(tmp_path, demo)


def interfaces(box: FaultyPart, *names: str) -> None:
    found = [Interface(name, (f"10.{n + 1}.0.5",), 1500, 25000) for n, name in enumerate(names)]
    box.host.__dict__["interfaces"] = [*found, Interface("eth0", ("10.0.0.5",), 1500, 25000)]


def no_header(box: FaultyPart) -> None:
    box.shard.write_bytes(struct.pack("<Q", 1 << 60) + b"x" * 100)


def impossible_header(box: FaultyPart) -> None:
    table = b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'
    box.shard.write_bytes(struct.pack("<Q", len(table)) + table)


def tokenizer(box: FaultyPart, tokens: int) -> None:
    path = box.model / "tokenizer.json"
    table = json.loads(path.read_text())
    table["added_tokens"].append({**table["added_tokens"][0], "id": tokens, "content": "<|far|>"})
    path.write_text(json.dumps(table))


def remove_template(box: FaultyPart) -> None:
    path = box.model / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    (box.model / "chat_template.jinja").unlink(missing_ok=True)


def foreign_uid(box: FaultyPart) -> None:
    box.host.fake_uid = 4242
    box.write("/etc/passwd", "root:x:0:0::/root:/bin/sh\n")


def mounted(box: FaultyPart, line: str) -> None:
    text = (box.host.read("/proc/self/mountinfo") or "").replace(
        "4 3 0:33 / /dev/shm rw,nosuid,nodev - tmpfs shm rw,size=2097152k", line
    )
    box.write("/proc/self/mountinfo", text)


def unresolved(box: FaultyPart) -> None:
    box.members(JSON_GANG_PARTS=json.dumps(MEMBERS).replace("10.0.0.6", "node-b"))


def looped(box: FaultyPart) -> None:
    unresolved(box)
    box.host.names_known["node-b"] = ["127.0.1.1"]


def each(*steps: Callable[[FaultyPart], object]) -> Callable[[FaultyPart], None]:
    """One fault of several steps."""

    def make(it: FaultyPart) -> None:
        for step in steps:
            step(it)

    return make


# name: (id, fault, status, what the fix says)
FAULTS: dict[str, tuple[str, Callable[[FaultyPart], object], str, str]] = {
    "a value": ("M-14", lambda b: b.set(START_PORT="many"), "error", "set START_PORT to an allowed value"),
    "two values": ("M-14", lambda b: b.set(START_PORT="x", MAX_SEQ_LEN="-1"), "error", "MAX_SEQ_LEN"),
    "a service": ("N-15", lambda b: b.set(START_PORT="tcp://10.96.0.7:80"), "error", "rename the Service"),
    "a decisive slip": ("M-13", lambda b: b.set(WROLD_RANK="0"), "error", "WORLD_RANK=0   in place of WROLD_RANK"),
    "another slip": ("M-13", lambda b: b.set(LOG_LEVLE="INFO"), "warn", "LOG_LEVEL=INFO"),
    "a list that is a fifo": (
        "C-02",
        each(lambda b: b.fifo("list"), lambda b: b.listed_in(b.model / "list")),
        "error",
        "correct the list",
    ),
    "a list without an end": ("C-02", lambda b: b.listed_in(Path("/dev/zero")), "error", "correct the list"),
    "a list": ("C-02", lambda b: b.members(JSON_GANG_PARTS="{"), "error", "correct the list"),
    "a gap in the list": (
        "C-02",
        lambda b: b.members(JSON_GANG_PARTS=json.dumps({"a_part0": {"ip": "10.0.0.5"}, "a_part2": {"ip": "10.0.0.6"}})),
        "error",
        "correct the list",
    ),
    "one member twice": (
        "C-02",
        lambda b: b.members(JSON_GANG_PARTS=json.dumps(MEMBERS).replace("0.6", "0.5")),
        "error",
        "correct the list",
    ),
    "a rank": ("C-01", lambda b: b.members(WORLD_RANK="7"), "error", "WORLD_RANK=0 would fit"),
    "another machine's rank": ("C-01", lambda b: b.members(WORLD_RANK="1"), "error", "WORLD_RANK=0 would fit"),
    "sizes": ("C-01", lambda b: b.set(WORLD_SIZE="3"), "error", "set the variables"),
    "metrics folder": ("M-15", lambda b: b.set(PROMETHEUS_MULTIPROC_DIR="/tmp"), "warn", "unset"),
    "no folder": (
        "M-08",
        lambda b: b.set(CHECKPOINT_PATH="/models/none"),
        "error",
        "docker run -v /models/none:/models/none:ro",
    ),
    "a hub's name": ("M-08", lambda b: b.set(CHECKPOINT_PATH="org/model"), "error", "hf download org/model"),
    "a pointer": (
        "M-05",
        lambda b: b.shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "error",
        "git lfs pull",
    ),
    "a cut file": ("M-04", lambda b: b.truncate(b.shard.stat().st_size - 10), "error", "again in"),
    "a broken header": ("M-04", no_header, "error", "again in"),
    "no shard": ("M-06", lambda b: b.shard.unlink(), "error", "download the named files"),
    "a missing shard": (
        "M-06",
        lambda b: b.index(b.shard.name, "model-2.safetensors"),
        "error",
        "download the named files",
    ),
    "half of the shards, no index": (
        "M-06",
        lambda b: b.shard.rename(b.model / "model-00001-of-00002.safetensors"),
        "error",
        "download the named files",
    ),
    "a snapshot without its blobs": ("M-06", lambda b: b.dangle(b.shard.name), "error", "download the named files"),
    "a tokenizer without its blob": ("M-06", lambda b: b.dangle("tokenizer.json"), "error", "download the named files"),
    "an impossible header": ("M-04", impossible_header, "error", "again in"),
    "a fifo": ("M-04", lambda b: b.fifo("config.json"), "error", "again in"),
    "a deep config": ("M-04", lambda b: (b.model / "config.json").write_text("[" * 100_000), "error", "again in"),
    "an architecture": ("M-12", lambda b: b.config(architectures=["GPT2LMHeadModel"]), "error", "another checkpoint"),
    "code of its own": (
        "M-16",
        lambda b: b.config(architectures=["OddForCausalLM"], auto_map={"AutoModel": "modeling_odd.Odd"}),
        "error",
        "another checkpoint",
    ),
    "quantization": (
        "M-12",
        lambda b: b.config(quantization_config={"quant_method": "gptq"}),
        "error",
        "another checkpoint",
    ),
    "heads": (
        "M-01",
        each(lambda b: b.set(TP_SIZE="16"), lambda b: setattr(b.host, "fake_cores", 64)),
        "error",
        "TP_SIZE=8",
    ),
    "weights": ("M-03", lambda b: setattr(b.host, "memory", 1 << 20), "error", "ACT_TYPE=bf16"),
    "context": ("M-03", lambda b: setattr(b.host, "memory", 6 << 20), "warn", "MAX_SEQ_LEN="),
    "no tokenizer": ("M-07", lambda b: b.set(TOKENIZER_PATH=str(b.model.parent)), "error", "TOKENIZER_PATH"),
    "a tokenizer's pointer": (
        "M-05",
        lambda b: (b.model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "error",
        "git lfs pull",
    ),
    "half a tokenizer": ("M-07", lambda b: (b.model / "tokenizer.json").write_text("{"), "error", "download it again"),
    "a tokenizer of no words": (
        "M-07",
        lambda b: (b.model / "tokenizer.json").write_text('{"model": null}'),
        "error",
        "download it again",
    ),
    "half a tokenizer's config": (
        "M-07",
        lambda b: (b.model / "tokenizer_config.json").write_text("{"),
        "error",
        "download it again",
    ),
    "a template of nothing": (
        "M-07",
        lambda b: (b.model / "tokenizer_config.json").write_text('{"chat_template": null}'),
        "warn",
        "MODEL_TEMPLATE_TYPE",
    ),
    "a tokenizer of sentencepiece": (
        "M-07",
        lambda b: (b.model / "tokenizer.json").rename(b.model / "tokenizer.model"),
        "error",
        "TOKENIZER_PATH",
    ),
    "a large tokenizer": ("M-07", lambda b: tokenizer(b, 90000), "error", "TOKENIZER_PATH"),
    "no template": ("M-07", remove_template, "warn", "MODEL_TEMPLATE_TYPE"),
    "a full disk": (
        "M-09",
        lambda b: b.host.spaces.update({"/tmp": DiskSpace(GIB, 1 << 20, 100)}),
        "error",
        "--tmpfs /tmp",
    ),
    "no inodes": ("M-09", lambda b: b.host.spaces.update({"/tmp": DiskSpace(GIB, GIB, 0)}), "error", "--tmpfs /tmp"),
    "small shm": (
        "S-01",
        lambda b: b.host.spaces.update({"/dev/shm": DiskSpace(2 << 20, 2 << 20, -1)}),
        "error",
        "docker run --shm-size=2g",
    ),
    "full shm": (
        "S-01",
        lambda b: b.host.spaces.update({"/dev/shm": DiskSpace(64 << 20, 1 << 20, -1)}),
        "error",
        "docker run --shm-size=2g",
    ),
    "a disk as shm": (
        "S-03",
        lambda b: mounted(b, "4 3 8:1 / /dev/shm rw - ext4 /dev/sda1 rw"),
        "error",
        "--shm-size=2g",
    ),
    "read-only shm": ("S-03", lambda b: mounted(b, "4 3 0:33 / /dev/shm ro - tmpfs shm ro"), "error", "--shm-size=2g"),
    "few files": ("L-02", lambda b: b.limit("Max open files", "256"), "error", "--ulimit nofile=1048576:1048576"),
    "few threads": ("L-03", lambda b: b.write("/sys/fs/cgroup/pids.max", "30\n"), "error", "--pids-limit=-1"),
    "rather few threads": ("L-03", lambda b: b.write("/sys/fs/cgroup/pids.max", "80\n"), "warn", "--pids-limit=-1"),
    "killed for memory": (
        "L-05",
        lambda b: b.write("/sys/fs/cgroup/memory.events", "oom_kill 3\n"),
        "warn",
        "--memory=",
    ),
    "a quota": ("L-06", lambda b: b.write("/sys/fs/cgroup/cpu.max", "50000 100000\n"), "warn", "--cpus=2"),
    "no name": ("L-10", foreign_uid, "error", "-e USER=rtp"),
    "a closed folder": (
        "L-11",
        lambda b: b.write(
            "/proc/self/mountinfo",
            "9 1 0:40 / /tmp ro - ext4 /dev/sda1 ro\n" + (b.host.read("/proc/self/mountinfo") or ""),
        ),
        "error",
        "--tmpfs /tmp",
    ),
    "logind": (
        "S-04",
        each(
            lambda b: b.write("/etc/systemd/logind.conf", "#RemoveIPC=yes\n"),
            lambda b: b.write("/run/systemd/system/x", ""),
            lambda b: setattr(b.host, "fake_uid", 1000),
        ),
        "warn",
        "RemoveIPC=no",
    ),
    "an ephemeral port": ("N-09", lambda b: b.set(START_PORT="40000"), "warn", "START_PORT below 30000"),
    "overlapping parts": (
        "N-09",
        lambda b: b.members(
            JSON_GANG_PARTS=json.dumps(
                {"x_part0": {"ip": "10.0.0.5", "port": 10000}, "x_part1": {"ip": "10.0.0.5", "port": 10005}}
            )
        ),
        "error",
        "move one START_PORT",
    ),
    "an unknown name": ("N-07", unresolved, "error", "--add-host node-b"),
    "a loopback name": ("N-04", looped, "error", "--add-host node-b"),
    "an interface of NCCL's": ("N-06", lambda b: b.set(NCCL_SOCKET_IFNAME="ens"), "error", "unset NCCL_SOCKET_IFNAME"),
    "an interface of gloo's": ("N-05", lambda b: b.set(GLOO_SOCKET_IFNAME="^lo"), "error", "unset GLOO_SOCKET_IFNAME"),
    "a bridge": (
        "N-03",
        each(lambda b: b.members(NCCL_SOCKET_IFNAME="br-"), lambda b: interfaces(b, "br-8f2a")),
        "error",
        "NCCL_SOCKET_IFNAME==eth0",
    ),
    "NAT": (
        "N-14",
        lambda b: b.members(JSON_GANG_PARTS=json.dumps(MEMBERS).replace("10.0.0.5", "192.0.2.9")),
        "warn",
        "docker run --network host",
    ),
    "a proxy": ("N-11", lambda b: b.set(HTTP_PROXY="http://proxy:3128"), "warn", "no_proxy=localhost"),
    "a plugin": ("N-16", lambda b: b.set(NCCL_NET_PLUGIN="aws-ofi"), "warn", "LD_LIBRARY_PATH"),
    "a full table": (
        "N-18",
        each(
            lambda b: b.members(),
            lambda b: b.write("/proc/sys/net/netfilter/nf_conntrack_count", "99\n"),
            lambda b: b.write("/proc/sys/net/netfilter/nf_conntrack_max", "100\n"),
        ),
        "warn",
        "nf_conntrack_max=200",
    ),
}


def test_the_healthy_box_has_no_problem(box: FaultyPart) -> None:
    assert problems(run_context_checks(box.ctx())) == {}
    box.members()
    assert problems(run_context_checks(box.ctx())) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_found_and_nothing_beside_it(name: str, box: FaultyPart) -> None:
    id, make, status, remedy = FAULTS[name]
    make(box)
    found = run_context_checks(box.ctx())
    assert problems(found) == {id: status}, [(f.id, f.actual) for f in found if f.status not in ("ok", "skip")]
    assert remedy in fix(by_id(found, id))


def test_memory_for_the_weights_and_for_their_loading(box: FaultyPart) -> None:
    """Two faults that one number makes: the limit is too small for the processes, and the model for the rest."""
    box.write("/sys/fs/cgroup/memory.max", f"{300 << 20}\n")
    assert problems(run_context_checks(box.ctx()))["L-05"] == "error"


@pytest.mark.fault("M-10")
def test_a_slow_disk(box: FaultyPart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doctor.checks.disks._read_cold", lambda checkpoint: (64.0, 64 << 10))
    ctx = box.ctx()
    ctx.tier = 1
    found = run_context_checks(ctx, tier=1)
    assert problems(found) == {"M-10": "warn"}
    assert "local disk" in fix(by_id(found, "M-10"))


@pytest.mark.fault("L-04")
def test_threads_that_cannot_start(box: FaultyPart, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    found = run_context_checks(box.ctx())
    assert problems(found) == {"L-04": "error"}
    assert "seccomp" in by_id(found, "L-04").actual


def test_limits_that_cannot_be_seen_are_unknown(box: FaultyPart) -> None:
    """No cgroup is mounted, as below a foreign /sys: never "no limit"."""
    shutil.rmtree(box.host.path("/sys/fs/cgroup"))
    found = run_context_checks(box.ctx())
    assert problems(found) == dict.fromkeys(("S-07", "L-03", "L-05", "L-06"), "unknown")


def test_limits_of_the_process_that_cannot_be_read_are_unknown(box: FaultyPart) -> None:
    box.write("/proc/self/limits", "")
    assert problems(run_context_checks(box.ctx())) == dict.fromkeys(("L-02", "L-03", "L-07"), "unknown")


def test_a_bare_host_has_no_limit_at_the_root_of_its_cgroups(box: FaultyPart) -> None:
    for name in ("memory.max", "memory.current", "pids.max", "pids.current", "cpu.max", "memory.events"):
        box.host.remove(f"/sys/fs/cgroup/{name}")
    assert problems(run_context_checks(box.ctx())) == {}


def test_names_that_do_not_resolve_yet_are_waited_for_at_a_start(box: FaultyPart) -> None:
    """Parts come one after another: what depends on the name is not asked either."""
    members = {"x_part0": {"ip": "10.0.0.5", "port": 10000}, "x_part1": {"ip": "not-yet", "port": 10000}}
    box.set(JSON_GANG_PARTS=json.dumps(members), TP_SIZE="2", LOCAL_WORLD_SIZE="1", WORLD_RANK="0")
    ctx = box.ctx()
    assert problems(run_context_checks(ctx)) == {"N-07": "error"}
    ctx = box.ctx()
    ctx.starting = True
    found = run_context_checks(ctx)
    assert problems(found) == {"N-07": "warn"}
    assert by_id(found, "N-04").actual == "because N-07"


def test_a_proposed_port_is_allowed_and_its_whole_plan_free(box: FaultyPart, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 65000 START_PORT ends; at 10000 the rendezvous port would be in use."""
    taken = {65000, 9999}
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", lambda p: "in use" if p.port in taken else "")
    box.set(START_PORT="65000", TP_SIZE="2")
    found = by_id(run_context_checks(box.ctx()), "N-08")
    assert found.status == "error"
    assert "START_PORT=10100" in fix(found)


def in_use(*ports: int) -> Callable[[PlannedPort], str]:
    return lambda planned: "in use" if planned.port in ports else ""


@pytest.mark.parametrize(
    ("start", "ports", "other"),
    [
        (10000, (10000,), 10100),
        (10000, (10000, 10099, 10189), 10300),  # rendezvous and torch.distributed
        (64950, (64950,), 10000),
        (31900, (31900,), 61100),  # past the NodePorts and the ports of outgoing connections
        (40000, (40000,), 61100),
    ],
)
def test_a_proposed_port_leaves_nothing_to_complain_of(
    start: int, ports: tuple[int, ...], other: int, box: FaultyPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", in_use(*ports))
    box.set(START_PORT=str(start))
    assert f"START_PORT={other} " in fix(by_id(run_context_checks(box.ctx()), "N-08"))
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", in_use())
    box.set(START_PORT=str(other))
    assert problems(run_context_checks(box.ctx())) == {}


def test_where_no_port_is_free_none_is_proposed(box: FaultyPart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", lambda planned: "in use")
    assert fix(by_id(run_context_checks(box.ctx()), "N-08")) == "stop its owner"


def test_a_proposed_port_is_no_other_part_s(box: FaultyPart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", in_use(10000))
    members = {"x_part0": {"ip": "10.0.0.5"}, "x_part1": {"ip": "10.0.0.5", "port": 10105}}
    box.members(JSON_GANG_PARTS=json.dumps(members))
    said = fix(by_id(run_context_checks(box.ctx()), "N-08"))
    assert "START_PORT=10200 " in said
    assert "the same port in the member list" in said


@pytest.mark.parametrize(("spared", "status"), [("10.0.0.0/8", "ok"), ("10.1.0.0/16", "warn"), (".nodes", "warn")])
def test_networks_that_need_no_proxy(box: FaultyPart, spared: str, status: str) -> None:
    members = {f"x_part{n}": {"ip": f"10.0.0.{5 + n}", "port": 10000} for n in range(2)}
    box.set(JSON_GANG_PARTS=json.dumps(members), TP_SIZE="2", LOCAL_WORLD_SIZE="1", WORLD_RANK="0")
    box.set(http_proxy="http://proxy:3128", no_proxy=f"localhost,{spared}")
    assert by_id(run_context_checks(box.ctx()), "N-11").status == status
