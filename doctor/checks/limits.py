"""Limits of the process and its container: locked memory, files, threads, memory, cores and stack."""

import resource
import threading

from doctor.check import CheckResult, Fix, Status, check, error, ok, unknown, warn
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm.machine.cgroup import UNLIMITED
from rtp_llm.model.footprint import weight_bytes

CATEGORY = "limits"
INFINITY = resource.RLIM_INFINITY
NO_RLIMITS = "/proc/self/limits cannot be read"
NO_CGROUP = "no cgroup can be seen below /sys/fs/cgroup: whether there is a limit cannot be told"
RECOMMENDED_OPEN_FILES = 65536
MIN_OPEN_FILES = 1024
# Threads of a rank beside those that compute: (needed, comfortable). Measured on CPU: 5; CUDA and NCCL add some 30.
THREADS_PER_RANK = {"cpu": (8, 24), "cuda": (40, 80)}
PROCESSES_BESIDE = 16
CORES_PER_RANK = 2
RANK_BYTES = 250 << 20  # of a rank without weights and cache: Python and torch, measured on CPU
SERVICE_BYTES = 150 << 20  # of start_server, supervisord, guard and API together


def rdma_wanted(ctx: CheckContext) -> bool:
    return bool(ctx.host.list_dir("/sys/class/infiniband")) and ctx.nccl.value("NCCL_IB_DISABLE") != "1" and ctx.on_gpu


@check(
    "L-01",
    CATEGORY,
    "memory may be locked for RDMA",
    symptoms=(
        "NCCL WARN Call to ibv_reg_mr failed",
        "ibv_reg_mr_iova2 failed with error Cannot allocate memory",
        "ibv_create_cq() failed: Cannot allocate memory",
    ),
)
def memlock(ctx: CheckContext) -> CheckResult:
    """RDMA registers memory with the network card, which locks it; containers are allowed 8 MiB of that or less."""
    if not rdma_wanted(ctx):
        return ok("no RDMA here")
    if "memlock" not in ctx.host.rlimits:
        return unknown(NO_RLIMITS)
    soft, _ = ctx.host.rlimits["memlock"]
    text = "unlimited" if soft == INFINITY else format_bytes(soft)
    if soft == INFINITY or ctx.host.has_capability("IPC_LOCK"):
        return ok(f"memlock {text}")
    fix = Fix(
        host="ulimit -l unlimited",
        docker="docker run --ulimit memlock=-1 --cap-add IPC_LOCK …",
        compose="ulimits: {memlock: -1} and cap_add: [IPC_LOCK]",
        kubernetes="securityContext: {capabilities: {add: [IPC_LOCK]}}, and memlock in the container runtime's unit",
    )
    return error(f"memlock is {text}, and RDMA cards are here", "unlimited", fix)


@check(
    "L-02",
    CATEGORY,
    "enough files may be open",
    severity=Status.ERROR,
    symptoms=("OSError: [Errno 24] Too many open files", "VFS: file-max limit … reached"),
)
def nofile(ctx: CheckContext) -> CheckResult:
    """Every HTTP connection, rank and NCCL channel is a file. A large gang needs tens of thousands."""
    if "nofile" not in ctx.host.rlimits:
        return unknown(NO_RLIMITS)
    soft, hard = ctx.host.rlimits["nofile"]
    reach = soft if soft == INFINITY else max(soft, hard if hard != INFINITY else 1 << 20)
    fix = Fix(
        host="ulimit -n 1048576",
        docker="docker run --ulimit nofile=1048576:1048576 …",
        compose="ulimits: {nofile: {soft: 1048576, hard: 1048576}}",
        kubernetes="raise LimitNOFILE in the container runtime's unit",
    )
    wanted = MIN_OPEN_FILES if not ctx.on_gpu else RECOMMENDED_OPEN_FILES
    if reach != INFINITY and reach < MIN_OPEN_FILES:
        return error(f"{reach} open files at most", f"{wanted}", fix)
    if reach != INFINITY and reach < wanted:
        return warn(f"{reach} open files at most", f"{wanted}", fix)
    return ok(f"{'unlimited' if soft == INFINITY else soft} open files")


@check(
    "L-03",
    CATEGORY,
    "enough processes and threads may be started",
    symptoms=(
        "RuntimeError: can't start new thread",
        "pthread_create failed for thread … of …: Resource temporarily unavailable",
        "std::system_error what(): Resource temporarily unavailable",
    ),
)
def pids(ctx: CheckContext) -> CheckResult:
    """The pids limit of the cgroup counts threads. Each rank starts some for computing, loading and communicating;
    Kubernetes' podPidsLimit and Docker's --pids-limit are often a few hundred."""
    per_rank = THREADS_PER_RANK["cuda" if ctx.on_gpu else "cpu"]
    least, good = (ctx.local_ranks * (threads + ctx.host.cores) + PROCESSES_BESIDE for threads in per_rank)
    if not ctx.host.cgroup.version:
        return unknown(NO_CGROUP)
    if "nproc" not in ctx.host.rlimits:
        return unknown(NO_RLIMITS)
    room = ctx.host.cgroup.available_pids
    soft, _ = ctx.host.rlimits["nproc"]
    by = "the cgroup"
    if soft != INFINITY and soft < room and ctx.host.uid != 0:
        room, by = soft, "ulimit -u"
    if room >= good:
        return ok("no limit" if room >= UNLIMITED else f"room for {room} threads, some {good} are needed")
    fix = Fix(
        host=f"systemd-run -p TasksMax={4 * good} …, or ulimit -u {4 * good}",
        docker="docker run --pids-limit=-1 …",
        compose="pids_limit: -1",
        kubernetes="raise podPidsLimit of the kubelet",
    )
    judge = error if room < least else warn
    return judge(f"{by} leaves room for {room} threads", f"some {good} for {ctx.local_ranks} ranks", fix)


@check(
    "L-04",
    CATEGORY,
    "threads may be started at all",
    symptoms=("pthread_create failed for thread … of …: Operation not permitted",),
)
def seccomp(ctx: CheckContext) -> CheckResult:
    """Docker before 20.10.10 denies the system call (clone3) by which a newer C library starts threads."""
    try:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
    except RuntimeError:
        filtered = ctx.host.status.get("Seccomp") == "2"
        return error(
            "a thread cannot be started" + (", under a seccomp filter" if filtered else ""),
            "threads",
            Fix(
                host="lift the limit that forbids threads",
                docker="upgrade Docker to 20.10.10 or newer; as proof: --security-opt seccomp=unconfined",
                kubernetes="upgrade the container runtime and libseccomp",
            ),
        )
    return ok("threads start")


@check(
    "L-05",
    CATEGORY,
    "the memory limit holds the weights, and nothing was killed for memory",
    symptoms=(
        "exit code 137",
        "Killed process …",
        "A process in the process pool was terminated abruptly",
    ),
)
def host_memory_suffices(ctx: CheckContext) -> CheckResult:
    """On CPU the weights lie in main memory; on GPUs they pass through it. The cgroup counts what this container was
    killed for: a count above zero says that an earlier run of this container, or a neighbour in it, was."""
    cgroup = ctx.host.cgroup
    if not cgroup.version:
        return unknown(NO_CGROUP)
    wanted = ctx.local_ranks * RANK_BYTES + SERVICE_BYTES
    fits = ctx.spec and ctx.plan and ctx.plan.tp_size in ctx.spec.valid_tp_sizes()
    if ctx.spec and ctx.plan and fits and not ctx.on_gpu:
        wanted += ctx.local_ranks * weight_bytes(ctx.spec, ctx.plan.tp_size)
    limit = cgroup.memory_max
    whole = -(-2 * wanted // (1 << 30))
    fix = Fix(
        host=f"raise the limit to {whole}G",
        docker=f"docker run --memory={whole}g …",
        compose=f"mem_limit: {whole}gb",
        kubernetes=f"resources.limits.memory: {whole}Gi",
    )
    if limit is not None and limit < wanted:
        return error(f"the memory limit is {format_bytes(limit)}", f"at least {format_bytes(wanted)}", fix)
    if cgroup.oom_kills:
        return warn(
            f"{cgroup.oom_kills} processes of this container were killed for memory",
            "none",
            fix,
            oom_kills=cgroup.oom_kills,
        )
    return ok("no memory limit" if limit is None or limit >= UNLIMITED else f"the limit is {format_bytes(limit)}")


@check("L-06", CATEGORY, "there are cores enough for the ranks", severity=Status.WARN)
def cores_suffice(ctx: CheckContext) -> CheckResult:
    """Each rank keeps one core busy with starting work, and the API another. A quota below that shows as stalls of
    100 ms whenever it is spent."""
    cgroup, ranks = ctx.host.cgroup, ctx.local_ranks
    if not cgroup.version:
        return unknown(NO_CGROUP)
    usable = min(ctx.host.cores, cgroup.cpus or ctx.host.cores)
    wanted = ranks * CORES_PER_RANK if ctx.on_gpu else ranks
    spent = f"; the quota was spent {cgroup.throttled} times" if cgroup.throttled else ""
    if usable < wanted:
        return warn(
            f"{usable:g} cores for {ranks} ranks{spent}",
            f"{wanted}",
            Fix(
                host=f"taskset, or cpuset, with {wanted} cores",
                docker=f"docker run --cpus={wanted} …",
                compose=f"cpus: {wanted}",
                kubernetes=f"resources: {{requests: {{cpu: {wanted}}}}} and no CPU limit",
            ),
        )
    return ok(f"{usable:g} cores for {ranks} ranks{spent}")


@check("L-07", CATEGORY, "the stack has a limit", severity=Status.WARN)
def stack(ctx: CheckContext) -> CheckResult:
    """With `ulimit -s unlimited` glibc gives threads a stack of only 2 MiB; NCCL before 2.28 overflows that in its
    search for a topology."""
    if "stack" not in ctx.host.rlimits:
        return unknown(NO_RLIMITS)
    soft, _ = ctx.host.rlimits["stack"]
    version = ctx.nccl.version
    if soft != INFINITY or not version or version >= (2, 28) or not ctx.on_gpu:
        return ok("stack " + ("unlimited" if soft == INFINITY else format_bytes(soft)))
    fix = Fix("ulimit -s 8192", docker="docker run --ulimit stack=8388608 …", compose="ulimits: {stack: 8388608}")
    return warn(f"the stack is unlimited, NCCL {'.'.join(map(str, version))}", "8 MiB", fix)
