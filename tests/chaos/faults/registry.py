"""What a fault is. One is a generator that injects before its `yield` and repairs after it; adding one is adding it.

@fault("what its row in docs/reliability.md says", …)
def name(scene: Scene) -> Iterator[None]: …
"""

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field

from tests.chaos.ledger import Outcome
from tests.chaos.load import Entry, Load
from tests.chaos.rig import Layout, Rig
from tests.chaos.roles import helper_pid, rank_pids, spare_pids
from tests.parallel.parts import Part


class NotHereError(Exception):
    """The fault cannot be injected on this machine, or in this version of the product."""


@dataclass
class Scene:
    """What a fault may use. It names what it hit in `target`; `marked` are requests of its own."""

    rig: Rig
    rng: random.Random
    load: Load
    target: str = ""
    marked: list[Entry] = field(default_factory=list)

    def random_rank(self) -> int:
        """Returns the pid of any rank of any part."""
        pids = {rank: pid for part in self.rig.parts for rank, pid in rank_pids(part).items()}
        assert pids, "no rank runs"
        rank = self.rng.choice(sorted(pids))
        self.target = f"rank {rank}"
        return pids[rank]

    def random_spare(self) -> int:
        pids = [pid for part in self.rig.parts for pid in spare_pids(part)]
        if not pids:
            raise NotHereError("no spare runs")
        return self.rng.choice(pids)

    def helper(self, name: str, part: Part | None = None) -> int:
        """Returns the pid of a process of part 0, or of `part`, that is no rank."""
        pid = helper_pid(part or self.rig.parts[0], name)
        if pid is None:
            raise NotHereError(f"no {name} runs")
        return pid


Inject = Callable[[Scene], AbstractContextManager[None]]
Injector = Callable[[Scene], Iterator[None]]


@dataclass(frozen=True)
class Fault:
    """One kind of fault; `inject` enters it and leaves it repaired.

    text      for docs/reliability.md
    layout    of the parts that it needs
    seconds   that it lasts before it is repaired: a range; (0, 0) if nothing is repaired
    allowed   outcomes of requests in flight besides their undisturbed text
    settings  environment variables of the parts
    idle      hits a gang without requests; the load begins right after it
    plain     needs neither root nor anything that only Linux with namespaces has
    in_ci     belongs to the short run
    """

    name: str
    text: str
    inject: Inject
    layout: Layout = Layout.ONE_PART
    seconds: tuple[float, float] = (0.0, 0.0)
    allowed: frozenset[Outcome] = frozenset()
    settings: Callable[[], dict[str, str]] = dict
    idle: bool = False
    plain: bool = False
    in_ci: bool = False


FAULTS: dict[str, Fault] = {}


def fault(
    text: str,
    *,
    name: str = "",
    layout: Layout = Layout.ONE_PART,
    seconds: tuple[float, float] = (0.0, 0.0),
    allowed: frozenset[Outcome] = frozenset(),
    settings: Callable[[], dict[str, str]] = dict,
    idle: bool = False,
    plain: bool = False,
    in_ci: bool = False,
) -> Callable[[Injector], Injector]:
    """Registers a fault under `name` or the name of the function. The other arguments are the fields of `Fault`."""

    def register(injector: Injector) -> Injector:
        found = Fault(
            name or injector.__name__,
            text,
            contextmanager(injector),
            layout,
            seconds,
            allowed,
            settings,
            idle,
            plain,
            in_ci,
        )
        assert found.name not in FAULTS, found.name
        FAULTS[found.name] = found
        return injector

    return register


def send_signal(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process that may have ended by itself."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
