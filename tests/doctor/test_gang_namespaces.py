"""Two parts in two network namespaces, joined by a veth pair, with a fault between them or in one of them.

Each runs `rtp-llm-doctor gang`. Both must report the same problem in the same words, with its direction and the part
that causes it, and no other problem.
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

pytestmark = pytest.mark.slow

PORT = 10000
ADDRESSES = ("10.78.0.1", "10.78.0.2")
RANGE = "40000-49999"  # ephemeral ports; narrower than the default, so that a firewall rule can match them
WAIT = 20.0


KEEP_CGROUPS = """\
mount --make-rprivate / && mount -t tmpfs kept /mnt && mkdir /mnt/cgroup && mount --rbind /sys/fs/cgroup /mnt/cgroup &&
exec ip netns exec "$0" sh -c 'mount --rbind /mnt/cgroup /sys/fs/cgroup && exec "$@"' sh "$@"
"""


def ip(*arguments: str) -> None:
    process = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if process.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {process.stderr.strip()}")


@dataclass(frozen=True)
class Side:
    """One machine: a network namespace and its end of the veth pair."""

    name: str
    device: str
    address: str

    @property
    def inside(self) -> list[str]:
        """A command prefix that runs a command in the namespace.

        `ip netns exec` mounts a new /sys without cgroups, so they are bind-mounted elsewhere first.
        """
        return ["unshare", "--mount", "sh", "-c", KEEP_CGROUPS, self.name]

    def run(self, *command: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True, capture_output=True)

    @contextmanager
    def drop_new_connections(self, ports: str) -> Iterator[None]:
        """Drops incoming SYN packets for these ports; connections that this side opens still work."""
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
    def drop_ports(self, ports: str) -> Iterator[None]:
        """Drops all incoming packets for these TCP ports, by policy routing before the local table."""
        rule = ("pref", "1", "iif", self.device, "ipproto", "tcp", "dport", ports, "blackhole")
        ip("-n", self.name, "rule", "add", *rule)
        try:
            yield
        finally:
            ip("-n", self.name, "rule", "del", *rule)


@contextmanager
def drop_large_packets(side: Side) -> Iterator[None]:
    """Drops incoming packets longer than 1300 bytes without an ICMP error: a path MTU black hole."""
    rule = ("INPUT", "-i", side.device, "-p", "tcp", "-m", "length", "--length", "1300:65535", "-j", "DROP")
    side.run("iptables", "-I", *rule)
    try:
        yield
    finally:
        side.run("iptables", "-D", *rule)


def wait_until_up(side: Side) -> None:
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
    both = [Side(f"{tag}{n}", f"doc{n}", address) for n, address in enumerate(ADDRESSES)]
    a, b = both
    try:
        try:
            for side in both:
                ip("netns", "add", side.name)
            ip("link", "add", a.device, "netns", a.name, "type", "veth", "peer", b.device, "netns", b.name)
            for side in both:
                ip("-n", side.name, "addr", "add", f"{side.address}/24", "dev", side.device)
                for device in ("lo", side.device):
                    ip("-n", side.name, "link", "set", device, "up")
                # Moves the rule of the local table, which comes first by default.
                ip("-n", side.name, "rule", "add", "pref", "5", "lookup", "local")
                ip("-n", side.name, "rule", "del", "pref", "0", "lookup", "local")
                side.run("sh", "-c", f"echo {RANGE.replace('-', ' ')} > /proc/sys/net/ipv4/ip_local_port_range")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        for side in both:  # the kernel detects the carrier after up to a second
            wait_until_up(side)
        yield both
    finally:
        for side in both:
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


def run_gang_doctors(
    sides: Sequence[Side],
    demo: Path,
    *environments: Mapping[str, str],
    addresses: Sequence[str] = ADDRESSES,
    arguments: Sequence[str] = (),
    wait: float = WAIT,
    code: Sequence[Path] = (REPOSITORY, REPOSITORY),
) -> list[dict[str, Any]]:
    """Returns the parts' reports. Each part may have settings and code of its own."""

    def run_part(part: int) -> dict[str, Any]:
        env = settings(demo, part, addresses) | dict(environments[part] if environments else {})
        command = ("gang", f"--wait={wait}", "-o", "json", *arguments)
        process = doctor(*command, env=env, inside=sides[part].inside, code=code[part])
        part_report = report(process)
        assert part_report["exit_code"] == process.returncode
        return part_report

    with ThreadPoolExecutor(len(sides)) as pool:
        return list(pool.map(run_part, range(len(sides))))


def gang_problems(part_report: Mapping[str, Any]) -> dict[str, str]:
    """Status by id of all checks that are neither ok nor skipped.

    Ignores N-13: the throughput of a link is low while other tests use the cores.
    """
    statuses = {c["id"]: c["status"] for c in part_report["checks"] if c["id"] != "N-13"}
    return {id: status for id, status in statuses.items() if status not in ("ok", "skip")}


def actual(part_report: Mapping[str, Any], id: str) -> str:
    return str(next(c["actual"] for c in part_report["checks"] if c["id"] == id))


def fix(part_report: Mapping[str, Any], id: str) -> str:
    fixes = next(c["fix"] for c in part_report["checks"] if c["id"] == id)
    return str(fixes["docker"] or fixes["host"])


def assert_same_problem(reports: Sequence[Mapping[str, Any]], id: str, status: str, code: int) -> str:
    """Asserts that all parts report this problem only, with the same text; returns the text."""
    assert [gang_problems(r) for r in reports] == [{id: status}] * len(reports), [
        [(c["id"], c["actual"]) for c in r["checks"] if c["status"] not in ("ok", "skip")] for r in reports
    ]
    assert len({actual(r, id) for r in reports}) == 1
    assert [r["exit_code"] for r in reports] == [code] * len(reports)
    return actual(reports[0], id)


def test_two_healthy_parts(sides: list[Side], demo: Path) -> None:
    for part_report in run_gang_doctors(sides, demo):
        assert gang_problems(part_report) == {}
        assert part_report["exit_code"] == 0
        assert len(part_report["members"]) == 2


@pytest.mark.fault("N-01")
@pytest.mark.parametrize(("closed", "port"), [(0, PORT - 1), (0, PORT), (1, PORT + 3)])
def test_filtered_planned_port_is_an_error(sides: list[Side], demo: Path, closed: int, port: int) -> None:
    other = 1 - closed
    with sides[closed].drop_ports(str(port)):
        reports = run_gang_doctors(sides, demo)
    text = assert_same_problem(reports, "N-01", "error", 1)
    assert f"part{other} -> part{closed} ({ADDRESSES[closed]}): {port} (" in text
    assert "times out" in text
    assert f"part{closed} reaches part{other}, so incoming connections are filtered at part{closed}" in text
    assert f"open tcp {port} on part{closed}'s machine" in fix(reports[0], "N-01")


@pytest.mark.fault("N-02")
def test_filtered_ephemeral_ports_are_an_error(sides: list[Side], demo: Path) -> None:
    with sides[1].drop_new_connections(RANGE):
        reports = run_gang_doctors(sides, demo)
    text = assert_same_problem(reports, "N-02", "error", 1)
    assert text.startswith(f"part0 -> part1 ({ADDRESSES[1]}): 4")
    assert text.count("an ephemeral port, as NCCL uses) times out") == 3
    assert "part1 reaches part0, so incoming connections are filtered at part1" in text
    assert f"open tcp {RANGE.replace('-', ':')} between the machines" in fix(reports[0], "N-02")


@pytest.mark.fault("N-10")
def test_different_mtus_are_a_warning(sides: list[Side], demo: Path) -> None:
    ip("-n", sides[1].name, "link", "set", sides[1].device, "mtu", "1200")
    try:
        reports = run_gang_doctors(sides, demo)
    finally:
        ip("-n", sides[1].name, "link", "set", sides[1].device, "mtu", "1500")
    text = assert_same_problem(reports, "N-10", "warn", 0)
    assert f"part0 {sides[0].device} 1500, part1 {sides[1].device} 1200" in text
    assert f"ip link set {sides[0].device} mtu 1200 on part0" in fix(reports[0], "N-10")


@pytest.mark.fault("N-10")
@pytest.mark.parametrize("hole", [0, 1])
def test_lost_large_packets_are_an_error(sides: list[Side], demo: Path, hole: int) -> None:
    """Ports accept connections and send greetings, but the first long message never arrives."""
    with drop_large_packets(sides[hole]):
        reports = run_gang_doctors(sides, demo, wait=30)
    text = assert_same_problem(reports, "N-10", "error", 1)
    assert f"part{1 - hole} -> part{hole}: " in text
    assert "MTU" in text


DIFFERENCES: dict[str, tuple[dict[str, str], str, str]] = {
    "an NCCL algorithm": ({"NCCL_ALGO": "Ring"}, "C-06", "error"),
    "an environment": ({"OMP_NUM_THREADS": "3"}, "C-06", "warn"),
    "a setting": ({"MAX_SEQ_LEN": "512"}, "C-07", "error"),
}


@pytest.mark.fault("C-06", "C-07")
@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_between_the_parts_are_reported(sides: list[Side], demo: Path, name: str) -> None:
    env, id, status = DIFFERENCES[name]
    reports = run_gang_doctors(sides, demo, env, {})
    text = assert_same_problem(reports, id, status, 1 if status == "error" else 0)
    variable, value = next(iter(env.items()))
    assert f"{variable}: part0={value} part1=" in text
    assert reports[1]["drift"][0]["values"]["part0"] == value


@pytest.mark.fault("C-05")
def test_different_checkpoints(sides: list[Side], demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(demo, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    reports = run_gang_doctors(sides, demo, {}, {"CHECKPOINT_PATH": str(copy)})
    assert "model.checkpoint: part0=" in assert_same_problem(reports, "C-05", "error", 1)


@pytest.mark.fault("C-10")
@pytest.mark.parametrize("secrets_of_parts", [("one", "other"), ("one", "")])
def test_different_secrets(sides: list[Side], demo: Path, secrets_of_parts: tuple[str, str]) -> None:
    """Neither part can read the other's report, so each reports only that the other one has another secret."""
    reports = run_gang_doctors(sides, demo, *({"GANG_SECRET": secret} for secret in secrets_of_parts), wait=6)
    for part, part_report in enumerate(reports):
        assert gang_problems(part_report) == {"C-10": "error"}
        assert actual(part_report, "C-10").startswith(f"part{part} -> part{1 - part}: ")
        assert "GANG_SECRET" in actual(part_report, "C-10")
        assert part_report["exit_code"] == 1


def test_one_secret_for_both(sides: list[Side], demo: Path) -> None:
    for part_report in run_gang_doctors(sides, demo, {"GANG_SECRET": "same"}, {"GANG_SECRET": "same"}):
        assert gang_problems(part_report) == {}


@pytest.mark.fault("C-09")
def test_absent_part_is_an_error(sides: list[Side], demo: Path) -> None:
    [part_report] = run_gang_doctors(sides[:1], demo, wait=4)
    assert gang_problems(part_report) == {"C-09": "error"}
    assert part_report["exit_code"] == 3
    assert f"no response from part1 ({ADDRESSES[1]}:{PORT}, rank 1)" in actual(part_report, "C-09")
    assert "WORLD_RANK=1" in fix(part_report, "C-09")


@pytest.mark.fault("C-11")
def test_error_of_one_part_is_reported_by_the_other(sides: list[Side], demo: Path) -> None:
    reports = run_gang_doctors(sides, demo, {}, {"NCCL_SOCKET_IFNAME": "nothing"})
    assert gang_problems(reports[0]) == {"C-11": "error"}
    assert "part1: N-06" in actual(reports[0], "C-11")
    assert gang_problems(reports[1]) == {"N-06": "error"}
    assert [r["exit_code"] for r in reports] == [1, 1]


@pytest.mark.fault("C-11")
def test_part_with_invalid_rank_sends_its_error(sides: list[Side], demo: Path) -> None:
    """A part without a valid plan sends its errors to the others, so they do not report it as absent."""
    reports = run_gang_doctors(sides, demo, {}, {"WORLD_RANK": "7"}, wait=10)
    assert gang_problems(reports[1]) == {"C-01": "error"}
    assert gang_problems(reports[0]) == {"C-11": "error"}
    assert "part1: C-01" in actual(reports[0], "C-11")
    assert [r["exit_code"] for r in reports] == [1, 1]


@contextmanager
def hosts_files(sides: Sequence[Side], *lines: str) -> Iterator[None]:
    """Sets each side's /etc/hosts: `ip netns exec` mounts /etc/netns/NAME/hosts over it."""
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
def test_duplicate_rank_is_found_by_address(sides: list[Side], demo: Path) -> None:
    """The second part has WORLD_RANK=0, but an address that the member list assigns to part 1."""
    reports = run_gang_doctors(sides, demo, {}, {"WORLD_RANK": "0"}, wait=10)
    assert [gang_problems(r) for r in reports] == [{"C-11": "error"}, {"C-01": "error"}]
    assert "set WORLD_RANK=1" in actual(reports[0], "C-11")


@pytest.mark.fault("C-01")
def test_duplicate_rank_is_found_by_greeting(sides: list[Side], demo: Path) -> None:
    """The member list has host names, so only the part number in the doctor's greeting reveals the wrong rank."""
    hosts = "".join(f"{address} node-{n}\n" for n, address in enumerate(ADDRESSES))
    with hosts_files(sides, hosts, hosts):
        reports = run_gang_doctors(sides, demo, {}, {"WORLD_RANK": "0"}, addresses=("node-0", "node-1"), wait=6)
    text = assert_same_problem(reports, "C-01", "error", 1)
    assert text == f"part0 -> part1: part0 instead of part1 answers at node-1:{PORT + 3}"
    assert "correct WORLD_RANK on the part that answers" in fix(reports[0], "C-01")


def test_two_healthy_parts_with_leader_address_only(sides: list[Side], demo: Path) -> None:
    """Part 0 does not know the addresses of other parts. It waits until the number of parts in its plan have sent
    reports."""
    leader = {"JSON_GANG_PARTS": "", "LEADER_ADDRESS": ADDRESSES[0]}
    for part_report in run_gang_doctors(sides, demo, leader, leader):
        assert gang_problems(part_report) == {}
        assert len(part_report["members"]) == 2


@pytest.mark.fault("C-10")
def test_another_program_on_the_doctors_port_is_an_error(sides: list[Side], demo: Path) -> None:
    address = (ADDRESSES[1], PORT + 3)
    listen = f"import socket, time; s = socket.create_server({address!r}); print(flush=True); time.sleep(60)"
    with subprocess.Popen([*sides[1].inside, sys.executable, "-c", listen], stdout=subprocess.PIPE) as program:
        assert program.stdout
        program.stdout.readline()
        try:
            [part_report] = run_gang_doctors(sides[:1], demo, wait=4)
        finally:
            program.kill()
    assert gang_problems(part_report) == {"C-10": "error"}
    assert f"part0 -> part1: another program answers at {ADDRESSES[1]}:{PORT + 3}" in actual(part_report, "C-10")
    assert f"ss -ltnp sport = :{PORT + 3}" in fix(part_report, "C-10")


@pytest.mark.fault("C-04")
def test_parts_of_different_versions(sides: list[Side], demo: Path, tmp_path: Path) -> None:
    """The doctor reports parts of different versions. Part 1 runs a copy of this code with another version number."""
    for package in ("doctor", "rtp_llm"):
        shutil.copytree(REPOSITORY / package, tmp_path / package)
    init = tmp_path / "rtp_llm" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{rtp_llm.__version__}"', '"9.9.9"'))
    reports = run_gang_doctors(sides, demo, code=(REPOSITORY, tmp_path))
    text = assert_same_problem(reports, "C-04", "error", 1)
    assert f"version.rtp-llm: part0={rtp_llm.__version__} part1=9.9.9" in text


def test_tier_3_of_one_part_alone_is_incomplete(demo: Path) -> None:
    """The all-reduce needs the ranks of all parts, so its result is unknown."""
    env = settings(demo, 0, ("127.0.0.1", "127.0.0.1"))
    members = json.loads(env["JSON_GANG_PARTS"])
    members["x_part1"]["port"] = PORT + 100
    process = doctor("--tier", "3", "-o", "json", env=env | {"JSON_GANG_PARTS": json.dumps(members)})
    part_report = report(process)
    assert gang_problems(part_report)["X-01"] == "unknown"
    assert (part_report["exit_code"], process.returncode) == (3, 3)
    assert "rtp-llm-doctor gang --tier 3" in fix(part_report, "X-01")


def test_name_of_another_part_that_resolves_to_loopback_is_an_error(sides: list[Side], demo: Path) -> None:
    """/etc/hosts of part 1 maps part 0's name to 127.0.1.1."""
    with hosts_files(sides, f"{ADDRESSES[0]} node-a\n", "127.0.1.1 node-a\n"):
        reports = run_gang_doctors(sides, demo, addresses=("node-a", ADDRESSES[1]), wait=4)
    assert gang_problems(reports[1]) == {"N-04": "error"}
    assert gang_problems(reports[0]) == {"C-11": "error"}
    assert "part1: N-04" in actual(reports[0], "C-11")
    assert "--add-host node-a:<its address>" in fix(reports[1], "N-04")


@pytest.mark.fault("X-01", "X-02")
def test_all_reduce_over_both_parts_is_correct(sides: list[Side], demo: Path) -> None:
    for side, part_report in zip(sides, run_gang_doctors(sides, demo, arguments=("--tier=3",)), strict=True):
        assert gang_problems(part_report) == {}
        assert "correct sums of 8 B, 64.0 KiB, 16.0 MiB" in actual(part_report, "X-01")
        assert "ms per token" in actual(part_report, "X-02")
        assert f"/s over {side.device}, at most 1.2 GiB/s" in actual(part_report, "X-02")


@pytest.mark.fault("N-03")
def test_bridge_in_nccl_socket_ifname_is_an_error(sides: list[Side], demo: Path) -> None:
    """NCCL_SOCKET_IFNAME=br- makes NCCL use a Docker bridge (br-…), which NCCL does not exclude. If it is not set, this
    server sets the right interface."""
    name = sides[0].name
    ip("-n", name, "link", "add", "br-8f2a", "type", "veth", "peer", "br-8f2b")
    try:
        ip("-n", name, "addr", "add", "172.18.0.1/16", "dev", "br-8f2a")
        for device in ("br-8f2a", "br-8f2b"):
            ip("-n", name, "link", "set", device, "up")
        wait_until_up(Side(name, "br-8f2a", "172.18.0.1"))
        assert [gang_problems(r) for r in run_gang_doctors(sides, demo)] == [{}, {}]
        reports = run_gang_doctors(sides, demo, {"NCCL_SOCKET_IFNAME": "br-"}, {})
    finally:
        ip("-n", name, "link", "del", "br-8f2a")
    assert gang_problems(reports[0]) == {"N-03": "error"}
    assert "NCCL would use br-8f2a (172.18.0.1), the interface to x_part1 is doc0" in actual(reports[0], "N-03")
    assert "NCCL_SOCKET_IFNAME==doc0" in fix(reports[0], "N-03")
    assert gang_problems(reports[1]) == {"C-11": "error"}
