"""Builds this part's report for the other parts.

It contains facts (settings, versions and checksums by name, which should be equal on all parts) and an identity (host
name, boot id, GPU UUIDs …), which shows which parts share a machine, a namespace or a GPU.
"""

import os
import platform
import secrets
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from doctor.check import REGISTRY
from doctor.context import CheckContext
from doctor.gang.part_report import PartReport
from doctor.host import public_environ
from rtp_llm import __version__
from rtp_llm.hub.name import commit_fingerprint
from rtp_llm.parallel.plan import Plan

COMPARED_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS")
# Variables that begin with one of COMPARED_PREFIXES, but may differ between parts, so they are not compared.
PER_PART_VARIABLES = {
    *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_HOSTID"),
    *("NCCL_RAS_ADDR", "NCCL_DEBUG_FILE", "NCCL_CONF_FILE"),
}
PACKAGES = ("torch", "triton", "safetensors", "numpy")


def collect_facts(ctx: CheckContext) -> dict[str, str]:
    """Returns this part's facts: the values that the doctors compare between parts, by dotted name, such as
    "version.torch". The name begins with plan, members, config, version, env, model, gpu or doctor.
    """
    facts = {
        "version.rtp-llm": __version__,
        "version.python": platform.python_version(),
        "doctor.checks": str(len(REGISTRY)),
    }
    facts |= {f"version.{name}": _version(name) for name in PACKAGES}
    shared = {f"config.{name}": value for name, value in ctx.config.shared().items()}
    if ctx.plan:
        shared |= ctx.plan.fingerprint()
    if ctx.checkpoint and ctx.spec:
        shared |= ctx.spec.fingerprint(ctx.checkpoint.digest) | commit_fingerprint(ctx.checkpoint.path)
    facts |= {name: str(value) for name, value in shared.items()}
    variables = public_environ(ctx.host.environ, COMPARED_PREFIXES)
    variables |= {name: s.value for name, s in ctx.nccl.settings.items() if s.source != "environment"}
    facts |= {f"env.{name}": value for name, value in variables.items() if name not in PER_PART_VARIABLES}
    if ctx.on_gpu:
        facts |= {"gpu.driver": ctx.gpus.driver, "gpu.nccl": ".".join(map(str, ctx.nccl.version))}
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def collect_identity(ctx: CheckContext) -> dict[str, Any]:
    """Returns values that show which parts share a machine, an IPC namespace, a /dev/shm or a GPU."""
    host = ctx.host
    return {
        "hostname": host.hostname,
        "boot_id": (host.read("/proc/sys/kernel/random/boot_id") or "").strip(),
        "nccl_hostid": ctx.nccl.value("NCCL_HOSTID"),
        "shm_device": str(os.stat(host.path("/dev/shm")).st_dev) if host.exists("/dev/shm") else "",
        "ipc": _ipc_namespace(ctx),
        "gpus": [
            {"uuid": gpu.uuid, "name": gpu.name, "total": gpu.memory_total, "capability": gpu.capability}
            for gpu in (ctx.gpus.visible[: ctx.local_ranks] if ctx.on_gpu else [])
        ],
    }


def _ipc_namespace(ctx: CheckContext) -> str:
    try:
        return str(ctx.host.path("/proc/self/ns/ipc").readlink())
    except OSError:
        return ""


def _local_address(ctx: CheckContext, plan: Plan) -> str:
    """Returns the address at which other parts reach this part: the source address of packets to another part.

    If only LEADER_ADDRESS is set, part 0 knows no other part. Then the result is the leader's address if this machine
    has it, or else the first address of this machine that is not loopback.
    """
    peer = next((m for m in plan.members if m.index != plan.part), None)
    if peer:
        return ctx.host.source_address(ctx.host.resolve(peer.ip)[0])
    leader_addresses = ctx.host.resolve(plan.leader.ip)
    external = [a for i in ctx.host.interfaces for a in i.addresses if not a.startswith("127.")]
    return next((a for a in [*leader_addresses, *external] if a in ctx.host.addresses), "127.0.0.1")


def local_part_report(ctx: CheckContext, plan: Plan, problems: dict[str, str], listening: bool) -> PartReport:
    """Returns the report of this part (container) for the other parts. It contains no measurements of links yet.

    `problems`: text of the errors that this part's own checks found, by check id. `listening`: whether the doctor
    listens on the ports that the server will use, so that other parts can test them. Raises OSError if the address of
    another part does not resolve or there is no route to it.
    """
    member = plan.member(plan.part)
    address = _local_address(ctx, plan)
    interface = ctx.host.interface_of(address)
    port_range = (ctx.host.read("/proc/sys/net/ipv4/ip_local_port_range") or "32768 60999").split()
    return PartReport(
        part=plan.part,
        name=member.name if member else f"part{plan.part}",
        run_id=secrets.token_hex(8),
        address=address,
        start_port=plan.start_port,
        interface=interface.name if interface else "",
        mtu=interface.mtu if interface else 0,
        facts=collect_facts(ctx),
        identity=collect_identity(ctx),
        planned_ports={port.port: port.purpose for port in plan.local_ports()},
        ephemeral_ports=[],
        port_range="-".join(port_range),
        problems=problems,
        listening=listening,
    )
