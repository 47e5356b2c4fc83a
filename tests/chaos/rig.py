"""The parts under test: started fresh in sandboxes of their own, and watched for what they leave behind."""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.chaos.client import Endpoint
from tests.chaos.network import ADDRESSES, Relay, join_by_veth, namespaces
from tests.chaos.sandbox import Sandbox, can_isolate
from tests.parallel.parts import DEADLINE, Part
from tests.ports import busy_ports, free_start_port, reserved_ports

SETTINGS = {
    "MODEL_TYPE": "qwen_3",
    "TP_SIZE": "2",
    "WORLD_SIZE": "2",
    "RTP_THREADS": "1",  # per rank, so that a run does not take the whole machine
    "OMP_NUM_THREADS": "1",
    "TEST_BLOCK_NUM": "512",
    "RESTART_LIMIT": "1000",  # a fault must not be hidden by the end of the part
    "RTP_DOCTOR": "warn",
    "PYTHONPATH": str(Path(__file__).with_name("inside")),
}
RUN_DIR = re.compile(r"/rtp-llm-\w+")
SETTLED_SECONDS = 1.0
PORT = 10000  # of every part in a namespace of its own


class Layout(StrEnum):
    ONE_PART = "one part"
    TWO_PARTS = "two parts"
    RELAYED = "two parts with a relay between them"


@dataclass
class Place:
    """Where a part runs, and with which settings. `part` is the one that runs there now."""

    sandbox: Sandbox
    env: Mapping[str, str]
    port: int
    ranks: int
    address: str
    part: Part

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.address, self.port, self.sandbox.network)


class Rig:
    """The parts of one gang, part 0 first."""

    def __init__(self, relay: Relay | None = None):
        self.places: list[Place] = []
        self.relay = relay
        self._commands: Counter[str] = Counter()  # after the first start

    @property
    def parts(self) -> list[Part]:
        return [place.part for place in self.places]

    @property
    def endpoint(self) -> Endpoint:
        return self.places[0].endpoint

    def start_part(self, sandbox: Sandbox, env: Mapping[str, str], port: int, ranks: int, address: str) -> None:
        part = Part(env, port=port, ranks=ranks, address=address, inside=sandbox.prefix, temporary=sandbox.folder)
        self.places.append(Place(sandbox, env, port, ranks, address, part))

    def kill_part(self, index: int) -> None:
        """Kills all processes of a part at once, as the loss of its machine does."""
        self.places[index].part.kill_all()

    def restart_part(self, index: int, address: str = "") -> None:
        """Starts a part again that was killed, on an empty disk, and under another address if one is given."""
        place = self.places[index]
        if address:
            members = json.loads(place.env["JSON_GANG_PARTS"])
            members[f"x_part{index}"]["ip"] = place.address = address
            place.env = {**place.env, "JSON_GANG_PARTS": json.dumps(members)}
        place.part.destroy()
        for left in place.sandbox.folder.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        place.part = Part(
            place.env,
            port=place.port,
            ranks=place.ranks,
            address=place.address,
            inside=place.sandbox.prefix,
            temporary=place.sandbox.folder,
        )

    def wait_healthy(self) -> None:
        for place in self.places:
            place.part.until(lambda place=place: place.endpoint.fetch("/health")[0] == 200, "healthy")  # type: ignore[misc]
            place.sandbox.attach(place.part.pid("start_server"))

    def wait_steady(self) -> str:
        """Waits until all processes run that ran after the first start, spares included. Returns what is missing."""
        if not self._commands:
            self._commands = self._settled_commands()
        deadline = time.monotonic() + DEADLINE
        while missing := self._commands - self._running_commands():
            if time.monotonic() > deadline:
                return f"never came back: {', '.join(missing.elements())}"
            time.sleep(0.1)
        return ""

    def _settled_commands(self) -> Counter[str]:
        """Returns the command lines once they have not changed for a while: the doctor's checks end soon."""
        commands, since = self._running_commands(), time.monotonic()
        deadline = since + DEADLINE
        while time.monotonic() < min(since + SETTLED_SECONDS, deadline):
            time.sleep(0.1)
            if (now := self._running_commands()) != commands:
                commands, since = now, time.monotonic()
        return commands

    def _running_commands(self) -> Counter[str]:
        """Returns the command lines of all parts' processes, without the name of the run directory, which is random."""
        return Counter(RUN_DIR.sub("", c) for part in self.parts for c in part.processes().values())

    def num_restarts(self) -> int:
        """Returns how many processes the guards have restarted."""
        paths = [part.run_dir / "guard.json" for part in self.parts if part.is_running]
        return sum(sum(json.loads(path.read_text())["restarts"].values()) for path in paths if path.exists())

    def is_running(self) -> bool:
        """True while no part has ended."""
        return all(part.is_running for part in self.parts)

    def log(self) -> str:
        return "\n".join(f"== part on port {part.port}\n{part.log}" for part in self.parts)

    def idle_problem(self, seconds: float = 10.0) -> str:
        """Returns what still holds KV blocks or counts as a request after `seconds` without load; empty if nothing."""
        deadline = time.monotonic() + seconds
        while True:
            status, text = self.endpoint.fetch("/worker_status")
            if status == 200:
                load = json.loads(text)
                free, total = load["available_kv_cache"], load["total_kv_cache"]
                if free == total and not load["running_query_len"] and not load["waiting_query_len"]:
                    return ""
            if time.monotonic() > deadline:
                return f"KV blocks or requests that nobody holds: /worker_status {status} {text[:300]}"
            time.sleep(0.1)

    def stop(self) -> list[str]:
        """Stops all parts. Returns what they left behind, and exit codes other than 0."""
        for part in self.parts:
            part.stop()
        return [problem for place in self.places for problem in _end(place)]


def _end(place: Place) -> list[str]:
    """Waits for the end of a part that was told to stop. Returns what is wrong with it."""
    name, problems = f"part on port {place.port} of {place.address}", []
    try:
        if code := place.part.wait_end():
            problems.append(f"{name} ended with {code} instead of 0")
        place.part.assert_no_process_left()
    except AssertionError as error:
        problems.append(f"{name}: {str(error).splitlines()[0]}")
    with place.sandbox.network:
        if ports := busy_ports(reserved_ports(place.port, place.ranks)):
            problems.append(f"{name} left its ports {ports} busy")
    if files := place.sandbox.shm_files():
        problems.append(f"{name} left {files} in /dev/shm")
    if left := [path.name for path in place.sandbox.folder.iterdir()]:
        problems.append(f"{name} left {left} in its temporary folder")
    return problems


@contextmanager
def running_rig(layout: Layout, checkpoint: Path, settings: Mapping[str, str]) -> Iterator[Rig]:
    """Starts the parts of a gang. At the end, everything that still runs is killed."""
    env = {**SETTINGS, "CHECKPOINT_PATH": str(checkpoint), "TOKENIZER_PATH": str(checkpoint), **settings}
    with ExitStack() as stack:
        if layout == Layout.ONE_PART:
            namespace = stack.enter_context(namespaces(1))[0] if can_isolate() else None
            rig, port, sandbox = Rig(), PORT if namespace else free_start_port(2), Sandbox(namespace)
            stack.callback(_destroy, rig, [sandbox])
            rig.start_part(sandbox, {**env, "START_PORT": str(port)}, port, 2, "127.0.0.1")
        else:
            pair = stack.enter_context(namespaces(2))
            relay = Relay(pair) if layout == Layout.RELAYED else None
            if relay:
                stack.callback(relay.close)
            else:
                join_by_veth(pair)
            rig, sandboxes = Rig(relay), [Sandbox(namespace) for namespace in pair]
            stack.callback(_destroy, rig, sandboxes)
            members = {f"x_part{n}": {"name": f"x_part{n}", "ip": ip, "port": PORT} for n, ip in enumerate(ADDRESSES)}
            env |= {"LOCAL_WORLD_SIZE": "1", "START_PORT": str(PORT), "JSON_GANG_PARTS": json.dumps(members)}
            for rank, (sandbox, address) in enumerate(zip(sandboxes, ADDRESSES, strict=True)):
                rig.start_part(sandbox, {**env, "WORLD_RANK": str(rank)}, PORT, 1, address)
        yield rig


def _destroy(rig: Rig, sandboxes: list[Sandbox]) -> None:
    for part in rig.parts:
        with suppress(ProcessLookupError):
            part.destroy()
    for sandbox in sandboxes:
        sandbox.close()
