"""The plan: the documented launches, and contradictory settings."""

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_llm.config import Config
from rtp_llm.errors import ConfigError, ExitCode
from rtp_llm.parallel.members import Member
from rtp_llm.parallel.plan import (
    RENDEZVOUS_PORT_OFFSET,
    STEP_PORT_OFFSET,
    TORCH_STORE_PORT_OFFSET,
    Plan,
    check_address,
    make_plan,
)


def parts(*addresses: str) -> str:
    """Returns JSON_GANG_PARTS for these ip:port addresses."""
    split = [address.rsplit(":", 1) for address in addresses]
    return json.dumps({f"x_part{n}": {"ip": ip, "port": int(port)} for n, (ip, port) in enumerate(split)})


TWO = parts("11.161.48.116:10000", "11.161.48.116:20000")


def plan(gpus: int = 0, /, **settings: Any) -> Plan:
    return make_plan(Config.model_validate(settings), gpus)


def error_message(gpus: int = 0, /, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(gpus, **settings)
    assert caught.value.exit_code == ExitCode.BAD_CONFIG
    return str(caught.value)


def shape(plan: Plan) -> tuple[int, list[int], int, str]:
    return plan.part, list(plan.ranks), plan.num_parts, plan.device


# Documented launches


def test_a_single_machine() -> None:
    local_plan = plan(tp_size=2, world_size=2)
    assert shape(local_plan) == (0, [0, 1], 1, "cpu")
    assert local_plan.members == (Member(0, "local_part0", "127.0.0.1", 10000),)
    assert not local_plan.is_multi_part


def test_two_machines_with_one_gpu_each() -> None:
    common: dict[str, Any] = {"tp_size": 2, "world_size": 2, "local_world_size": 1, "json_gang_parts": TWO}
    first = plan(1, **common, world_rank=0)
    second = plan(1, **common, world_rank=1, start_port=20000)
    assert (shape(first), shape(second)) == ((0, [0], 2, "cuda"), (1, [1], 2, "cuda"))
    assert first.fingerprint() == second.fingerprint()
    assert [
        second.leader_port(offset) for offset in (RENDEZVOUS_PORT_OFFSET, STEP_PORT_OFFSET, TORCH_STORE_PORT_OFFSET)
    ] == [9999, 9998, 9989]


def test_two_machines_with_two_gpus_each() -> None:
    common: dict[str, Any] = {"tp_size": 4, "world_size": 4, "local_world_size": 2, "json_gang_parts": TWO}
    first, second = plan(2, **common, world_rank=0), plan(2, **common, world_rank=2, start_port=20000)
    assert (shape(first), shape(second)) == ((0, [0, 1], 2, "cuda"), (1, [2, 3], 2, "cuda"))
    assert [list(first.ranks_of(part)) for part in range(2)] == [[0, 1], [2, 3]]
    assert first.describe_part(1) == "part1 (11.161.48.116:20000, ranks 2-3)"


def test_default_is_one_rank() -> None:
    assert shape(plan()) == (0, [0], 1, "cpu")


@pytest.mark.parametrize("settings", [{"tp_size": 2}, {"world_size": 2}, {"tp_size": 2, "world_size": 2}])
def test_tp_size_and_world_size_default_to_each_other(settings: dict[str, int]) -> None:
    assert (plan(**settings).tp_size, plan(**settings).world_size) == (2, 2)


def test_local_world_size_defaults_to_the_gpus() -> None:
    assert plan(8, tp_size=2).local_world_size == 2
    assert plan(2, tp_size=4, json_gang_parts=parts("a:10000", "b:10000")).local_world_size == 2
    assert plan(0, tp_size=4).local_world_size == 4
    assert plan(2, tp_size=4, rtp_device="cpu").local_world_size == 4


def test_world_index_instead_of_world_rank() -> None:
    common: dict[str, Any] = {"tp_size": 4, "local_world_size": 2, "json_gang_parts": TWO, "start_port": 20000}
    assert plan(**common, world_index=1) == plan(**common, world_rank=2) == plan(**common, world_index=1, world_rank=2)
    assert plan(**common, tp_rank=2) == plan(**common, world_rank=2)


def test_leader_address_instead_of_a_member_list() -> None:
    by_name = plan(tp_size=2, local_world_size=1, leader_address="gang-0.gang", world_index=1)
    assert by_name.members == (Member(0, "leader_part0", "gang-0.gang", 10000),)
    assert (by_name.part, by_name.num_parts, by_name.describe_part(1)) == (1, 2, "part1 (rank 1)")
    by_ip = plan(tp_size=2, local_world_size=1, leader_address="10.0.0.1", world_index=0)
    assert by_name.fingerprint() == by_ip.fingerprint()


def test_json_round_trip_gives_an_equal_plan() -> None:
    original = plan(tp_size=2, local_world_size=1, json_gang_parts=TWO)
    assert Plan.from_json(json.loads(json.dumps(asdict(original)))) == original


@pytest.mark.parametrize("difference", [{"worker_info_port_num": 10}, {"local_world_size": 2}, {"json_gang_parts": ""}])
def test_different_plans_have_different_fingerprints(difference: dict[str, Any]) -> None:
    common: dict[str, Any] = {"tp_size": 2, "local_world_size": 1, "json_gang_parts": TWO}
    changed = common | difference
    if changed["local_world_size"] == 2:
        changed["json_gang_parts"] = parts("11.161.48.116:10000")
    if not changed["json_gang_parts"]:
        changed["leader_address"] = "11.161.48.116"
    assert plan(**common).fingerprint() != plan(**changed).fingerprint()


# Invalid settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"world_size": 4, "tp_size": 2},
            "WORLD_SIZE=4 is not TP_SIZE=2 x DP_SIZE=1 = 2; set WORLD_SIZE=2, or TP_SIZE=4",
        ),
        ({"dp_size": 2}, "DP_SIZE=2: data-parallel groups are not supported yet; allowed: 1"),
        (
            {"tp_size": 4, "local_world_size": 3},
            "WORLD_SIZE=4 is not a multiple of LOCAL_WORLD_SIZE=3; allowed: 1, 2, 4",
        ),
        ({"tp_size": 2, "local_world_size": 4}, "WORLD_SIZE=2 is not a multiple of LOCAL_WORLD_SIZE=4; allowed: 1, 2"),
        (
            {"tp_size": 2, "world_rank": 1},
            "WORLD_RANK=1: must be the part's number x LOCAL_WORLD_SIZE=2, below WORLD_SIZE=2; allowed: 0",
        ),
        (
            {"tp_size": 4, "local_world_size": 2, "world_rank": 1, "json_gang_parts": TWO},
            "WORLD_RANK=1: must be the part's number x LOCAL_WORLD_SIZE=2, below WORLD_SIZE=4; allowed: 0, 2",
        ),
        ({"tp_size": 2, "world_rank": 2}, "WORLD_RANK=2"),
        ({"tp_size": 2, "world_rank": 0, "tp_rank": 1}, "TP_RANK=1: WORLD_RANK=0 means TP_RANK=0; leave TP_RANK unset"),
        (
            {"tp_size": 4, "local_world_size": 2, "world_rank": 2, "world_index": 0},
            "WORLD_RANK=2 (this part's first rank) and WORLD_INDEX=0 (this part's number) differ:"
            " part 0 begins with rank 0",
        ),
        (
            {"tp_size": 2, "local_world_size": 1},
            "WORLD_SIZE / LOCAL_WORLD_SIZE is 2 parts, but no member list is given; set DISTRIBUTE_CONFIG_FILE",
        ),
        (
            {"tp_size": 4, "local_world_size": 1, "json_gang_parts": TWO},
            "has 2 members, but WORLD_SIZE=4 / LOCAL_WORLD_SIZE=1 is 4; allowed: 4 members, _part0 to _part3",
        ),
        ({"tp_size": 1, "local_world_size": 1, "json_gang_parts": TWO}, "has 2 members"),
        (
            {"tp_size": 2, "json_gang_parts": TWO},
            "has 2 members, but WORLD_SIZE=2 with the default LOCAL_WORLD_SIZE=2 needs 1; set LOCAL_WORLD_SIZE=1",
        ),
        (
            {"tp_size": 4, "local_world_size": 1, "json_gang_parts": TWO, "leader_address": "a"},
            "has 2 members, but WORLD_SIZE=4",
        ),
        (
            {"tp_size": 2, "local_world_size": 1, "json_gang_parts": TWO, "world_rank": 1},
            "START_PORT=10000, but member 'x_part1' of this part (WORLD_RANK=1) has port 20000;"
            " set WORLD_RANK=0 if this is 'x_part0', or set START_PORT=20000, or change the member's port",
        ),
        ({"json_gang_parts": parts("a:12000"), "tp_size": 1}, "START_PORT=10000, but member 'x_part0'"),
        (
            {"tp_size": 2, "local_world_size": 1, "json_gang_parts": parts("a:10000", "a:10000")},
            "members 'x_part0' and 'x_part1' are both a:10000; give each its own port",
        ),
        (
            {"tp_size": 4, "local_world_size": 2, "json_gang_parts": parts("a:10000", "a:10017")},
            "'x_part0' and 'x_part1' share a and their reserved ports overlap: 9989-10017 and 10017-10034; move one",
        ),
        (
            {"tp_size": 4, "local_world_size": 2, "json_gang_parts": parts("a:10000", "a:9972")},
            "overlap: 9989-10017 and 9972-9989",
        ),
        (
            {"tp_size": 2, "local_world_size": 1, "json_gang_parts": parts("a:10000", "b:1000")},
            "member 'x_part1': port 1000 needs the ports 1000-1008; all must lie between 1024 and 65535",
        ),
        (
            {"tp_size": 2, "local_world_size": 1, "json_gang_parts": parts("a:1034", "b:2000")}
            | {"world_rank": 1, "start_port": 2000},
            "member 'x_part0': port 1034 needs the ports 1023-1042",
        ),
        ({"tp_size": 64, "start_port": 65000}, "needs the ports 64989-65575"),
    ],
)
def test_contradictory_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    assert message in error_message(**settings)


def test_more_ranks_than_gpus_are_rejected() -> None:
    message = "LOCAL_WORLD_SIZE=4: this machine has 2 visible GPUs; allowed: at most 2"
    assert error_message(2, tp_size=4, local_world_size=4) == message
    assert (
        error_message(0, tp_size=2, rtp_device="cuda")
        == "LOCAL_WORLD_SIZE=2: this machine has 0 visible GPUs; allowed: at most 0"
    )
    assert "no member list is given" in error_message(2, tp_size=4)


@pytest.mark.parametrize("ports", [("a:10000", "a:10018"), ("a:10000", "a:9971"), ("a:10000", "b:10000")])
def test_adjacent_port_ranges_are_accepted(ports: tuple[str, str]) -> None:
    assert plan(tp_size=4, local_world_size=2, json_gang_parts=parts(*ports)).num_parts == 2


# Addresses


def two_machines(world_rank: int) -> Plan:
    return plan(
        tp_size=2, local_world_size=1, json_gang_parts=parts("10.0.0.1:10000", "10.0.0.2:10000"), world_rank=world_rank
    )


def test_address_of_another_member_is_rejected() -> None:
    assert check_address(two_machines(1), {"127.0.0.1", "10.0.0.2"}) is None
    with pytest.raises(
        ConfigError, match=r"'x_part0', but 10\.0\.0\.1 is not an address of.*set WORLD_RANK=1, or correct"
    ):
        check_address(two_machines(0), {"127.0.0.1", "10.0.0.2"})


def test_wrong_own_address_beside_another_part_is_not_blamed_on_the_rank() -> None:
    """Both parts run on one machine, so the port shows that this is part 1: WORLD_RANK=0 would make it part 0 again."""
    listed = parts("10.0.0.1:10000", "10.9.0.77:10400")
    part = plan(tp_size=2, local_world_size=1, json_gang_parts=listed, world_rank=1, start_port=10400)
    with pytest.raises(ConfigError, match=r"10\.9\.0\.77 is not an address of this machine") as caught:
        check_address(part, {"127.0.0.1", "10.0.0.1"})
    assert caught.value.fix == "correct the address of 'x_part1' in the list"


def test_missing_world_rank_is_recognised_by_the_port() -> None:
    listed = parts("10.0.0.1:10000", "10.0.0.2:10400")
    with pytest.raises(ConfigError) as caught:
        plan(tp_size=2, local_world_size=1, json_gang_parts=listed, start_port=10400)
    assert caught.value.fix.startswith("set WORLD_RANK=1 if this is 'x_part1', or set START_PORT=10000")


def test_address_of_no_local_interface_is_a_warning() -> None:
    assert "this is correct only behind NAT" in str(check_address(two_machines(0), {"127.0.0.1", "172.17.0.2"}))


# Any settings give a consistent plan or ConfigError.

ADDRESSES = st.lists(
    st.builds("{}:{}".format, st.sampled_from("ab"), st.sampled_from([1000, 1034, 10000, 10009, 10020, 20000, 65530])),
    max_size=3,
)
SIZES = st.none() | st.integers(1, 8)
RANKS = st.none() | st.integers(0, 4)


@settings(max_examples=500, deadline=None)
@given(
    sizes=st.tuples(SIZES, SIZES, SIZES),
    ranks=st.tuples(RANKS, RANKS, RANKS),
    addresses=ADDRESSES,
    leader=st.sampled_from(["", "a"]),
    port=st.sampled_from([1035, 10000, 10009, 20000, 65000]),
    gpus=st.integers(0, 4),
)
def test_any_settings_give_a_consistent_plan_or_config_error(
    sizes: tuple[int | None, ...],
    ranks: tuple[int | None, ...],
    addresses: list[str],
    leader: str,
    port: int,
    gpus: int,
) -> None:
    names = ("tp_size", "world_size", "local_world_size", "world_rank", "world_index", "tp_rank")
    values = {name: value for name, value in zip(names, sizes + ranks, strict=True) if value is not None}
    members = parts(*addresses) if addresses else ""
    try:
        result = plan(gpus, **values, json_gang_parts=members, leader_address=leader, start_port=port)
    except ConfigError:
        return
    assert result.world_size == result.tp_size == result.num_parts * result.local_world_size
    assert 0 <= result.part < result.num_parts
    assert len(result.members) == result.num_parts or (leader and not addresses)
    assert set(result.ranks) <= set(range(result.world_size))
    assert result.device == "cpu" or result.local_world_size <= gpus
    used = [
        (m.ip, p)
        for m in result.members
        for p in range(m.port - 11 * (m.index == 0), m.port + 9 * result.local_world_size)
    ]
    assert len(used) == len(set(used))
    assert all(1024 <= p <= 65535 for _, p in used)


@pytest.mark.parametrize(
    "settings", [{"world_size": 4096, "local_world_size": 4095}, {"world_size": 4096, "world_rank": 4095}]
)
@pytest.mark.timeout(10)
def test_maximum_world_size_is_rejected_fast(settings: dict[str, int]) -> None:
    error_message(**settings)
