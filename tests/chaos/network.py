"""Network namespaces, one per part, joined by a veth pair or by a relay process that delays every packet."""

import ctypes
import fcntl
import os
import secrets
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "rtp0"  # in each namespace
CLONE_NEWNET = 0x40000000  # setns(2)
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


class Namespace(AbstractContextManager[None]):
    """A network namespace. As a context manager, it is entered by the calling thread only."""

    def __init__(self, name: str):
        self.name, self.prefix = name, ("nsenter", f"--net=/run/netns/{name}")  # `ip netns exec` hides the cgroups
        self._outside = threading.local()

    def run(self, *command: str) -> None:
        """Runs a command inside. Raises CalledProcessError."""
        subprocess.run([*self.prefix, *command], check=True, capture_output=True)

    def __enter__(self) -> None:
        self._outside.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        inside = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            _setns(inside)
        finally:
            os.close(inside)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _setns(self._outside.fd)
        os.close(self._outside.fd)


def _setns(fd: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def namespaces(number: int) -> Iterator[list[Namespace]]:
    """Creates namespaces without a link between them."""
    names = [f"rtp{os.getpid()}{secrets.token_hex(2)}{index}" for index in range(number)]
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
            _ip("-n", name, "link", "set", "lo", "up")
        yield [Namespace(name) for name in names]


def join_by_veth(pair: list[Namespace]) -> None:
    first, second = (["netns", namespace.name] for namespace in pair)
    _ip("link", "add", DEVICE, *first, "type", "veth", "peer", DEVICE, *second)
    _set_addresses(pair)


def _set_addresses(pair: list[Namespace]) -> None:
    for namespace, address in zip(pair, ADDRESSES, strict=True):
        set_address(namespace, address)
        _ip("-n", namespace.name, "link", "set", DEVICE, "up")


def set_address(namespace: Namespace, address: str) -> None:
    """Gives a namespace this address instead of the one that it has."""
    _ip("-n", namespace.name, "addr", "flush", "dev", DEVICE)
    _ip("-n", namespace.name, "addr", "add", f"{address}/24", "dev", DEVICE)


class Relay:
    """A process between two namespaces that hands on every packet, after `delay` seconds."""

    def __init__(self, pair: list[Namespace]):
        ends = [_open_tun(namespace) for namespace in pair]
        _set_addresses(pair)
        command = [sys.executable, str(Path(__file__).with_name("relay.py")), *map(str, ends)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=ends)
        for end in ends:
            os.close(end)

    def set_delay(self, seconds: float) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{seconds}\n".encode())
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()


def _open_tun(namespace: Namespace) -> int:
    """Returns the file of a new network device: what the kernel sends over it can be read, and the reverse."""
    with namespace:
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    return end


def _ip(*args: str) -> Any:
    completed = subprocess.run(["ip", *args], capture_output=True, text=True)
    if completed.returncode:
        raise OSError(f"ip {' '.join(args)}: {completed.stderr.strip()}")
