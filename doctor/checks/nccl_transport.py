"""Checks of the RDMA cards and network plugins that NCCL uses between machines, and of the port of its RAS service."""

import ctypes.util

from doctor import fixes
from doctor.check import CheckResult, Status, error, ok, skip, symptoms, warn
from doctor.checks.categories import network_check
from doctor.checks.preconditions import RDMA_BETWEEN_PARTS
from doctor.context import CheckContext
from rtp_llm.parallel.plan import PlannedPort
from rtp_llm.parallel.ports import port_conflict

RAS_PORT = 28028


@network_check("N-12", "the RDMA cards have an active port", preconditions=(RDMA_BETWEEN_PARTS,))
@symptoms(
    "NET/IB : Got completion from peer … with status=12", "Call to ibv_modify_qp failed with error Invalid argument"
)
def rdma_is_usable(ctx: CheckContext) -> CheckResult:
    """NCCL uses every active RDMA port. If no port is active, or the device files are not in the container, it falls
    back to TCP or fails."""
    if ctx.nccl.value("NCCL_IB_DISABLE") == "1":
        return ok("NCCL does not use the RDMA cards: NCCL_IB_DISABLE=1")
    cards = ctx.host.list_dir("/sys/class/infiniband")
    states = [ctx.host.read(f"/sys/class/infiniband/{card}/ports/1/state") or "" for card in cards]
    num_active = sum("ACTIVE" in state for state in states)
    if not num_active:
        return error(f"none of {len(cards)} RDMA cards has an active port", "an active port", fixes.RDMA_CARDS)
    if not any(name.startswith("uverbs") for name in ctx.host.list_dir("/dev/infiniband")):
        expected = "the device files of the RDMA cards"
        return error("/dev/infiniband is not in this container", expected, fixes.RDMA_CARDS)
    gid_index = ctx.nccl.value("NCCL_IB_GID_INDEX")
    if gid_index and ctx.nccl.version >= (2, 21):
        actual = f"NCCL_IB_GID_INDEX={gid_index} is set, but NCCL 2.21 and later finds the right index itself"
        return warn(actual, "NCCL_IB_GID_INDEX unset", "unset NCCL_IB_GID_INDEX")
    return ok(f"{num_active} active RDMA ports")


@network_check("N-16", "NCCL's network plugin is found", severity=Status.WARN)
@symptoms("Failed to initialize any NET plugin")
def network_plugin_is_found(ctx: CheckContext) -> CheckResult:
    """NCCL_NET_PLUGIN names a plugin library, which the platform provides (for AWS EFA, for example). If it is not
    found, NCCL falls back to sockets, or does not start if NCCL_NET requires the plugin."""
    name = ctx.nccl.value("NCCL_NET_PLUGIN")
    if not name or name in ("none", "None"):
        return ok("NCCL_NET_PLUGIN is not set")
    if _is_library_found(ctx, name):
        return ok(f"the plugin NCCL_NET_PLUGIN={name} is found")
    fix = "add the plugin's folder to LD_LIBRARY_PATH, or unset NCCL_NET_PLUGIN"
    network = ctx.nccl.value("NCCL_NET")
    if network and network not in ("Socket", "IB"):
        actual = f"NCCL_NET={network} needs plugin {name}, which is not found"
        return error(actual, "a plugin library that is found", fix)
    return warn(f"NCCL_NET_PLUGIN={name} is not found", "a plugin library that is found", fix)


def _is_library_found(ctx: CheckContext, name: str) -> bool:
    """Returns whether NCCL would find a plugin: at its path, or under one of three names in the folders of the dynamic
    loader."""
    if "/" in name:
        return ctx.host.exists(name)
    folders = [folder for folder in ctx.host.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    for candidate in (name, f"nccl-net-{name}", "nccl-net"):
        file = f"lib{candidate.removeprefix('lib').removesuffix('.so')}.so"
        if ctypes.util.find_library(candidate) or any(ctx.host.exists(f"{folder}/{file}") for folder in folders):
            return True
    return False


@network_check("N-17", "NCCL's RAS port is free", severity=Status.WARN)
def ras_port_is_free(ctx: CheckContext) -> CheckResult:
    """NCCL 2.24 and later answers status queries (ncclras) on localhost:28028, which only one job on a machine can use.
    For information only: the check never fails."""
    if not ctx.on_gpu or ctx.local_ranks < 2:
        return skip("NCCL is not used on this machine")
    if ctx.nccl.value("NCCL_RAS_ENABLE") == "0" or "NCCL_RAS_ADDR" in ctx.nccl.settings or ctx.running:
        return ok("NCCL_RAS_ENABLE or NCCL_RAS_ADDR is set, or this part's server is running")
    conflict = port_conflict(PlannedPort(RAS_PORT, "", "127.0.0.1"))
    return ok(f"localhost:{RAS_PORT} " + (f"{conflict}: ncclras cannot query this part" if conflict else "is free"))
