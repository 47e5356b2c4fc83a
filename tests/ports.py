"""Finds free ranges of ports for servers under test."""

import os
import random
import socket
from collections import deque
from collections.abc import Iterable

# Below Linux's ephemeral ports (32768 and up), above the ports that services usually use.
TEST_PORTS = range(12000, 32000)
NUM_PORTS_BELOW, NUM_PORTS_PER_RANK = 11, 9  # a part reserves START_PORT-11 … START_PORT+9*ranks-1
# The newest ranges. A server of an older one has ended, or holds its ports; kept for ever, they would use up all ports.
_reserved: deque[range] = deque(maxlen=64)


def free_start_port(ranks: int = 1) -> int:
    """Returns a START_PORT whose reserved ports are free and were not among the last that this process returned.

    Each worker of pytest-xdist searches its own range: otherwise another worker could take a free port before the
    server listens on it. Raises AssertionError if no range is free.
    """
    ports = _ports_of_worker()
    for _ in range(500):
        first = random.randrange(ports.start, ports.stop - NUM_PORTS_BELOW - NUM_PORTS_PER_RANK * ranks)
        candidate = range(first, first + NUM_PORTS_BELOW + NUM_PORTS_PER_RANK * ranks)
        if any(candidate.start < reserved.stop and reserved.start < candidate.stop for reserved in _reserved):
            continue
        if not busy_ports(candidate):
            _reserved.append(candidate)
            return first + NUM_PORTS_BELOW
    raise AssertionError(f"no free range of ports in {ports}")


def reserved_ports(start_port: int, ranks: int) -> range:
    """Returns the ports that a part with this START_PORT reserves."""
    return range(start_port - NUM_PORTS_BELOW, start_port + NUM_PORTS_PER_RANK * ranks)


def busy_ports(ports: Iterable[int]) -> list[int]:
    """Returns the ports that cannot be listened on."""
    return [port for port in ports if not _can_listen(port)]


def _ports_of_worker() -> range:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    # Modulo: the worker that replaces a crashed one has a new number.
    index = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % workers
    size = len(TEST_PORTS) // workers
    return TEST_PORTS[index * size : (index + 1) * size]


def _can_listen(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
            probe.listen()
        except OSError:
            return False
    return True
