"""Preconditions that several checks share: functions that run before a check and, if one is not met, give its result.

They are values of the argument `preconditions` of doctor.check.check. Example: RANKS_ON_GPU skips a check of GPUs if
the ranks run on CPU.
"""

from collections.abc import Callable

from doctor.check import CheckResult, Precondition, skip, unknown
from doctor.context import CheckContext


def _precondition(condition: Callable[[CheckContext], object], otherwise: CheckResult) -> Precondition:
    return lambda ctx: None if condition(ctx) else otherwise


MULTI_PART = _precondition(lambda ctx: ctx.is_multi_part, skip("there is only one part"))
NOT_RUNNING = _precondition(lambda ctx: not ctx.running, skip("this part's server is running and uses these GPUs"))
RANKS_ON_GPU = _precondition(lambda ctx: ctx.on_gpu, skip("the ranks run on CPU"))
GPUS_PRESENT = _precondition(lambda ctx: ctx.gpus.all, skip("the ranks run on CPU"))
GPUS_USED = _precondition(lambda ctx: ctx.used_gpus, skip("the ranks run on CPU"))
TWO_GPUS_USED = _precondition(lambda ctx: len(ctx.used_gpus) > 1, skip("fewer than two GPUs are used"))
RDMA_BETWEEN_PARTS = _precondition(
    lambda ctx: ctx.on_gpu and ctx.is_multi_part and ctx.host.list_dir("/sys/class/infiniband"),
    skip("there is only one part, no GPU or no RDMA card"),
)
CGROUP_READABLE = _precondition(
    lambda ctx: ctx.host.cgroup.version, unknown("/sys/fs/cgroup has no cgroup, so its limits cannot be read")
)


def rlimit_readable(name: str) -> Precondition:
    return _precondition(lambda ctx: name in ctx.host.rlimits, unknown("/proc/self/limits cannot be read"))
