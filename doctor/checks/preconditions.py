"""Preconditions of checks (`requires`): what a check needs to have anything to look at."""

from collections.abc import Callable

from doctor.check import CheckResult, Precondition, skip, unknown
from doctor.context import CheckContext


def _require(condition: Callable[[CheckContext], object], otherwise: CheckResult) -> Precondition:
    return lambda ctx: None if condition(ctx) else otherwise


MULTI_PART = _require(lambda ctx: ctx.is_multi_part, skip("a single part"))
NOT_RUNNING = _require(lambda ctx: not ctx.running, skip("this part is running and uses it"))
RANKS_ON_GPU = _require(lambda ctx: ctx.on_gpu, skip("the ranks run on CPU"))
GPUS_PRESENT = _require(lambda ctx: ctx.gpus.all, skip("the ranks run on CPU"))
GPUS_USED = _require(lambda ctx: ctx.used_gpus, skip("the ranks run on CPU"))
TWO_GPUS_USED = _require(lambda ctx: len(ctx.used_gpus) > 1, skip("fewer than two GPUs are used"))
RDMA_BETWEEN_PARTS = _require(
    lambda ctx: ctx.on_gpu and ctx.is_multi_part and ctx.host.list_dir("/sys/class/infiniband"),
    skip("no RDMA between parts"),
)
CGROUP_READABLE = _require(
    lambda ctx: ctx.host.cgroup.version, unknown("no cgroup below /sys/fs/cgroup: its limits cannot be read")
)


def rlimit_readable(name: str) -> Precondition:
    return _require(lambda ctx: name in ctx.host.rlimits, unknown("/proc/self/limits cannot be read"))
