"""The parsers of kernel files, settings and lists, with arbitrary input."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.context import parse_config
from doctor.host import Interface, parse_number_ranges
from doctor.mounts import mount_of, parse_mountinfo
from doctor.nccl import NameFilter, choose_interfaces, parse_conf
from rtp_llm.config import Config
from rtp_llm.errors import ConfigError
from rtp_llm.machine.cgroup import UNLIMITED, Cgroup, parse_proc_cgroup
from rtp_llm.machine.devices import apply_cuda_visible_devices, usable_cores
from rtp_llm.parallel.members import read_members

settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")

WORD = st.text(
    st.characters(codec="ascii", exclude_characters="\n\r\t \\,\x00", categories=("L", "N", "P")), min_size=1
)


# mountinfo


@given(point=st.lists(WORD, max_size=3), fstype=st.sampled_from(["tmpfs", "ext4"]), read_only=st.booleans())
def test_parse_mountinfo_returns_the_fields(point: list[str], fstype: str, read_only: bool) -> None:
    path = "/" + "/".join(p.replace("/", "") or "x" for p in point)
    options = "ro" if read_only else "rw,relatime"
    line = f"36 35 98:0 / {path} {options} shared:1 - {fstype} a\\040b rw"
    [mount] = parse_mountinfo(line + "\nnot a line\n")
    assert (mount.point, mount.fstype, mount.source, mount.read_only) == (path, fstype, "a b", read_only)


@given(st.text())
def test_parse_mountinfo_accepts_any_text(text: str) -> None:
    mount_of(parse_mountinfo(text), "/dev/shm")


def test_mount_of_returns_the_longest_and_last_mount() -> None:
    lines = ["1 0 0:1 / / rw - overlay o rw", "2 1 0:2 / /dev rw - tmpfs d rw", "3 2 0:3 / /dev/shm rw - tmpfs a rw"]
    mounts = parse_mountinfo("\n".join([*lines, "4 2 0:4 / /dev/shm ro - tmpfs b ro"]))
    assert [mount_of(mounts, p).source for p in ("/dev/shm/x", "/dev/shmx", "/dev", "/etc")] == ["b", "d", "d", "o"]  # type: ignore[union-attr]


# cgroups


def files(table: dict[str, str]) -> Cgroup:
    return Cgroup.read(table.get)


NUMBER = st.integers(0, 1 << 40)


@given(limit=NUMBER | st.just("max"), used=NUMBER, cache=NUMBER)
def test_available_memory_includes_the_page_cache(limit: int | str, used: int, cache: int) -> None:
    root = "/sys/fs/cgroup"
    group = files(
        {
            f"{root}/cgroup.controllers": "memory",
            f"{root}/memory.max": f"{limit}\n",
            f"{root}/memory.current": f"{used}\n",
            f"{root}/memory.stat": f"inactive_file {cache}\nactive_file 0\n",
        }
    )
    expected = UNLIMITED if limit == "max" else max(0, int(limit) - used + cache)
    assert (group.version, group.available_memory) == (2, expected)


def test_cgroup_version_1_reads_its_own_path() -> None:
    root = "/sys/fs/cgroup"
    group = files(
        {
            "/proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/\n",
            f"{root}/memory/memory.limit_in_bytes": "9223372036854771712",
            f"{root}/memory/docker/abc/memory.limit_in_bytes": "1000",
            f"{root}/memory/docker/abc/memory.usage_in_bytes": "400",
            f"{root}/cpu/cpu.cfs_quota_us": "150000",
            f"{root}/cpu/cpu.cfs_period_us": "100000",
        }
    )
    assert (group.version, group.available_memory, group.cpus) == (1, 600, 1.5)


@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("250000", 2), ("50000", 1), ("900000", 4)])
@pytest.mark.parametrize("version", [1, 2])
def test_a_quota_limits_the_cores(version: int, quota: str, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    v1 = {"memory/memory.limit_in_bytes": "1", "cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000"}
    v2 = {"cgroup.controllers": "cpu", "cpu.max": f"{quota} 100000".replace("-1", "max")}
    table = {f"/sys/fs/cgroup/{name}": text for name, text in (v1 if version == 1 else v2).items()}
    monkeypatch.setattr("rtp_llm.machine.devices.read_text", table.get)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    assert usable_cores() == cores


V1 = (
    "{root}/{controller}",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_active_file",
    "9223372036854771712",
)
V2 = ("{root}", "memory.max", "memory.current", "active_file", "max")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ({"/pod/app": (900, 100, 0), "/pod": (1000, 800, 50)}, 250),  # siblings in the pod have used its memory
        ({"/pod/app": (900, 800, 50), "/pod": (2000, 800, 50)}, 150),
        ({"/pod/app": (None, 100, 0), "/pod": (1000, 800, 0)}, 200),
        ({"/pod/app": (None, 100, 0), "": (1000, 900, 30)}, 130),  # in a container, the mount's root is its cgroup
        ({"/pod/app": (None, 100, 0), "/pod": (None, 800, 0)}, UNLIMITED),
        ({"/pod/app": (900, 950, 0), "/pod": (2000, 950, 0)}, 0),
    ],
)
def test_the_tightest_ancestor_limits_memory(
    version: int, levels: dict[str, tuple[int | None, int, int]], expected: int
) -> None:
    directory, limit_name, usage_name, cache_name, unlimited = V1 if version == 1 else V2
    mount = directory.format(root="/sys/fs/cgroup", controller="memory")
    table = {"/proc/self/cgroup": "4:memory:/pod/app\n" if version == 1 else "0::/pod/app\n"}
    table |= {"/sys/fs/cgroup/pids/cgroup.procs": ""} if version == 1 else {"/sys/fs/cgroup/cgroup.controllers": ""}
    for path, (limit, usage, cache) in levels.items():
        table |= {
            f"{mount}{path}/{limit_name}": unlimited if limit is None else str(limit),
            f"{mount}{path}/{usage_name}": str(usage),
            f"{mount}{path}/memory.stat": f"{cache_name} {cache}\n",
        }
    assert (files(table).version, files(table).available_memory) == (version, expected)


def test_ancestors_limit_cores_and_processes() -> None:
    root = "/sys/fs/cgroup"
    limits = {
        "/a/b": ("max 100000", "max", "5"),
        "/a": ("150000 100000", "40", "30"),
        "": ("200000 100000", "99", "50"),
    }
    table = {"/proc/self/cgroup": "0::/a/b\n", f"{root}/cgroup.controllers": ""}
    for path, contents in limits.items():
        names = ("cpu.max", "pids.max", "pids.current")
        table |= {f"{root}{path}/{name}": text for name, text in zip(names, contents, strict=True)}
    group = files(table)
    assert (group.cpus, group.available_pids, group.pids_max) == (1.5, 10, 40)


def test_a_path_outside_the_namespace_is_not_followed() -> None:
    table = {
        "/proc/self/cgroup": "0::/../x\n",
        "/sys/fs/cgroup/cgroup.controllers": "",
        "/sys/fs/cgroup/memory.max": "7",
    }
    assert files(table | {"/sys/fs/cgroup/../x/memory.max": "3", "/sys/fs/cgroup/x/memory.max": "5"}).memory_max == 7


@given(st.text(), st.dictionaries(st.sampled_from(["memory.max", "cpu.max", "pids.max", "memory.events"]), st.text()))
def test_cgroup_accepts_any_files(own: str, contents: dict[str, str]) -> None:
    parse_proc_cgroup(own)
    group = files({f"/sys/fs/cgroup/{n}": t for n, t in contents.items()} | {"/sys/fs/cgroup/cgroup.controllers": ""})
    assert 0 <= group.available_memory <= UNLIMITED


# CUDA_VISIBLE_DEVICES

UUIDS = [f"GPU-{n:08x}-0000" for n in range(8)]


@given(st.lists(st.integers(0, 7), min_size=1, unique=True))
def test_indices_and_uuids_select_the_same_gpus(indices: list[int]) -> None:
    by_index = apply_cuda_visible_devices(UUIDS, ",".join(map(str, indices)))
    by_uuid = apply_cuda_visible_devices(UUIDS, ", ".join(UUIDS[i] for i in indices))
    assert by_index == by_uuid
    assert by_index.indices == tuple(indices)
    assert not by_index.problem


@given(st.lists(st.integers(0, 7), unique=True), st.integers(8, 99) | st.sampled_from(["-1", "x", "", "GPU-f"]))
def test_cuda_stops_at_the_first_invalid_entry(good: list[int], bad: int | str) -> None:
    found = apply_cuda_visible_devices(UUIDS, ",".join([*map(str, good), str(bad), "0"]))
    assert found.indices == tuple(good)
    assert "CUDA ignores it and all after it" in found.problem


@given(st.none() | st.text())
def test_visible_devices_accept_any_text(text: str | None) -> None:
    found = apply_cuda_visible_devices(UUIDS, text)
    assert set(found.indices) <= set(range(-1, 8))
    assert apply_cuda_visible_devices(UUIDS, "²").problem
    assert apply_cuda_visible_devices(UUIDS, None).indices == tuple(range(8))


# NCCL's interface names


def up(*names: str) -> list[Interface]:
    return [Interface(name, (f"10.0.0.{n}",), 1500, 0) for n, name in enumerate(names)]


@pytest.mark.parametrize(
    ("setting", "chosen"),
    [
        ("", ["br-8f2a", "eth0", "eth10", "cni0"]),  # not loopback, docker* or virbr*: all others
        ("eth", ["eth0", "eth10"]),
        ("=eth0", ["eth0"]),
        ("eth1,cni", ["eth10", "cni0"]),
        ("^docker,lo,br-,virbr", ["eth0", "eth10", "cni0"]),
        ("^=lo,eth0", ["br-8f2a", "docker0", "eth10", "cni0", "virbr0"]),
        ("ens", []),
    ],
)
def test_nccl_socket_ifname_syntax(setting: str, chosen: list[str]) -> None:
    here = up("lo", "br-8f2a", "docker0", "eth0", "eth10", "cni0", "virbr0")
    assert [i.name for i in choose_interfaces(here, setting)] == chosen


@pytest.mark.parametrize(
    ("names", "first"),
    [(("lo", "docker0"), "docker0"), (("lo",), "lo"), (("virbr0",), "virbr0"), (("eth0", "ib0"), "ib0")],
)
def test_default_interface_order(names: tuple[str, ...], first: str) -> None:
    assert choose_interfaces(up(*names), "")[0].name == first


@given(st.text(), WORD)
def test_name_filter_accepts_any_text(text: str, name: str) -> None:
    plain = NameFilter.parse(text.lstrip("^"))
    assert NameFilter.parse("^" + text.lstrip("^")).takes(name) != plain.takes(name)


@given(st.text())
def test_parse_conf_accepts_any_text(text: str) -> None:
    assert all(not name.startswith("#") for name in parse_conf(text))
    assert parse_conf("# A=1\nNCCL_A = x\nNCCL_A=y\nnothing\n") == {"NCCL_A": "x"}


# Lists of cores and ports


@given(st.sets(st.integers(0, 500)))
def test_parse_number_ranges_returns_the_numbers(cpus: set[int]) -> None:
    assert parse_number_ranges(",".join(map(str, sorted(cpus)))) == cpus


@given(st.text())
def test_parse_number_ranges_accepts_any_text(text: str) -> None:
    parse_number_ranges(text[:20])
    assert parse_number_ranges("0-3,8\n") == {0, 1, 2, 3, 8}


# The distribute file and the settings

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x_part0", "x_part1", "name", "ip", "port"]), inner)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_a_member_list_or_an_error(value: Any) -> None:
    error, indices = members_or_error(Config.model_validate({"json_gang_parts": json.dumps(value)}))
    assert indices == list(range(len(indices)))
    if error:
        assert (error.check, "JSON_GANG_PARTS" in str(error)) == ("C-02", True)


def members_or_error(config: Config) -> tuple[ConfigError | None, list[int]]:
    try:
        return None, [member.index for member in read_members(config)]
    except ConfigError as error:
        return error, []


@given(text=st.text(max_size=60))
def test_any_text_in_a_distribute_file_is_an_error(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("list") / "gang.json"
    path.write_text(text, errors="replace")
    with pytest.raises(ConfigError) as caught:
        read_members(Config.model_validate({"distribute_config_file": str(path)}))
    assert caught.value.check == "C-02"


NAMES = st.sampled_from(
    [*(n.upper() for n in Config.model_fields), "WROLD_RANK", "TP_SZIE", "CHECKPOINT_PAHT", "NCCL_DEBUG"]
)


@given(st.dictionaries(NAMES, st.text(st.characters(exclude_characters="\x00", codec="utf-8"), max_size=12)))
def test_any_environment_gives_a_config(environ: dict[str, str]) -> None:
    found = parse_config((), environ)
    assert isinstance(found.config, Config)
    for error in found.config_errors:
        assert error.check == "M-14"
