"""Checks of the limits of this process and its container: locked memory, files, threads, memory, cores and stack."""

import resource
import threading

from doctor import fixes
from doctor.check import CheckResult, Reading, Status, error, ok, symptoms, unknown, warn
from doctor.checks.categories import limits_check
from doctor.checks.preconditions import CGROUP_READABLE, rlimit_readable
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm.machine.cgroup import UNLIMITED
from rtp_llm.machine.process import MIN_OPEN_FILES
from rtp_llm.model.footprint import weight_bytes

INFINITY = resource.RLIM_INFINITY
RECOMMENDED_OPEN_FILES = 65536
# Threads of a rank, without one compute thread per core: (minimum, recommended). Measured: 5 on CPU, about 35 on GPU.
THREADS_PER_RANK = {"cpu": (8, 24), "cuda": (40, 80)}
OTHER_PROCESSES = 16  # processes and threads besides the ranks
CORES_PER_GPU_RANK = 2
RANK_BYTES = 250 << 20  # one rank without weights and KV cache, that is Python and torch; measured on CPU
SERVICE_BYTES = 150 << 20  # start_server, supervisord, guard and API together


@limits_check("L-01", "RDMA can lock enough memory")
@symptoms(
    "NCCL WARN Call to ibv_reg_mr failed",
    "ibv_reg_mr_iova2 failed with error Cannot allocate memory",
    "ibv_create_cq() failed: Cannot allocate memory",
)
def rdma_can_lock_memory(ctx: CheckContext) -> CheckResult:
    """RDMA registers memory with the network card, which locks it in RAM. Containers may lock 8 MiB or less by default
    (ulimit -l)."""
    has_cards = bool(ctx.host.list_dir("/sys/class/infiniband"))
    if not has_cards or not ctx.on_gpu or ctx.nccl.value("NCCL_IB_DISABLE") == "1":
        return ok("NCCL does not use RDMA")
    if "memlock" not in ctx.host.rlimits:
        return unknown("/proc/self/limits cannot be read")
    limit, _ = ctx.host.rlimits["memlock"]
    text = "unlimited" if limit == INFINITY else format_bytes(limit)
    if limit == INFINITY or ctx.host.has_capability("IPC_LOCK"):
        return ok(f"memlock is {text}")
    actual = f"memlock (ulimit -l) is {text}, too little for the RDMA cards that NCCL uses"
    return error(actual, "memlock unlimited", fixes.LOCKED_MEMORY)


@limits_check("L-02", "the limit of open files is high enough", preconditions=(rlimit_readable("nofile"),))
@symptoms("OSError: [Errno 24] Too many open files", "VFS: file-max limit … reached")
def enough_open_files(ctx: CheckContext) -> Reading:
    """Every HTTP connection, rank and NCCL channel uses a file descriptor. A large gang needs tens of thousands."""
    soft, hard = ctx.host.rlimits["nofile"]
    # start_server raises the soft limit to the hard limit.
    reachable = soft if soft == INFINITY else max(soft, hard if hard != INFINITY else 1 << 20)
    recommended = RECOMMENDED_OPEN_FILES if ctx.on_gpu else MIN_OPEN_FILES
    return Reading(
        UNLIMITED if reachable == INFINITY else reachable,
        "no limit of open files" if reachable == INFINITY else f"at most {reachable} open files",
        f"{recommended} or more",
        fixes.OPEN_FILES,
        minimum=MIN_OPEN_FILES,
        recommended=recommended,
    )


@limits_check(
    "L-03", "enough processes and threads can start", preconditions=(CGROUP_READABLE, rlimit_readable("nproc"))
)
@symptoms(
    "RuntimeError: can't start new thread",
    "pthread_create failed for thread … of …: Resource temporarily unavailable",
    "std::system_error what(): Resource temporarily unavailable",
)
def enough_threads(ctx: CheckContext) -> Reading:
    """The pids limit of the cgroup counts threads. Each rank starts threads that compute, load and communicate;
    Kubernetes' podPidsLimit and Docker's --pids-limit are often a few hundred."""
    per_rank = THREADS_PER_RANK["cuda" if ctx.on_gpu else "cpu"]
    minimum, recommended = (ctx.local_ranks * (n + ctx.host.cores) + OTHER_PROCESSES for n in per_rank)
    available, source = ctx.host.cgroup.available_pids, "the cgroup"
    max_processes, _ = ctx.host.rlimits["nproc"]
    if max_processes != INFINITY and max_processes < available and ctx.host.uid != 0:
        available, source = max_processes, "ulimit -u"
    return Reading(
        available,
        "no limit" if available >= UNLIMITED else f"{source} allows {available} more threads",
        f"about {recommended} for {ctx.local_ranks} ranks",
        fixes.num_threads(4 * recommended),
        minimum=minimum,
        recommended=recommended,
    )


@limits_check("L-04", "threads can start")
@symptoms("pthread_create failed for thread … of …: Operation not permitted")
def threads_can_start(ctx: CheckContext) -> CheckResult:
    """Docker before 20.10.10 denies the system call clone3, with which newer C libraries start threads."""
    try:
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
    except RuntimeError:
        filtered = ", under a seccomp filter" if ctx.host.status.get("Seccomp") == "2" else ""
        return error(f"a thread cannot start{filtered}", "threads that start", fixes.SECCOMP)
    return ok("threads start")


@limits_check(
    "L-05", "the memory limit is high enough, and no process was OOM-killed", preconditions=(CGROUP_READABLE,)
)
@symptoms("exit code 137", "Killed process …", "A process in the process pool was terminated abruptly")
def memory_limit_suffices(ctx: CheckContext) -> CheckResult:
    """On CPU the weights are in main memory; on GPUs they pass through it while loading. The cgroup counts the
    processes that the kernel killed for lack of memory: a count above zero comes from an earlier run in this container,
    or from another process in it."""
    cgroup, spec, plan = ctx.host.cgroup, ctx.spec, ctx.plan
    required = ctx.local_ranks * RANK_BYTES + SERVICE_BYTES
    if spec and plan and plan.tp_size in spec.valid_tp_sizes() and not ctx.on_gpu:
        required += ctx.local_ranks * weight_bytes(spec, plan.tp_size)
    limit, fix = cgroup.memory_max, fixes.memory_limit(2 * required)
    if limit is not None and limit < required:
        return error(f"the memory limit is {format_bytes(limit)}", f"at least {format_bytes(required)}", fix)
    if cgroup.oom_kills:
        actual = f"{cgroup.oom_kills} processes of this container were OOM-killed"
        return warn(actual, "no OOM-killed process", fix, oom_kills=cgroup.oom_kills)
    return ok(
        "no memory limit" if limit is None or limit >= UNLIMITED else f"the memory limit is {format_bytes(limit)}"
    )


@limits_check(
    "L-06", "there are enough CPU cores for the ranks", severity=Status.WARN, preconditions=(CGROUP_READABLE,)
)
def enough_cores(ctx: CheckContext) -> Reading:
    """Each rank keeps one core busy with launching work, and the API another. A lower CPU quota causes stalls of 100 ms
    each time it is used up."""
    cgroup, ranks = ctx.host.cgroup, ctx.local_ranks
    cores = min(ctx.host.cores, cgroup.cpus or ctx.host.cores)
    recommended = ranks * (CORES_PER_GPU_RANK if ctx.on_gpu else 1)
    throttled = f"; the CPU quota was used up {cgroup.throttled} times" if cgroup.throttled else ""
    actual = f"{cores:g} CPU cores for {ranks} ranks{throttled}"
    return Reading(cores, actual, f"{recommended} cores", fixes.cpu_cores(recommended), recommended=recommended)


@limits_check("L-07", "the stack size is limited", severity=Status.WARN, preconditions=(rlimit_readable("stack"),))
def stack_is_limited(ctx: CheckContext) -> CheckResult:
    """With `ulimit -s unlimited` glibc gives threads a stack of only 2 MiB, which overflows in the topology search of
    NCCL before 2.28."""
    limit, _ = ctx.host.rlimits["stack"]
    version = ctx.nccl.version
    if limit != INFINITY or not version or version >= (2, 28) or not ctx.on_gpu:
        return ok("the stack limit is " + ("unlimited" if limit == INFINITY else format_bytes(limit)))
    return warn(f"the stack is unlimited, with NCCL {ctx.nccl.version_text}", "8 MiB", fixes.STACK_SIZE)
