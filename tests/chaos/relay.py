"""Hands packets from one network device to another, each after a delay that its stdin names in seconds.

python relay.py FD FD
"""

import os
import selectors
import sys
import time
from collections import deque
from contextlib import suppress

CONTROL = 0  # stdin
MAX_PACKET_BYTES = 1 << 16


def relay(ends: list[int]) -> None:
    """Runs until stdin ends."""
    selector = selectors.DefaultSelector()
    for source, target in zip(ends, reversed(ends), strict=True):
        selector.register(source, selectors.EVENT_READ, target)
    selector.register(CONTROL, selectors.EVENT_READ)
    delay, waiting = 0.0, deque[tuple[float, int, bytes]]()  # due time, target, packet
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for key, _ in selector.select(timeout):
            if key.fd == CONTROL:
                lines = os.read(CONTROL, MAX_PACKET_BYTES).split()
                if not lines:
                    return
                delay = float(lines[-1])
            else:
                waiting.append((time.monotonic() + delay, key.data, os.read(key.fd, MAX_PACKET_BYTES)))
        while waiting and waiting[0][0] <= time.monotonic():
            _, target, packet = waiting.popleft()
            with suppress(OSError):  # a full queue loses packets, as networks do
                os.write(target, packet)


if __name__ == "__main__":
    relay([int(argument) for argument in sys.argv[1:]])
