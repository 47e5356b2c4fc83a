"""Faults of settings, plan, checkpoint, memory, limits and network on a fake host.

The doctor must find the fault that the test adds and no other, and its fix must say what to type.
test_real_faults.py has the faults that need the real kernel.
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
from tests.api.pooling_checkpoints import write_steps
from tests.doctor.fixtures import GIB, REPOSITORY, FakeHost, by_id, fix, problems, run_context_checks

MEMBERS = {f"x_part{n}": {"name": f"x_part{n}", "ip": f"10.0.0.{5 + n}", "port": 10000} for n in range(2)}
TWO = {"TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "WORLD_RANK": "0", "JSON_GANG_PARTS": json.dumps(MEMBERS)}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, "-m", "tests.random_model", str(path)], cwd=REPOSITORY, check=True)
    return path


class FakePart:
    """A healthy part of two ranks, in a container with a model. A test changes it to add a fault."""

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
        """Makes this part the first of two, with `changes` to its settings."""
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

    def replace_by_dangling_link(self, name: str) -> None:
        """Replaces a file of the checkpoint by a link to a missing file."""
        (self.model / name).unlink()
        (self.model / name).symlink_to("../../blobs/0123abcd")

    def replace_by_fifo(self, name: str) -> None:
        (self.model / name).unlink(missing_ok=True)
        os.mkfifo(self.model / name)

    def read_members_from(self, path: Path) -> None:
        """Makes this part the first of two, with the member list in a file (DISTRIBUTE_CONFIG_FILE)."""
        self.members(DISTRIBUTE_CONFIG_FILE=str(path), JSON_GANG_PARTS="")

    def limit(self, name: str, value: str) -> None:
        """Sets the soft and hard limit in /proc/self/limits."""
        lines = (self.host.read("/proc/self/limits") or "").splitlines()
        changed = [f"{name:<26}{value:<21}{value:<21}" if line.startswith(name) else line for line in lines]
        self.write("/proc/self/limits", "\n".join(changed) + "\n")

    def ctx(self) -> CheckContext:
        ctx = CheckContext(self.host)
        ctx.__dict__["gpus"] = self.gpus or GpuInventory(failure=12)
        return ctx


@pytest.fixture
def part(tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> FakePart:
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", lambda planned: "")  # not this machine's ports
    return FakePart(tmp_path, demo)


def add_interfaces(part: FakePart, *names: str) -> None:
    found = [Interface(name, (f"10.{n + 1}.0.5",), 1500, 25000) for n, name in enumerate(names)]
    part.host.__dict__["interfaces"] = [*found, Interface("eth0", ("10.0.0.5",), 1500, 25000)]


def write_invalid_length(part: FakePart) -> None:
    part.shard.write_bytes(struct.pack("<Q", 1 << 60) + b"x" * 100)


def write_invalid_header(part: FakePart) -> None:
    table = b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'
    part.shard.write_bytes(struct.pack("<Q", len(table)) + table)


def tokenizer(part: FakePart, tokens: int) -> None:
    path = part.model / "tokenizer.json"
    table = json.loads(path.read_text())
    table["added_tokens"].append({**table["added_tokens"][0], "id": tokens, "content": "<|far|>"})
    path.write_text(json.dumps(table))


def remove_template(part: FakePart) -> None:
    path = part.model / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    (part.model / "chat_template.jinja").unlink(missing_ok=True)


def use_unknown_uid(part: FakePart) -> None:
    part.host.fake_uid = 4242
    part.write("/etc/passwd", "root:x:0:0::/root:/bin/sh\n")


def replace_shm_mount(part: FakePart, line: str) -> None:
    text = (part.host.read("/proc/self/mountinfo") or "").replace(
        "4 3 0:33 / /dev/shm rw,nosuid,nodev - tmpfs shm rw,size=2097152k", line
    )
    part.write("/proc/self/mountinfo", text)


def list_by_name(part: FakePart) -> None:
    part.members(JSON_GANG_PARTS=json.dumps(MEMBERS).replace("10.0.0.6", "node-b"))


def resolve_to_loopback(part: FakePart) -> None:
    list_by_name(part)
    part.host.host_names["node-b"] = ["127.0.1.1"]


def all_of(*steps: Callable[[FakePart], object]) -> Callable[[FakePart], None]:
    """Returns a function that applies several changes, one after another."""

    def apply(part: FakePart) -> None:
        for step in steps:
            step(part)

    return apply


# name of the fault: (id of the check that finds it, function that causes it, status, text in the fix)
FAULTS: dict[str, tuple[str, Callable[[FakePart], object], str, str]] = {
    "a value": ("M-14", lambda part: part.set(START_PORT="many"), "error", "set START_PORT to an allowed value"),
    "two values": ("M-14", lambda part: part.set(START_PORT="x", MAX_SEQ_LEN="-1"), "error", "MAX_SEQ_LEN"),
    "a service": ("N-15", lambda part: part.set(START_PORT="tcp://10.96.0.7:80"), "error", "rename the Service"),
    "a misspelled plan variable": (
        "M-13",
        lambda part: part.set(WROLD_RANK="0"),
        "error",
        "WORLD_RANK=0   in place of WROLD_RANK",
    ),
    "a misspelled key": ("M-13", lambda part: part.set(API_KEYS="s3cret"), "error", "API_KEY=…   in place of API_KEYS"),
    "a misspelled setting": ("M-13", lambda part: part.set(LOG_LEVLE="INFO"), "warn", "LOG_LEVEL=INFO"),
    "a list that is a fifo": (
        "C-02",
        all_of(lambda part: part.replace_by_fifo("list"), lambda part: part.read_members_from(part.model / "list")),
        "error",
        "correct the list",
    ),
    "a list without an end": (
        "C-02",
        lambda part: part.read_members_from(Path("/dev/zero")),
        "error",
        "correct the list",
    ),
    "a list": ("C-02", lambda part: part.members(JSON_GANG_PARTS="{"), "error", "correct the list"),
    "a gap in the list": (
        "C-02",
        lambda part: part.members(
            JSON_GANG_PARTS=json.dumps({"a_part0": {"ip": "10.0.0.5"}, "a_part2": {"ip": "10.0.0.6"}})
        ),
        "error",
        "correct the list",
    ),
    "one member twice": (
        "C-02",
        lambda part: part.members(JSON_GANG_PARTS=json.dumps(MEMBERS).replace("0.6", "0.5")),
        "error",
        "correct the list",
    ),
    "a rank": ("C-01", lambda part: part.members(WORLD_RANK="7"), "error", "WORLD_RANK=0 would match"),
    "another machine's rank": ("C-01", lambda part: part.members(WORLD_RANK="1"), "error", "set WORLD_RANK=0, or"),
    "sizes": ("C-01", lambda part: part.set(WORLD_SIZE="3"), "error", "set WORLD_SIZE=2, or TP_SIZE=3"),
    "metrics folder": ("M-15", lambda part: part.set(PROMETHEUS_MULTIPROC_DIR="/tmp"), "warn", "unset"),
    "no folder": (
        "M-08",
        lambda part: part.set(CHECKPOINT_PATH="/models/none"),
        "error",
        "docker run -v /models/none:/models/none:ro",
    ),
    "a pointer": (
        "M-05",
        lambda part: part.shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "error",
        "git lfs pull",
    ),
    "a cut file": ("M-04", lambda part: part.truncate(part.shard.stat().st_size - 10), "error", "again in"),
    "a broken header": ("M-04", write_invalid_length, "error", "again in"),
    "no shard": ("M-06", lambda part: part.shard.unlink(), "error", "download the named files"),
    "a missing shard": (
        "M-06",
        lambda part: part.index(part.shard.name, "model-2.safetensors"),
        "error",
        "download the named files",
    ),
    "half of the shards, no index": (
        "M-06",
        lambda part: part.shard.rename(part.model / "model-00001-of-00002.safetensors"),
        "error",
        "download the named files",
    ),
    "a snapshot without its blobs": (
        "M-06",
        lambda part: part.replace_by_dangling_link(part.shard.name),
        "error",
        "download the named files",
    ),
    "a tokenizer without its blob": (
        "M-06",
        lambda part: part.replace_by_dangling_link("tokenizer.json"),
        "error",
        "download the named files",
    ),
    "an impossible header": ("M-04", write_invalid_header, "error", "again in"),
    "a fifo": ("M-04", lambda part: part.replace_by_fifo("config.json"), "error", "again in"),
    "a deep config": ("M-04", lambda part: (part.model / "config.json").write_text("[" * 100_000), "error", "again in"),
    "an architecture": (
        "M-12",
        lambda part: part.config(architectures=["GPT2LMHeadModel"]),
        "error",
        "another checkpoint",
    ),
    "code of its own": (
        "M-16",
        lambda part: part.config(architectures=["OddForCausalLM"], auto_map={"AutoModel": "modeling_odd.Odd"}),
        "error",
        "another checkpoint",
    ),
    "quantization": (
        "M-12",
        lambda part: part.config(quantization_config={"quant_method": "gptq"}),
        "error",
        "another checkpoint",
    ),
    "another pooling": (
        "M-12",
        lambda part: write_steps(part.model, pooling="mean_tokens"),
        "error",
        "TASK_TYPE=LANGUAGE_MODEL",
    ),
    "heads": (
        "M-01",
        all_of(lambda part: part.set(TP_SIZE="16"), lambda part: setattr(part.host, "fake_cores", 64)),
        "error",
        "TP_SIZE=8",
    ),
    "weights": ("M-03", lambda part: setattr(part.host, "memory", 1 << 20), "error", "ACT_TYPE=bf16"),
    "context": ("M-03", lambda part: setattr(part.host, "memory", 6 << 20), "warn", "MAX_SEQ_LEN="),
    "no tokenizer": ("M-07", lambda part: part.set(TOKENIZER_PATH=str(part.model.parent)), "error", "TOKENIZER_PATH"),
    "a tokenizer's pointer": (
        "M-05",
        lambda part: (part.model / "tokenizer.json").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        "error",
        "git lfs pull",
    ),
    "half a tokenizer": (
        "M-07",
        lambda part: (part.model / "tokenizer.json").write_text("{"),
        "error",
        "download it again",
    ),
    "a tokenizer of no words": (
        "M-07",
        lambda part: (part.model / "tokenizer.json").write_text('{"model": null}'),
        "error",
        "download it again",
    ),
    "half a tokenizer's config": (
        "M-07",
        lambda part: (part.model / "tokenizer_config.json").write_text("{"),
        "error",
        "download it again",
    ),
    "a template of nothing": (
        "M-07",
        lambda part: (part.model / "tokenizer_config.json").write_text('{"chat_template": null}'),
        "warn",
        "MODEL_TEMPLATE_TYPE",
    ),
    "a tokenizer of sentencepiece": (
        "M-07",
        lambda part: (part.model / "tokenizer.json").rename(part.model / "tokenizer.model"),
        "error",
        "TOKENIZER_PATH",
    ),
    "a large tokenizer": ("M-07", lambda part: tokenizer(part, 90000), "error", "TOKENIZER_PATH"),
    "no template": ("M-07", remove_template, "warn", "MODEL_TEMPLATE_TYPE"),
    "a full disk": (
        "M-09",
        lambda part: part.host.spaces.update({"/tmp": DiskSpace(GIB, 1 << 20, 100)}),
        "error",
        "--tmpfs /tmp",
    ),
    "no inodes": (
        "M-09",
        lambda part: part.host.spaces.update({"/tmp": DiskSpace(GIB, GIB, 0)}),
        "error",
        "--tmpfs /tmp",
    ),
    "small shm": (
        "S-01",
        lambda part: part.host.spaces.update({"/dev/shm": DiskSpace(2 << 20, 2 << 20, -1)}),
        "error",
        "docker run --shm-size=2g",
    ),
    "full shm": (
        "S-01",
        lambda part: part.host.spaces.update({"/dev/shm": DiskSpace(64 << 20, 1 << 20, -1)}),
        "error",
        "docker run --shm-size=2g",
    ),
    "a disk as shm": (
        "S-03",
        lambda part: replace_shm_mount(part, "4 3 8:1 / /dev/shm rw - ext4 /dev/sda1 rw"),
        "error",
        "--shm-size=2g",
    ),
    "read-only shm": (
        "S-03",
        lambda part: replace_shm_mount(part, "4 3 0:33 / /dev/shm ro - tmpfs shm ro"),
        "error",
        "--shm-size=2g",
    ),
    "few files": ("L-02", lambda part: part.limit("Max open files", "256"), "error", "--ulimit nofile=1048576:1048576"),
    "few threads": ("L-03", lambda part: part.write("/sys/fs/cgroup/pids.max", "30\n"), "error", "--pids-limit=-1"),
    "rather few threads": (
        "L-03",
        lambda part: part.write("/sys/fs/cgroup/pids.max", "80\n"),
        "warn",
        "--pids-limit=-1",
    ),
    "killed for memory": (
        "L-05",
        lambda part: part.write("/sys/fs/cgroup/memory.events", "oom_kill 3\n"),
        "warn",
        "--memory=",
    ),
    "a quota": ("L-06", lambda part: part.write("/sys/fs/cgroup/cpu.max", "50000 100000\n"), "warn", "--cpus=2"),
    "no name": ("L-10", use_unknown_uid, "error", "-e USER=rtp"),
    "a closed folder": (
        "L-11",
        lambda part: part.write(
            "/proc/self/mountinfo",
            "9 1 0:40 / /tmp ro - ext4 /dev/sda1 ro\n" + (part.host.read("/proc/self/mountinfo") or ""),
        ),
        "error",
        "--tmpfs /tmp",
    ),
    "logind": (
        "S-04",
        all_of(
            lambda part: part.write("/etc/systemd/logind.conf", "#RemoveIPC=yes\n"),
            lambda part: part.write("/run/systemd/system/x", ""),
            lambda part: setattr(part.host, "fake_uid", 1000),
        ),
        "warn",
        "RemoveIPC=no",
    ),
    "an ephemeral port": ("N-09", lambda part: part.set(START_PORT="40000"), "warn", "START_PORT below 30000"),
    "overlapping parts": (
        "N-09",
        lambda part: part.members(
            JSON_GANG_PARTS=json.dumps(
                {"x_part0": {"ip": "10.0.0.5", "port": 10000}, "x_part1": {"ip": "10.0.0.5", "port": 10005}}
            )
        ),
        "error",
        "change one START_PORT",
    ),
    "an unknown name": ("N-07", list_by_name, "error", "--add-host node-b"),
    "a loopback name": ("N-04", resolve_to_loopback, "error", "--add-host node-b"),
    "an interface of NCCL's": (
        "N-06",
        lambda part: part.set(NCCL_SOCKET_IFNAME="ens"),
        "error",
        "unset NCCL_SOCKET_IFNAME",
    ),
    "an interface of gloo's": (
        "N-05",
        lambda part: part.set(GLOO_SOCKET_IFNAME="^lo"),
        "error",
        "unset GLOO_SOCKET_IFNAME",
    ),
    "a bridge": (
        "N-03",
        all_of(lambda part: part.members(NCCL_SOCKET_IFNAME="br-"), lambda part: add_interfaces(part, "br-8f2a")),
        "error",
        "NCCL_SOCKET_IFNAME==eth0",
    ),
    "NAT": (
        "N-14",
        lambda part: part.members(JSON_GANG_PARTS=json.dumps(MEMBERS).replace("10.0.0.5", "192.0.2.9")),
        "warn",
        "docker run --network host",
    ),
    "a proxy": ("N-11", lambda part: part.set(HTTP_PROXY="http://proxy:3128"), "warn", "no_proxy=localhost,127.0.0.1"),
    "a proxy for https": (
        "N-11",
        lambda part: part.set(https_proxy="http://proxy:3128"),
        "warn",
        "localhost,127.0.0.1",
    ),
    "a plugin": ("N-16", lambda part: part.set(NCCL_NET_PLUGIN="aws-ofi"), "warn", "LD_LIBRARY_PATH"),
    "a full table": (
        "N-18",
        all_of(
            lambda part: part.members(),
            lambda part: part.write("/proc/sys/net/netfilter/nf_conntrack_count", "99\n"),
            lambda part: part.write("/proc/sys/net/netfilter/nf_conntrack_max", "100\n"),
        ),
        "warn",
        "nf_conntrack_max=200",
    ),
}


def test_healthy_part_has_no_problems(part: FakePart) -> None:
    assert problems(run_context_checks(part.ctx())) == {}
    part.members()
    assert problems(run_context_checks(part.ctx())) == {}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_the_only_problem_found(name: str, part: FakePart) -> None:
    id, inject, status, remedy = FAULTS[name]
    inject(part)
    found = run_context_checks(part.ctx())
    assert problems(found) == {id: status}, [(f.id, f.actual) for f in found if f.status not in ("ok", "skip")]
    assert remedy in fix(by_id(found, id))


def test_memory_limit_below_requirement_is_an_error(part: FakePart) -> None:
    """M-03 may fail too, because the model does not fit into the memory limit."""
    part.write("/sys/fs/cgroup/memory.max", f"{300 << 20}\n")
    assert problems(run_context_checks(part.ctx()))["L-05"] == "error"


@pytest.mark.fault("M-10")
def test_slow_disk_is_a_warning(part: FakePart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doctor.checks.disks._read_cold", lambda checkpoint: (64.0, 64 << 10))
    ctx = part.ctx()
    ctx.tier = 1
    found = run_context_checks(ctx, tier=1)
    assert problems(found) == {"M-10": "warn"}
    assert "local disk" in fix(by_id(found, "M-10"))


@pytest.mark.fault("L-04")
def test_threads_that_cannot_start_are_an_error(part: FakePart, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    found = run_context_checks(part.ctx())
    assert problems(found) == {"L-04": "error"}
    assert "seccomp" in by_id(found, "L-04").actual


def test_cgroup_limits_are_unknown_without_a_cgroup(part: FakePart) -> None:
    """No cgroup is mounted, which must not be reported as "no limit"."""
    shutil.rmtree(part.host.path("/sys/fs/cgroup"))
    found = run_context_checks(part.ctx())
    assert problems(found) == dict.fromkeys(("S-07", "L-03", "L-05", "L-06"), "unknown")


def test_process_limits_are_unknown_if_unreadable(part: FakePart) -> None:
    part.write("/proc/self/limits", "")
    assert problems(run_context_checks(part.ctx())) == dict.fromkeys(("L-02", "L-03", "L-07"), "unknown")


def test_root_cgroup_of_a_bare_host_has_no_limit(part: FakePart) -> None:
    for name in ("memory.max", "memory.current", "pids.max", "pids.current", "cpu.max", "memory.events"):
        part.host.remove(f"/sys/fs/cgroup/{name}")
    assert problems(run_context_checks(part.ctx())) == {}


def test_unresolvable_name_is_a_warning_at_start(part: FakePart) -> None:
    """The other parts may start later. Checks that need the name are skipped."""
    members = {"x_part0": {"ip": "10.0.0.5", "port": 10000}, "x_part1": {"ip": "not-yet", "port": 10000}}
    part.set(JSON_GANG_PARTS=json.dumps(members), TP_SIZE="2", LOCAL_WORLD_SIZE="1", WORLD_RANK="0")
    ctx = part.ctx()
    assert problems(run_context_checks(ctx)) == {"N-07": "error"}
    ctx = part.ctx()
    ctx.starting = True
    found = run_context_checks(ctx)
    assert problems(found) == {"N-07": "warn"}
    assert by_id(found, "N-04").actual == "not run, because N-07 did not pass"


def test_proposed_port_is_valid_and_all_its_ports_free(part: FakePart, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fix proposes START_PORT=10100: 65000 is the highest START_PORT, so the search goes on at 10000, whose
    rendezvous port is in use."""
    taken = {65000, 9999}
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", lambda p: "in use" if p.port in taken else "")
    part.set(START_PORT="65000", TP_SIZE="2")
    found = by_id(run_context_checks(part.ctx()), "N-08")
    assert found.status == "error"
    assert "START_PORT=10100" in fix(found)


def in_use(*ports: int) -> Callable[[PlannedPort], str]:
    return lambda planned: "in use" if planned.port in ports else ""


@pytest.mark.parametrize(
    ("start", "ports", "proposed"),
    [
        (10000, (10000,), 10100),
        (10000, (10000, 10099, 10189), 10300),  # rendezvous and torch.distributed
        (64950, (64950,), 10000),
        (31900, (31900,), 61100),  # past the NodePorts and the ports of outgoing connections
        (40000, (40000,), 61100),
    ],
)
def test_proposed_port_passes_all_checks(
    start: int, ports: tuple[int, ...], proposed: int, part: FakePart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", in_use(*ports))
    part.set(START_PORT=str(start))
    assert f"START_PORT={proposed} " in fix(by_id(run_context_checks(part.ctx()), "N-08"))
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", in_use())
    part.set(START_PORT=str(proposed))
    assert problems(run_context_checks(part.ctx())) == {}


def test_no_port_is_proposed_if_none_is_free(part: FakePart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", lambda planned: "in use")
    assert fix(by_id(run_context_checks(part.ctx()), "N-08")) == "stop its owner"


def test_proposed_port_is_not_reserved_for_another_part(part: FakePart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("doctor.checks.listen_ports.port_conflict", in_use(10000))
    members = {"x_part0": {"ip": "10.0.0.5"}, "x_part1": {"ip": "10.0.0.5", "port": 10105}}
    part.members(JSON_GANG_PARTS=json.dumps(members))
    text = fix(by_id(run_context_checks(part.ctx()), "N-08"))
    assert "START_PORT=10200 " in text
    assert "the same port in the member list" in text


@pytest.mark.parametrize(
    ("no_proxy_entry", "status"), [("10.0.0.0/8", "ok"), ("10.1.0.0/16", "warn"), (".nodes", "warn")]
)
def test_no_proxy_networks_and_suffixes(part: FakePart, no_proxy_entry: str, status: str) -> None:
    members = {f"x_part{n}": {"ip": f"10.0.0.{5 + n}", "port": 10000} for n in range(2)}
    part.set(JSON_GANG_PARTS=json.dumps(members), TP_SIZE="2", LOCAL_WORLD_SIZE="1", WORLD_RANK="0")
    part.set(http_proxy="http://proxy:3128", no_proxy=f"localhost,127.0.0.1,{no_proxy_entry}")
    assert by_id(run_context_checks(part.ctx()), "N-11").status == status
