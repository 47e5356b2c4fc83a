"""Requests and strangers that are the fault."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from tests.chaos.client import Request
from tests.chaos.faults.registry import Scene, fault
from tests.chaos.inside.sitecustomize import POISON, REPEATS
from tests.chaos.load import Entry
from tests.fuzz.noise import noise


@fault("a request that kills rank 0 in the step that reads its prompt", plain=True)
def poison(scene: Scene) -> Iterator[None]:
    body = {"prompt": [*range(40, 60), *[POISON] * REPEATS], "max_tokens": 8, "stream": scene.rng.random() < 0.5}
    request = Request("poison", "/v1/completions", body)
    entry = Entry(request, scene.rig.endpoint.open(request))
    scene.marked.append(entry)
    yield
    while entry.response.is_open:
        time.sleep(0.05)


@fault("strangers send noise to every port and socket of a part, 2 to 5 s", plain=True, seconds=(2.0, 5.0), in_ci=True)
def strangers(scene: Scene) -> Iterator[None]:
    place = scene.rig.places[0]
    stop, port = threading.Event(), place.port
    ports = (port, port + 3, *range(port - 11, port))
    targets: list[tuple[int, Any]] = [(socket.AF_INET, (place.address, number)) for number in ports]
    targets += [
        (socket.AF_UNIX, str(path)) for path in place.part.run_dir.glob("*.sock") if "supervisor" not in path.name
    ]
    seed = scene.rng.random()

    def disturb() -> None:
        for data in noise(seed):
            for family, address in targets:
                if stop.is_set():
                    return
                with suppress(OSError), place.sandbox.network, socket.socket(family) as stranger:
                    stranger.settimeout(0.2)
                    stranger.connect(address)
                    stranger.sendall(data)

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()
