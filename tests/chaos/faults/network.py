"""Two parts that do not hear each other, and parts that are gone for a while."""

import shutil
import signal
from collections.abc import Iterator

from tests.chaos.faults.registry import NotHereError, Scene, fault, send_signal
from tests.chaos.network import ADDRESSES, DEVICE, Namespace, set_address
from tests.chaos.rig import Layout

OUTAGE = (0.5, 25.0)  # seconds: shorter and longer than what makes a part count as lost


def _namespaces(scene: Scene) -> list[Namespace]:
    found = [place.sandbox.namespace for place in scene.rig.places]
    return [namespace for namespace in found if namespace]


def _drop(scene: Scene, *sources: int) -> Iterator[None]:
    """Loses everything that these parts send to the other one. Raises NotHereError."""
    if not shutil.which("iptables"):
        raise NotHereError("no iptables: install it")
    rules = [(_namespaces(scene)[part], ("OUTPUT", "-d", ADDRESSES[1 - part], "-j", "DROP")) for part in sources]
    for namespace, rule in rules:
        namespace.run("iptables", "--wait", "-I", *rule)
    yield
    for namespace, rule in rules:
        namespace.run("iptables", "--wait", "-D", *rule)


@fault("the network loses all packets between two parts, 0.5 to 25 s", layout=Layout.TWO_PARTS, seconds=OUTAGE)
def cut_both_ways(scene: Scene) -> Iterator[None]:
    yield from _drop(scene, 0, 1)


@fault("the network loses what part 0 sends, 0.5 to 25 s", layout=Layout.TWO_PARTS, seconds=OUTAGE)
def cut_from_part0(scene: Scene) -> Iterator[None]:
    yield from _drop(scene, 0)


@fault("the network loses what part 1 sends, 0.5 to 25 s", layout=Layout.TWO_PARTS, seconds=OUTAGE)
def cut_from_part1(scene: Scene) -> Iterator[None]:
    yield from _drop(scene, 1)


@fault("the link of a part goes down, 0.5 to 25 s", layout=Layout.TWO_PARTS, seconds=OUTAGE)
def link_down(scene: Scene) -> Iterator[None]:
    part = scene.rng.randrange(2)
    scene.target = f"part {part}"
    namespace = _namespaces(scene)[part]
    namespace.run("ip", "link", "set", DEVICE, "down")
    yield
    namespace.run("ip", "link", "set", DEVICE, "up")


@fault("the network delays every packet by 5 to 100 ms, 5 to 10 s", layout=Layout.RELAYED, seconds=(5.0, 10.0))
def delay(scene: Scene) -> Iterator[None]:
    relay, seconds = scene.rig.relay, scene.rng.uniform(0.005, 0.1)
    assert relay
    scene.target = f"{seconds * 1000:.0f} ms"
    relay.set_delay(seconds)
    yield
    relay.set_delay(0.0)


@fault("all processes of a part freeze, 0.5 to 25 s", layout=Layout.TWO_PARTS, seconds=OUTAGE)
def freeze_part(scene: Scene) -> Iterator[None]:
    index = scene.rng.randrange(2)
    scene.target = f"part {index}"
    pids = list(scene.rig.parts[index].processes())
    for pid in pids:
        send_signal(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        send_signal(pid, signal.SIGCONT)


@fault("the machine of part 1 is lost, and back after 1 to 15 s", layout=Layout.TWO_PARTS, seconds=(1.0, 15.0))
def lose_part1(scene: Scene) -> Iterator[None]:
    scene.rig.kill_part(1)
    yield
    scene.rig.restart_part(1)


@fault(
    "the machine of part 1 is lost, and back under another address after 1 to 15 s",
    layout=Layout.TWO_PARTS,
    seconds=(1.0, 15.0),
)
def move_part1(scene: Scene) -> Iterator[None]:
    scene.target = f"10.77.0.{scene.rng.randrange(10, 250)}"
    scene.rig.kill_part(1)
    yield
    set_address(_namespaces(scene)[1], scene.target)
    scene.rig.restart_part(1, scene.target)
