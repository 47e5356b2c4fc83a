"""Two parts in two network namespaces, joined by a cable, with something wrong between them or with one of them.

Each runs `rtp-llm-doctor gang`. Both must find the same, in the same words, name the direction and the party to blame,
and nothing else.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import rtp_llm
from tests.doctor.fixtures import REPOSITORY, doctor, report

PORT = 10000  # nobody else is in there
ADDRESSES = ("10.78.0.1", "10.78.0.2")
RANGE = "40000-49999"  # what the kernel gives to those who ask for any port, narrowed so that a rule can name it
WAIT = 20.0


KEEPING_CGROUPS = """\
mount --make-rprivate / && mount -t tmpfs kept /mnt && mkdir /mnt/cgroup && mount --rbind /sys/fs/cgroup /mnt/cgroup &&
exec ip netns exec "$0" sh -c 'mount --rbind /mnt/cgroup /sys/fs/cgroup && exec "$@"' sh "$@"
"""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Side:
    """One machine: its namespace, and its end of the cable."""

    name: str
    device: str
    address: str

    @property
    def inside(self) -> list[str]:
        """Words that run a command there. `ip netns exec` gives it a /sys of its own, without the cgroups: a place
        keeps them meanwhile."""
        return ["unshare", "--mount", "sh", "-c", KEEPING_CGROUPS, self.name]

    def run(self, *words: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.name, *words], check=True, capture_output=True)

    @contextmanager
    def refusing_new(self, ports: str) -> Iterator[None]:
        """New connections to these ports are lost without a word, answers to this side's own are not."""
        rule = ["INPUT", "-i", self.device, "-p", "tcp", "--syn", "--dport", ports.replace("-", ":"), "-j", "DROP"]
        try:
            self.run("iptables", "-I", *rule)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"iptables does not work here: {error}")
        try:
            yield
        finally:
            self.run("iptables", "-D", *rule)

    @contextmanager
    def dropping(self, ports: str) -> Iterator[None]:
        """What comes in for these TCP ports is lost without a word: policy routing, asked before the local table."""
        rule = ("pref", "1", "iif", self.device, "ipproto", "tcp", "dport", ports, "blackhole")
        ip("-n", self.name, "rule", "add", *rule)
        try:
            yield
        finally:
            ip("-n", self.name, "rule", "del", *rule)


@contextmanager
def losing_large_packets(side: Side) -> Iterator[None]:
    """What comes in is dropped where it is longer than 1300 bytes, and nobody is told: a black hole for its MTU."""
    rule = ("INPUT", "-i", side.device, "-p", "tcp", "-m", "length", "--length", "1300:65535", "-j", "DROP")
    side.run("iptables", "-I", *rule)
    try:
        yield
    finally:
        side.run("iptables", "-D", *rule)


def until_up(side: Side) -> None:
    for _ in range(100):
        state = subprocess.run(["ip", "-n", side.name, "link", "show", side.device], capture_output=True, text=True)
        if "state UP" in state.stdout:
            return
        time.sleep(0.05)
    raise AssertionError(f"{side.device} never came up: {state.stdout}")


@pytest.fixture(scope="module")
def sides() -> Iterator[list[Side]]:
    if not shutil.which("ip"):
        pytest.skip("needs ip, of iproute2")
    tag = f"doc{os.getpid()}{secrets.token_hex(2)}"
    made = [Side(f"{tag}{n}", f"doc{n}", address) for n, address in enumerate(ADDRESSES)]
    a, b = made
    try:
        try:
            for side in made:
                ip("netns", "add", side.name)
            ip("link", "add", a.device, "netns", a.name, "type", "veth", "peer", b.device, "netns", b.name)
            for side in made:
                ip("-n", side.name, "addr", "add", f"{side.address}/24", "dev", side.device)
                for device in ("lo", side.device):
                    ip("-n", side.name, "link", "set", device, "up")
                # The local table is asked first of all, unless its rule is moved.
                ip("-n", side.name, "rule", "add", "pref", "5", "lookup", "local")
                ip("-n", side.name, "rule", "del", "pref", "0", "lookup", "local")
                side.run("sh", "-c", f"echo {RANGE.replace('-', ' ')} > /proc/sys/net/ipv4/ip_local_port_range")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        for side in made:  # the kernel takes up to a second to notice its carrier
            until_up(side)
        yield made
    finally:
        for side in made:
            with suppress(OSError):
                ip("netns", "delete", side.name)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    subprocess.run([sys.executable, "-m", "tests.random_model", str(path)], cwd=REPOSITORY, check=True)
    return path


def settings(demo: Path, part: int, addresses: Sequence[str] = ADDRESSES) -> dict[str, str]:
    members = {f"x_part{n}": {"name": f"x_part{n}", "ip": address, "port": PORT} for n, address in enumerate(addresses)}
    return {
        "JSON_GANG_PARTS": json.dumps(members),
        "TP_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "WORLD_RANK": str(part),
        "START_PORT": str(PORT),
        "CHECKPOINT_PATH": str(demo),
        "RTP_RUNTIME": "docker",
        "RTP_THREADS": "1",
    }


def meet(
    sides: Sequence[Side],
    demo: Path,
    *differing: Mapping[str, str],
    addresses: Sequence[str] = ADDRESSES,
    words: Sequence[str] = (),
    wait: float = WAIT,
    code: Sequence[Path] = (REPOSITORY, REPOSITORY),
) -> list[dict[str, Any]]:
    """The reports of the parts, each with settings, and perhaps code, of its own."""

    def one(part: int) -> dict[str, Any]:
        env = settings(demo, part, addresses) | dict(differing[part] if differing else {})
        done = doctor(
            "gang", f"--wait={wait}", "-o", "json", *words, env=env, inside=sides[part].inside, code=code[part]
        )
        answer = report(done)
        assert answer["exit_code"] == done.returncode
        return answer

    with ThreadPoolExecutor(len(sides)) as pool:
        return list(pool.map(one, range(len(sides))))


def gang_problems(answer: Mapping[str, Any]) -> dict[str, str]:
    """Status by id of what is not well, among all checks."""
    return {c["id"]: c["status"] for c in answer["checks"] if c["status"] not in ("ok", "skip")}


def said(answer: Mapping[str, Any], id: str) -> str:
    return str(next(c["actual"] for c in answer["checks"] if c["id"] == id))


def remedy(answer: Mapping[str, Any], id: str) -> str:
    found = next(c["fix"] for c in answer["checks"] if c["id"] == id)
    return str(found["docker"] or found["host"])


def agreed(reports: Sequence[Mapping[str, Any]], id: str, status: str, code: int) -> str:
    """Asserts that all parts found this, only this, in the same words; returns them."""
    assert [gang_problems(r) for r in reports] == [{id: status}] * len(reports), [
        [(c["id"], c["actual"]) for c in r["checks"] if c["status"] not in ("ok", "skip")] for r in reports
    ]
    assert len({said(r, id) for r in reports}) == 1
    assert [r["exit_code"] for r in reports] == [code] * len(reports)
    return said(reports[0], id)


def test_two_healthy_parts(sides: list[Side], demo: Path) -> None:
    for answer in meet(sides, demo):
        assert gang_problems(answer) == {}
        assert answer["exit_code"] == 0
        assert len(answer["members"]) == 2


@pytest.mark.fault("N-01")
@pytest.mark.parametrize(("closed", "port"), [(0, PORT - 1), (0, PORT), (1, PORT + 3)])
def test_a_planned_port_that_is_filtered(sides: list[Side], demo: Path, closed: int, port: int) -> None:
    other = 1 - closed
    with sides[closed].dropping(str(port)):
        reports = meet(sides, demo)
    text = agreed(reports, "N-01", "error", 1)
    assert f"part{other} -> part{closed} ({ADDRESSES[closed]}): {port} (" in text
    assert "times out" in text
    assert f"part{closed} reaches part{other}, so incoming connections are filtered at part{closed}" in text
    assert f"open tcp {port} on part{closed}'s machine" in remedy(reports[0], "N-01")


@pytest.mark.fault("N-02")
def test_ports_of_the_kernels_choice_that_are_filtered(sides: list[Side], demo: Path) -> None:
    with sides[1].refusing_new(RANGE):
        reports = meet(sides, demo)
    text = agreed(reports, "N-02", "error", 1)
    assert text.startswith(f"part0 -> part1 ({ADDRESSES[1]}): 4")
    assert text.count("chosen by the kernel, as NCCL does) times out") == 3
    assert "part1 reaches part0, so incoming connections are filtered at part1" in text
    assert f"open tcp {RANGE.replace('-', ':')} between the machines" in remedy(reports[0], "N-02")


@pytest.mark.fault("N-10")
def test_interfaces_of_different_mtu(sides: list[Side], demo: Path) -> None:
    ip("-n", sides[1].name, "link", "set", sides[1].device, "mtu", "1200")
    try:
        reports = meet(sides, demo)
    finally:
        ip("-n", sides[1].name, "link", "set", sides[1].device, "mtu", "1500")
    text = agreed(reports, "N-10", "warn", 0)
    assert f"part0 {sides[0].device} 1500, part1 {sides[1].device} 1200" in text
    assert f"ip link set {sides[0].device} mtu 1200 on part0" in remedy(reports[0], "N-10")


@pytest.mark.fault("N-10")
@pytest.mark.parametrize("hole", [0, 1])
def test_large_packets_that_are_lost(sides: list[Side], demo: Path, hole: int) -> None:
    """Ports answer and greet, and the first long message never comes: the hang that an MTU makes."""
    with losing_large_packets(sides[hole]):
        reports = meet(sides, demo, wait=30)
    text = agreed(reports, "N-10", "error", 1)
    assert f"part{1 - hole} -> part{hole}: " in text
    assert "MTU" in text


DIFFERENCES: dict[str, tuple[dict[str, str], str, str]] = {
    "NCCL's way": ({"NCCL_ALGO": "Ring"}, "C-06", "error"),
    "an environment": ({"OMP_NUM_THREADS": "3"}, "C-06", "warn"),
    "a setting": ({"MAX_SEQ_LEN": "512"}, "C-07", "error"),
}


@pytest.mark.fault("C-06", "C-07")
@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_between_the_parts(sides: list[Side], demo: Path, name: str) -> None:
    env, id, status = DIFFERENCES[name]
    reports = meet(sides, demo, env, {})
    text = agreed(reports, id, status, 1 if status == "error" else 0)
    variable, value = next(iter(env.items()))
    assert f"{variable}: part0={value} part1=" in text
    assert reports[1]["drift"][0]["values"]["part0"] == value


@pytest.mark.fault("C-05")
def test_different_checkpoints(sides: list[Side], demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(demo, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    reports = meet(sides, demo, {}, {"CHECKPOINT_PATH": str(copy)})
    assert "model.checkpoint: part0=" in agreed(reports, "C-05", "error", 1)


@pytest.mark.fault("C-10")
@pytest.mark.parametrize("secrets_of_parts", [("one", "other"), ("one", "")])
def test_different_secrets(sides: list[Side], demo: Path, secrets_of_parts: tuple[str, str]) -> None:
    """Neither hears what the other has to say, so each can only tell that somebody is there who signs otherwise."""
    reports = meet(sides, demo, *({"GANG_SECRET": secret} for secret in secrets_of_parts), wait=6)
    for part, answer in enumerate(reports):
        assert gang_problems(answer) == {"C-10": "error"}
        assert said(answer, "C-10").startswith(f"part{part} -> part{1 - part}: ")
        assert "GANG_SECRET" in said(answer, "C-10")
        assert answer["exit_code"] == 1


def test_one_secret_for_both(sides: list[Side], demo: Path) -> None:
    for answer in meet(sides, demo, {"GANG_SECRET": "same"}, {"GANG_SECRET": "same"}):
        assert gang_problems(answer) == {}


@pytest.mark.fault("C-09")
def test_a_part_that_never_comes(sides: list[Side], demo: Path) -> None:
    [answer] = meet(sides[:1], demo, wait=4)
    assert gang_problems(answer) == {"C-09": "error"}
    assert answer["exit_code"] == 3
    assert f"no response from part1 ({ADDRESSES[1]}:{PORT}, rank 1)" in said(answer, "C-09")
    assert "WORLD_RANK=1" in remedy(answer, "C-09")


@pytest.mark.fault("C-11")
def test_what_is_wrong_with_one_is_told_by_the_other(sides: list[Side], demo: Path) -> None:
    reports = meet(sides, demo, {}, {"NCCL_SOCKET_IFNAME": "nothing"})
    assert gang_problems(reports[0]) == {"C-11": "error"}
    assert "part1: N-06" in said(reports[0], "C-11")
    assert gang_problems(reports[1]) == {"N-06": "error"}
    assert [r["exit_code"] for r in reports] == [1, 1]


@pytest.mark.fault("C-11")
def test_a_part_with_a_wrong_rank_says_so_before_it_goes(sides: list[Side], demo: Path) -> None:
    """It has no plan, and is not called absent for that."""
    reports = meet(sides, demo, {}, {"WORLD_RANK": "7"}, wait=10)
    assert gang_problems(reports[1]) == {"C-01": "error"}
    assert gang_problems(reports[0]) == {"C-11": "error"}
    assert "part1: C-01" in said(reports[0], "C-11")
    assert [r["exit_code"] for r in reports] == [1, 1]


@contextmanager
def named(sides: Sequence[Side], *lines: str) -> Iterator[None]:
    """What each side's /etc/hosts says: `ip netns exec` lays /etc/netns/NAME/hosts over it."""
    folders = [Path("/etc/netns") / side.name for side in sides]
    try:
        for folder, line in zip(folders, lines, strict=True):
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + line)
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.fault("C-01")
def test_two_with_the_rank_of_one(sides: list[Side], demo: Path) -> None:
    """By its address the second is part 1, and says so."""
    reports = meet(sides, demo, {}, {"WORLD_RANK": "0"}, wait=10)
    assert [gang_problems(r) for r in reports] == [{"C-11": "error"}, {"C-01": "error"}]
    assert "set WORLD_RANK=1" in said(reports[0], "C-11")


@pytest.mark.fault("C-01")
def test_two_with_one_rank_that_no_address_tells_apart(sides: list[Side], demo: Path) -> None:
    """The list has names, so each believes what it was told, until the other answers to the wrong number."""
    both = "".join(f"{address} node-{n}\n" for n, address in enumerate(ADDRESSES))
    with named(sides, both, both):
        reports = meet(sides, demo, {}, {"WORLD_RANK": "0"}, addresses=("node-0", "node-1"), wait=6)
    text = agreed(reports, "C-01", "error", 1)
    assert text == f"part0 -> part1: part0 answers at node-1:{PORT + 3}"
    assert "check WORLD_RANK on the part that answers" in remedy(reports[0], "C-01")


def test_two_healthy_parts_that_know_the_leader_alone(sides: list[Side], demo: Path) -> None:
    """Part 0 is told of nobody, and waits for those that the plan says there are."""
    leader = {"JSON_GANG_PARTS": "", "LEADER_ADDRESS": ADDRESSES[0]}
    for answer in meet(sides, demo, leader, leader):
        assert gang_problems(answer) == {}
        assert len(answer["members"]) == 2


@pytest.mark.fault("C-10")
def test_another_program_where_a_doctor_should_answer(sides: list[Side], demo: Path) -> None:
    address = (ADDRESSES[1], PORT + 3)
    listen = f"import socket, time; s = socket.create_server({address!r}); print(flush=True); time.sleep(60)"
    with subprocess.Popen([*sides[1].inside, sys.executable, "-c", listen], stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout
        stranger.stdout.readline()
        try:
            [answer] = meet(sides[:1], demo, wait=4)
        finally:
            stranger.kill()
    assert gang_problems(answer) == {"C-10": "error"}
    assert f"part0 -> part1: another program answers at {ADDRESSES[1]}:{PORT + 3}" in said(answer, "C-10")
    assert f"ss -ltnp sport = :{PORT + 3}" in remedy(answer, "C-10")


@pytest.mark.fault("C-04")
def test_parts_of_different_versions(sides: list[Side], demo: Path, tmp_path: Path) -> None:
    """One runs a copy of this very code that calls itself newer."""
    for package in ("doctor", "rtp_llm"):
        shutil.copytree(REPOSITORY / package, tmp_path / package)
    init = tmp_path / "rtp_llm" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{rtp_llm.__version__}"', '"9.9.9"'))
    reports = meet(sides, demo, code=(REPOSITORY, tmp_path))
    text = agreed(reports, "C-04", "error", 1)
    assert f"version.rtp-llm: part0={rtp_llm.__version__} part1=9.9.9" in text


def test_tier_3_of_one_part_alone_is_not_called_ready(demo: Path) -> None:
    """The group needs all parts: what was not tried is unknown."""
    env = settings(demo, 0, ("127.0.0.1", "127.0.0.1"))
    members = json.loads(env["JSON_GANG_PARTS"])
    members["x_part1"]["port"] = PORT + 100
    done = doctor("--tier", "3", "-o", "json", env=env | {"JSON_GANG_PARTS": json.dumps(members)})
    answer = report(done)
    assert gang_problems(answer)["X-01"] == "unknown"
    assert (answer["exit_code"], done.returncode) == (3, 3)
    assert "rtp-llm-doctor gang --tier 3" in remedy(answer, "X-01")


def test_a_name_that_leads_to_oneself(sides: list[Side], demo: Path) -> None:
    """/etc/hosts of part 1 calls part 0 127.0.1.1."""
    with named(sides, f"{ADDRESSES[0]} node-a\n", "127.0.1.1 node-a\n"):
        reports = meet(sides, demo, addresses=("node-a", ADDRESSES[1]), wait=4)
    assert gang_problems(reports[1]) == {"N-04": "error"}
    assert gang_problems(reports[0]) == {"C-11": "error"}
    assert "part1: N-04" in said(reports[0], "C-11")
    assert "--add-host node-a:<its address>" in remedy(reports[1], "N-04")


@pytest.mark.fault("X-01", "X-02")
def test_the_group_of_both_parts_sums_right(sides: list[Side], demo: Path) -> None:
    for side, answer in zip(sides, meet(sides, demo, words=("--tier=3",)), strict=True):
        assert gang_problems(answer) == {}
        assert "correct at 8 B, 64.0 KiB, 16.0 MiB" in said(answer, "X-01")
        assert "ms per token" in said(answer, "X-02")
        assert f"/s over {side.device}, at most 1.2 GiB/s" in said(answer, "X-02")


@pytest.mark.fault("N-03")
def test_a_bridge_that_nccl_would_take(sides: list[Side], demo: Path) -> None:
    """NCCL does not leave out br-…; this server names the right interface itself, unless it was told otherwise."""
    name = sides[0].name
    ip("-n", name, "link", "add", "br-8f2a", "type", "veth", "peer", "br-8f2b")
    try:
        ip("-n", name, "addr", "add", "172.18.0.1/16", "dev", "br-8f2a")
        for device in ("br-8f2a", "br-8f2b"):
            ip("-n", name, "link", "set", device, "up")
        until_up(Side(name, "br-8f2a", "172.18.0.1"))
        assert [gang_problems(r) for r in meet(sides, demo)] == [{}, {}]
        reports = meet(sides, demo, {"NCCL_SOCKET_IFNAME": "br-"}, {})
    finally:
        ip("-n", name, "link", "del", "br-8f2a")
    assert gang_problems(reports[0]) == {"N-03": "error"}
    assert "NCCL would use br-8f2a (172.18.0.1), the interface to x_part1 is doc0" in said(reports[0], "N-03")
    assert "NCCL_SOCKET_IFNAME==doc0" in remedy(reports[0], "N-03")
    assert gang_problems(reports[1]) == {"C-11": "error"}
