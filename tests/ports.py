"""Free blocks of ports for servers under test."""

import os
import random
import socket
from collections.abc import Iterable

# Below the range that Linux assigns to clients (32768 and up), and above what services of a machine usually use.
PORTS = range(20000, 32000)
BELOW, PER_RANK = 11, 9  # a part reserves START_PORT-11 … START_PORT+9*ranks-1
_reserved: list[range] = []


def free_start_port(ranks: int = 1) -> int:
    """Returns a START_PORT whose reserved block is free and was not returned before in this test run.

    Each worker of pytest-xdist searches a range of its own: a port that is free now could otherwise be taken by
    another worker before the server listens on it. Raises AssertionError if no block is free.
    """
    ports = _ports_of_worker()
    for _ in range(500):
        first = random.randrange(ports.start, ports.stop - BELOW - PER_RANK * ranks)
        block = range(first, first + BELOW + PER_RANK * ranks)
        if any(block.start < reserved.stop and reserved.start < block.stop for reserved in _reserved):
            continue
        if not busy(block):
            _reserved.append(block)
            return first + BELOW
    raise AssertionError(f"no free block of ports in {ports}")


def reserved_ports(start_port: int, ranks: int) -> range:
    """Returns the ports that a part with this START_PORT reserves."""
    return range(start_port - BELOW, start_port + PER_RANK * ranks)


def busy(ports: Iterable[int]) -> list[int]:
    """Returns the ports that cannot be listened on."""
    return [port for port in ports if not _can_listen(port)]


def _ports_of_worker() -> range:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    index = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    size = len(PORTS) // workers
    return PORTS[index * size : (index + 1) * size]


def _can_listen(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
            probe.listen()
        except OSError:
            return False
    return True
