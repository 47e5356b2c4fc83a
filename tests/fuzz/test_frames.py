"""Strangers send noise to every gang and engine socket of a real gang: neither its start nor a stream notices.

`FUZZ_FACTOR=20` sends more.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests import random_model
from tests.fuzz.noise import noise
from tests.parallel.parts import Gang, Part
from tests.parallel.stream import Stream
from tests.ports import free_start_port

pytestmark = pytest.mark.slow

CONNECTIONS = 40 * int(os.environ.get("FUZZ_FACTOR", "1"))  # to each socket
SEED = 17
BODY: dict[str, Any] = {"prompt": "A large language model is", "max_tokens": 100, "ignore_eos": True, "temperature": 0}
HTTP, DOCTOR = 0, 3  # offsets to the START_PORT of a part
GANG = range(-11, 0)  # rendezvous, steps, collectives and reserved ports: offsets to that of part 0


class StrangersGang:
    """Two parts on loopback. Part 0 starts alone, so that strangers come while it waits for part 1."""

    def __init__(self, folder: Path):
        random_model.write(folder)
        ports = [free_start_port(), free_start_port()]
        members = {f"x_part{n}": {"name": f"x_part{n}", "ip": "127.0.0.1", "port": p} for n, p in enumerate(ports)}
        common = {"CHECKPOINT_PATH": str(folder), "TOKENIZER_PATH": str(folder), "JSON_GANG_PARTS": json.dumps(members)}
        common |= {"TP_SIZE": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RTP_THREADS": "1", "WARM_UP": "0"}
        common |= {"TEST_BLOCK_NUM": "64", "RESTART_LIMIT": "0"}
        self._settings = [{**common, "START_PORT": str(p), "WORLD_RANK": str(n)} for n, p in enumerate(ports)]
        self._ports = ports

    def start(self, number: int) -> Part:
        return Part(self._settings[number], port=self._ports[number])


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    """A gang that strangers disturb while part 0 waits for part 1."""
    gang = StrangersGang(tmp_path_factory.mktemp("model"))
    first = gang.start(0)
    try:
        first.wait_log("waiting for")
        for offset in (DOCTOR, *GANG):
            disturb(socket.AF_INET, ("127.0.0.1", first.port + offset))
        assert first.is_running, first.log
    except BaseException:
        first.destroy()
        raise
    with Gang(first, gang.start(1)) as running:
        yield running.wait_healthy()


def disturb(family: socket.AddressFamily, address: Any) -> None:
    """Sends noise over many connections, keeps some of them open, and reads a little of what comes."""
    open_sockets: list[socket.socket] = []
    for number, data in enumerate(islice(noise(SEED), CONNECTIONS)):
        stranger = socket.socket(family)
        stranger.settimeout(1)
        open_sockets.append(stranger)
        with suppress(OSError):
            stranger.connect(address)
            stranger.sendall(data)
            if number % 10 == 0:
                stranger.settimeout(0.05)
                stranger.recv(64)
        if len(open_sockets) > 20:
            open_sockets.pop(0).close()
    for stranger in open_sockets:
        stranger.close()


def test_strangers_do_not_disturb_a_running_gang(gang: Gang) -> None:
    epoch, expected = gang.leader.epoch, gang.leader.complete(BODY)
    targets: list[tuple[socket.AddressFamily, Any]] = []
    for part in gang.parts:
        targets += [(socket.AF_INET, ("127.0.0.1", part.port + offset)) for offset in (HTTP, DOCTOR)]
        sockets = [path for path in part.run_dir.glob("*.sock") if path.name != "supervisor.sock"]
        targets += [(socket.AF_UNIX, str(path)) for path in sockets]
    targets += [(socket.AF_INET, ("127.0.0.1", gang.leader.port + offset)) for offset in GANG]
    for family, address in targets:
        stream = Stream(gang.leader, BODY)
        disturb(family, address)
        assert stream.text() == expected, address
        assert gang.leader.epoch == epoch, f"{address}: the gang has formed again\n{gang.leader.log}"
    for part in gang.parts:
        assert part.fetch("/health") == (200, '"ok"')
        assert "Traceback" not in part.log, part.log
