"""All faults by name, in the order of docs/reliability.md."""

from tests.chaos.faults import processes, network, machine, requests  # noqa: F401, I001  # registers them in this order
from tests.chaos.faults.registry import FAULTS, Fault, NotHereError, Scene

__all__ = ["FAULTS", "Fault", "NotHereError", "Scene"]
