"""Decorators that register a check in a category of the report."""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

from doctor.check import CheckFunction, CheckResult, Precondition, Reading, check, skip
from doctor.checks.preconditions import GPUS_USED
from doctor.context import CheckContext
from doctor.gang.view import GangView

configuration_check = partial(check, category="configuration")
model_check = partial(check, category="model")
shm_check = partial(check, category="shared memory")
limits_check = partial(check, category="limits")
gpu_check = partial(check, category="gpu")
interconnect_check = partial(check, category="interconnect", needs=("G-09",))
network_check = partial(check, category="network")
collective_check = partial(check, category="collective", tier=3)

NOT_RUN = "needs `rtp-llm-doctor gang` on every part"
GangCheckFunction = Callable[[CheckContext, GangView], CheckResult | Reading]


def used_gpu_check(
    id: str, title: str, *, preconditions: tuple[Precondition, ...] = (), **options: Any
) -> Callable[[CheckFunction], CheckFunction]:
    """Returns a decorator that registers a check of the GPUs that this part's ranks use. The check is skipped if the
    ranks run on CPU. `options`: keyword arguments of `check`.
    """
    return check(id, title, category="gpu", needs=("G-09",), preconditions=(GPUS_USED, *preconditions), **options)


def gang_check(id: str, title: str, **options: Any) -> Callable[[GangCheckFunction], GangCheckFunction]:
    """Returns a decorator that registers a check of tier 2: a check that compares the parts, which only
    `rtp-llm-doctor gang` runs. The check gets the reports of all parts as its second argument.

    The check is skipped if the parts have not exchanged reports.

    `options`: keyword arguments of `check`. By default the check needs C-09 and C-10: all parts respond, with
    compatible doctors.
    """

    settings: dict[str, Any] = {"category": "gang", "tier": 2, "needs": ("C-09", "C-10")} | options

    def register(function: GangCheckFunction) -> GangCheckFunction:
        @wraps(function)
        def run(ctx: CheckContext) -> CheckResult | Reading:
            return function(ctx, ctx.gang) if ctx.gang else skip(NOT_RUN)

        check(id, title, **settings)(run)
        return function

    return register


def format_differences(differences: Mapping[str, Mapping[str, str]]) -> str:
    """Returns values that differ between parts as text: "key: part0=a part1=b; …".

    `differences`: {key: {part label, such as "part0": value}}.
    """
    return "; ".join(f"{k}: " + " ".join(f"{p}={v}" for p, v in values.items()) for k, values in differences.items())
