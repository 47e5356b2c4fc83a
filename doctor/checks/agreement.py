"""What must be the same on all parts: software, checkpoint, settings and clocks."""

from collections.abc import Mapping

from doctor.check import CheckResult, Fix, Status, check, error, ok, skip, warn
from doctor.context import CheckContext

CATEGORY = "gang"
NOT_RUN = "`rtp-llm-doctor gang` on every part"
CLOCK_SECONDS = 1.0
# Which transport NCCL takes: where these differ, ranks wait for each other on different ways.
TRANSPORT = (
    *("NCCL_IB_DISABLE", "NCCL_NET", "NCCL_NET_PLUGIN", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_ALGO"),
    *("NCCL_PROTO", "NCCL_SOCKET_FAMILY", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE", "NCCL_MNNVL_ENABLE"),
)
SAME_ENV_FIX = Fix(
    host="give all parts the same environment; only WORLD_RANK, START_PORT and CUDA_VISIBLE_DEVICES may differ",
    docker="docker run --env-file gang.env …, the same file on every machine",
    compose="env_file: gang.env, the same for every part",
    kubernetes="one ConfigMap for all pods, with envFrom",
)


def _table(differences: Mapping[str, Mapping[str, str]]) -> str:
    return "; ".join(
        f"{key}: " + " ".join(f"{p}={v}" for p, v in values.items()) for key, values in differences.items()
    )


@check(
    "C-03",
    CATEGORY,
    "all parts have the same NCCL",
    tier=2,
    symptoms=("Mismatched NCCL version detected : rank … version … rank … version …",),
    needs=("C-09", "C-10"),
)
def nccl_version(ctx: CheckContext) -> CheckResult:
    """NCCL refuses to connect ranks of different versions."""
    return _compare_facts(ctx, ("gpu.nccl",), "one NCCL", Fix("the same image on every part, by digest and not by tag"))


@check("C-04", CATEGORY, "all parts run the same software", tier=2, needs=("C-09", "C-10"))
def software(ctx: CheckContext) -> CheckResult:
    """Another torch computes other last bits, and another version of this server may speak another protocol. A driver
    that differs is a warning."""
    fix = Fix("the same image on every part, by digest and not by tag")
    found = _compare_facts(ctx, ("version.",), "one version of everything", fix)
    return found if found.status != Status.OK else _compare_facts(ctx, ("gpu.driver",), "one driver", fix, judge=warn)


@check("C-05", CATEGORY, "all parts hold the same checkpoint", tier=2, needs=("C-09", "C-10", "M-04", "M-05", "M-06"))
def checkpoints(ctx: CheckContext) -> CheckResult:
    """Ranks with slices of different checkpoints compute garbage, or fail on a shape. config.json and the headers of
    all files are compared."""
    fix = Fix(
        host="rsync --checksum -a the checkpoint from one part to the others, or share it",
        kubernetes="one ReadOnlyMany volume for all pods",
    )
    return _compare_facts(ctx, ("model.",), "one checkpoint", fix)


@check(
    "C-06",
    CATEGORY,
    "NCCL is told the same on all parts",
    tier=2,
    symptoms=("Detected mixed local Net device counts across ranks",),
    needs=("C-09", "C-10"),
)
def environment_matches(ctx: CheckContext) -> CheckResult:
    """Where one part's NCCL may use InfiniBand and another's may not, they wait for each other for ever. Environment
    and nccl.conf are compared; names that are rightly local (interfaces) are left out."""
    view = ctx.gang
    if view is None:
        return skip(NOT_RUN)
    differing = view.differences("env.")
    if not differing:
        return ok("the same on all parts")
    judge = error if any(key.removeprefix("env.").startswith(TRANSPORT) for key in differing) else warn
    return judge(_table(differing), "the same on every part", SAME_ENV_FIX)


@check(
    "C-07",
    CATEGORY,
    "settings that shape the steps are the same",
    tier=2,
    symptoms=("MISMATCH … different collective operation counts",),
    needs=("C-09", "C-10"),
)
def settings(ctx: CheckContext) -> CheckResult:
    """MAX_SEQ_LEN, block sizes and batch limits decide what is computed in which order: ranks that disagree hang in
    the first collective in which they differ."""
    return _compare_facts(ctx, ("config.",), "the same on every part", SAME_ENV_FIX)


@check("C-08", CATEGORY, "the clocks agree", tier=2, severity=Status.WARN, needs=("C-09", "C-10", "N-01"))
def clocks_in_sync(ctx: CheckContext) -> CheckResult:
    """Nothing here depends on it, but logs and dashboards of several machines can only be read together when their
    clocks agree."""
    view = ctx.gang
    if view is None:
        return skip(NOT_RUN)
    offsets = [(abs(link.clock_offset), link.clock_error, a, b, link) for a, b, link in view.links() if link.rtt]
    if not offsets:
        return skip("no clock was compared")
    worst, margin, one, other, link = max(offsets, key=lambda entry: entry[0])
    text = f"part{other.part} is {link.clock_offset:+.3f} s (+-{margin:.3f}) from part{one.part}"
    if worst - margin > CLOCK_SECONDS:
        return warn(text, f"within {CLOCK_SECONDS:g} s", "run chrony or systemd-timesyncd on the machines")
    return ok(text)


def _compare_facts(
    ctx: CheckContext, prefixes: tuple[str, ...], expected: str, fix: Fix, judge: object = error
) -> CheckResult:
    view = ctx.gang
    if view is None:
        return skip(NOT_RUN)
    differing = {key: values for prefix in prefixes for key, values in view.differences(prefix).items()}
    if not differing:
        return ok("the same on all parts")
    return (warn if judge is warn else error)(_table(differing), expected, fix)
