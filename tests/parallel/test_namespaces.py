"""Two parts in two network namespaces, joined by one cable: an address and an interface each, one port for both."""

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

PORT = 10000  # nobody else is in there
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    """Their names. The cable goes with them."""
    if not shutil.which("ip"):
        pytest.skip("needs ip, of iproute2")
    tag = f"rtp{os.getpid()}{secrets.token_hex(2)}"
    names = [f"{tag}a", f"{tag}b"]
    ends = ["rtp0", "rtp1"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1])
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            with suppress(OSError):
                ip("netns", "delete", name)


LISTED = {f"x_part{n}": {"name": f"x_part{n}", "ip": address, "port": PORT} for n, address in enumerate(ADDRESSES)}
STRING = ";".join(f"name:{m['name']},ip:{m['ip']},port:{m['port']}" for m in LISTED.values())
PLACES = {
    "a string on one part, JSON on the other": [
        {"GANG_CONFIG_STRING": STRING, "WORLD_RANK": "0"},
        {"JSON_GANG_PARTS": json.dumps(LISTED), "WORLD_RANK": "1"},
    ],
    "the leader's address alone": [{"LEADER_ADDRESS": ADDRESSES[0], "WORLD_INDEX": str(n)} for n in range(2)],
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_two_machines_on_a_network(
    namespaces: list[str], settings: dict[str, str], expected: dict[str, str], places: list[dict[str, str]]
) -> None:
    common = {**settings, "TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "START_PORT": str(PORT)}
    parts = [
        Part({**common, **place}, port=PORT, address=address, inside=["ip", "netns", "exec", name])
        for place, address, name in zip(places, ADDRESSES, namespaces, strict=True)
    ]
    with Gang(*parts) as gang:
        gang.wait_healthy()
        assert gang.leader.complete(BODIES["short"]) == expected["short"]
        assert [part.fetch("/liveness")[0] for part in gang.parts] == [200, 200]
        assert "collectives use interface rtp0 (10.77.0.1)" in gang.parts[0].log
        assert "collectives use interface rtp1 (10.77.0.2)" in gang.parts[1].log
        gang.parts[1].kill("supervisord")
        assert gang.parts[1].wait_end() == 70
        gang.parts[1].assert_nothing_left()


def test_the_rank_of_another_machine_is_refused(namespaces: list[str], settings: dict[str, str]) -> None:
    env = {**settings, "TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "JSON_GANG_PARTS": json.dumps(LISTED)}
    env |= {"START_PORT": str(PORT), "WORLD_RANK": "0"}
    with Part(env, port=PORT, inside=["ip", "netns", "exec", namespaces[1]]) as part:
        assert part.wait_end() == 64
        assert "this machine has 10.77.0.2, which is member 'x_part1'; set WORLD_RANK=1" in part.log
