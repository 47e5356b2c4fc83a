"""What NCCL uses between machines: RDMA cards and plugins; and its status port."""

import ctypes.util

from doctor.check import CheckResult, Fix, Status, check, error, ok, skip, warn
from doctor.context import CheckContext
from rtp_llm.parallel.plan import PlannedPort
from rtp_llm.parallel.ports import port_conflict

CATEGORY = "network"
RAS_PORT = 28028


@check(
    "N-12",
    CATEGORY,
    "RDMA cards are connected",
    symptoms=(
        "NET/IB : Got completion from peer … with status=12",
        "Call to ibv_modify_qp failed with error Invalid argument",
    ),
)
def infiniband(ctx: CheckContext) -> CheckResult:
    """NCCL uses every RDMA port that is active. If cards are here and none is, or their device files are not in the
    container, it falls back to TCP or fails."""
    cards = ctx.host.list_dir("/sys/class/infiniband")
    if not cards or not ctx.on_gpu or not ctx.plan or not ctx.plan.is_multi_part:
        return skip("no RDMA between parts")
    if ctx.nccl.value("NCCL_IB_DISABLE") == "1":
        return ok("NCCL_IB_DISABLE=1")
    states = [ctx.host.read(f"/sys/class/infiniband/{card}/ports/1/state") or "" for card in cards]
    active = sum("ACTIVE" in state for state in states)
    files = [name for name in ctx.host.list_dir("/dev/infiniband") if name.startswith("uverbs")]
    fix = Fix(
        host="connect the cards, or NCCL_IB_DISABLE=1",
        docker="docker run --device /dev/infiniband --ulimit memlock=-1 --cap-add IPC_LOCK …, or -e NCCL_IB_DISABLE=1",
        compose='devices: ["/dev/infiniband"], or NCCL_IB_DISABLE: 1',
        kubernetes="request the RDMA device plugin's resource, or NCCL_IB_DISABLE=1",
    )
    if not active:
        return error(f"none of {len(cards)} RDMA cards has an active port", "an active port", fix)
    if not files:
        return error("/dev/infiniband is not in this container", "its device files", fix)
    gid = ctx.nccl.value("NCCL_IB_GID_INDEX")
    if gid and ctx.nccl.version >= (2, 21):
        return warn(
            f"NCCL_IB_GID_INDEX={gid}: NCCL 2.21 and later finds the right one", "unset", "unset NCCL_IB_GID_INDEX"
        )
    return ok(f"{active} active ports")


@check(
    "N-16",
    CATEGORY,
    "NCCL's plugins can be found",
    severity=Status.WARN,
    symptoms=("Failed to initialize any NET plugin",),
)
def plugin(ctx: CheckContext) -> CheckResult:
    """NCCL_NET_PLUGIN names a library of the platform. Where it cannot be found NCCL falls back to sockets, or, if
    NCCL_NET asks for it by name, does not start."""
    name = ctx.nccl.value("NCCL_NET_PLUGIN")
    if not name or name in ("none", "None"):
        return ok("no plugin is asked for")
    candidates = (name, f"nccl-net-{name}", "nccl-net") if "/" not in name else ()
    folders = ctx.host.environ.get("LD_LIBRARY_PATH", "").split(":")
    wanted = (f"lib{c.removeprefix('lib').removesuffix('.so')}.so" for c in candidates)
    found = ctx.host.exists(name) if "/" in name else any(
        ctypes.util.find_library(c) or any(ctx.host.exists(f"{f}/{w}") for f in folders if f)
        for c, w in zip(candidates, wanted, strict=True)
    )  # fmt: skip
    if found:
        return ok(f"NCCL_NET_PLUGIN={name}")
    strict = ctx.nccl.value("NCCL_NET")
    fix = "add the plugin's folder to LD_LIBRARY_PATH, or unset NCCL_NET_PLUGIN"
    if strict and strict not in ("Socket", "IB"):
        return error(f"NCCL_NET={strict} needs plugin {name}, which is not found", "the library", fix)
    return warn(f"NCCL_NET_PLUGIN={name} is not found", "the library", fix)


@check("N-17", CATEGORY, "NCCL's status port is free", severity=Status.WARN)
def ras(ctx: CheckContext) -> CheckResult:
    """NCCL 2.24 and later listens on localhost:28028 for questions about its state; the second job of a machine cannot.
    For information."""
    if not ctx.on_gpu or ctx.local_ranks < 2:
        return skip("no NCCL on this machine")
    if ctx.nccl.value("NCCL_RAS_ENABLE") == "0" or "NCCL_RAS_ADDR" in ctx.nccl.settings or ctx.running:
        return ok("configured")
    taken = port_conflict(PlannedPort(RAS_PORT, "", "127.0.0.1"))
    return ok(
        f"localhost:{RAS_PORT} {taken}: this part answers no ncclras" if taken else f"localhost:{RAS_PORT} is free"
    )
