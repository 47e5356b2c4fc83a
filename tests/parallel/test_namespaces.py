"""Two parts in two network namespaces with a veth pair: separate addresses and interfaces, the same port."""

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.parallel.conftest import BODIES
from tests.parallel.parts import Gang, Part

pytestmark = pytest.mark.slow

PORT = 10000  # free in a new namespace
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*args: str) -> None:
    completed = subprocess.run(["ip", *args], capture_output=True, text=True)
    if completed.returncode:
        raise OSError(f"ip {' '.join(args)}: {completed.stderr.strip()}")


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    """Creates two namespaces with a veth pair between them. Yields their names."""
    if not shutil.which("ip"):
        pytest.skip("needs ip, of iproute2")
    tag = f"rtp{os.getpid()}{secrets.token_hex(2)}"
    names = [f"{tag}a", f"{tag}b"]
    interfaces = ["rtp0", "rtp1"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "link",
                "add",
                interfaces[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                interfaces[1],
                "netns",
                names[1],
            )
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        for name, interface, address in zip(names, interfaces, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            for device in ("lo", interface):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            with suppress(OSError):
                ip("netns", "delete", name)


LISTED = {f"x_part{n}": {"name": f"x_part{n}", "ip": address, "port": PORT} for n, address in enumerate(ADDRESSES)}
STRING = ";".join(f"name:{m['name']},ip:{m['ip']},port:{m['port']}" for m in LISTED.values())
MEMBER_LISTS = {
    "a string on one part, JSON on the other": [
        {"GANG_CONFIG_STRING": STRING, "WORLD_RANK": "0"},
        {"JSON_GANG_PARTS": json.dumps(LISTED), "WORLD_RANK": "1"},
    ],
    "the leader's address alone": [{"LEADER_ADDRESS": ADDRESSES[0], "WORLD_INDEX": str(n)} for n in range(2)],
}


@pytest.mark.parametrize("settings_of_parts", MEMBER_LISTS.values(), ids=MEMBER_LISTS)
def test_two_machines_use_the_interface_of_their_address(
    namespaces: list[str], settings: dict[str, str], expected: dict[str, str], settings_of_parts: list[dict[str, str]]
) -> None:
    common = {**settings, "TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "START_PORT": str(PORT)}
    parts = [
        Part({**common, **part_settings}, port=PORT, address=address, inside=["ip", "netns", "exec", name])
        for part_settings, address, name in zip(settings_of_parts, ADDRESSES, namespaces, strict=True)
    ]
    with Gang(*parts) as gang:
        gang.wait_healthy()
        assert gang.leader.complete(BODIES["short"]) == expected["short"]
        assert [part.fetch("/liveness")[0] for part in gang.parts] == [200, 200]
        assert "collectives use network interface rtp0 with address 10.77.0.1" in gang.parts[0].log
        assert "collectives use network interface rtp1 with address 10.77.0.2" in gang.parts[1].log
        gang.parts[1].kill("supervisord")
        assert gang.parts[1].wait_end() == 70
        gang.parts[1].assert_nothing_left()


def test_world_rank_of_another_machine_is_rejected(namespaces: list[str], settings: dict[str, str]) -> None:
    env = {**settings, "TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "JSON_GANG_PARTS": json.dumps(LISTED)}
    env |= {"START_PORT": str(PORT), "WORLD_RANK": "0"}
    with Part(env, port=PORT, inside=["ip", "netns", "exec", namespaces[1]]) as part:
        assert part.wait_end() == 64
        assert "10.77.0.2 of member 'x_part1'; set WORLD_RANK=1" in part.log
