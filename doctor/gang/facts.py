"""What a part tells the others about itself: comparable facts by dotted name, and what tells machines apart."""

import json
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
from rtp_llm.parallel.plan import Plan

COMPARED_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS")
# Different on every part, and rightly so.
PER_PART_VARIABLES = {
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "NCCL_HOSTID",
    "NCCL_RAS_ADDR",
    "NCCL_DEBUG_FILE",
    "NCCL_CONF_FILE",
}
COMPARED_SETTINGS = (
    *("max_seq_len", "seq_size_per_block", "max_batch_tokens_size", "max_batch_size", "max_context_batch_size"),
    *(
        "warm_up",
        "test_block_num",
        "kv_cache_mem_mb",
        "hack_layer_num",
        "json_model_override_args",
        "concurrency_limit",
    ),
)
PACKAGES = ("torch", "triton", "safetensors", "numpy")


def facts(ctx: CheckContext) -> dict[str, str]:
    """By dotted name: plan, members, config, version, env, model, gpu, kernel."""
    found = {"version.rtp-llm": __version__, "version.python": platform.python_version(), "doctor.checks": _checks()}
    found |= {f"version.{name}": _version(name) for name in PACKAGES}
    if ctx.plan:
        plan = ctx.plan.fingerprint()
        found["members"] = json.dumps(plan.pop("members"))
        found |= {f"plan.{name}": str(value) for name, value in plan.items()}
    found |= {f"config.{name.upper()}": str(getattr(ctx.config, name)) for name in COMPARED_SETTINGS}
    found |= {
        f"env.{n}": v
        for n, v in public_environ(ctx.host.environ, COMPARED_PREFIXES).items()
        if n not in PER_PART_VARIABLES
    }
    found |= {
        f"env.{n}": s.value
        for n, s in ctx.nccl.settings.items()
        if s.source != "environment" and n not in PER_PART_VARIABLES
    }
    if ctx.checkpoint:
        found["model.checkpoint"] = ctx.checkpoint.digest
        found["model.dtype"] = ctx.spec.dtype if ctx.spec else ""
    if ctx.on_gpu:
        found |= {"gpu.driver": ctx.gpus.driver, "gpu.nccl": ".".join(map(str, ctx.nccl.version))}
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _checks() -> str:
    return str(len(REGISTRY))


def identity(ctx: CheckContext) -> dict[str, Any]:
    host = ctx.host
    return {
        "hostname": host.hostname,
        "boot_id": (host.read("/proc/sys/kernel/random/boot_id") or "").strip(),
        "nccl_hostid": ctx.nccl.value("NCCL_HOSTID"),
        "shm_device": str(os.stat(host.path("/dev/shm")).st_dev) if host.exists("/dev/shm") else "",
        "ipc": _namespace(ctx, "ipc"),
        "gpus": [
            {"uuid": gpu.uuid, "name": gpu.name, "total": gpu.memory_total, "capability": gpu.capability}
            for gpu in (ctx.gpus.visible[: ctx.local_ranks] if ctx.on_gpu else [])
        ],
    }


def _namespace(ctx: CheckContext, kind: str) -> str:
    try:
        return str(ctx.host.path(f"/proc/self/ns/{kind}").readlink())
    except OSError:
        return ""


def _address(ctx: CheckContext, plan: Plan) -> str:
    """Where the others reach this part: the address that the way to them begins with. Part 0 may know of nobody (its
    address alone was given to them): then the one it was called by, else its first that is not loopback."""
    other = next((m for m in plan.members if m.index != plan.part), None)
    if other:
        return ctx.host.source_address(ctx.host.resolve(other.ip)[0])
    called = ctx.host.resolve(plan.leader.ip)
    own = [a for i in ctx.host.interfaces for a in i.addresses if not a.startswith("127.")]
    return next((a for a in [*called, *own] if a in ctx.host.addresses), "127.0.0.1")


def local_part_report(ctx: CheckContext, plan: Plan, problems: dict[str, str], listening: bool) -> PartReport:
    """This part's row before it has tried any way. Raises OSError where no peer has a route."""
    member = next((m for m in plan.members if m.index == plan.part), None)
    address = _address(ctx, plan)
    interface = ctx.host.interface_of(address)
    low_high = (ctx.host.read("/proc/sys/net/ipv4/ip_local_port_range") or "32768 60999").split()
    return PartReport(
        part=plan.part,
        name=member.name if member else f"part{plan.part}",
        run_id=secrets.token_hex(8),
        address=address,
        start_port=plan.start_port,
        interface=interface.name if interface else "",
        mtu=interface.mtu if interface else 0,
        facts=facts(ctx),
        identity=identity(ctx),
        planned_ports={port.port: port.purpose for port in plan.local_ports()},
        ephemeral_ports=[],
        port_range="-".join(low_high),
        problems=problems,
        listening=listening,
    )
