"""Which parts NCCL takes for one machine."""

from doctor.check import CheckResult, Fix, check, error, ok, skip, warn
from doctor.context import CheckContext

CATEGORY = "gang"
NOT_RUN = "`rtp-llm-doctor gang` on every part"


@check(
    "S-05",
    CATEGORY,
    "NCCL can tell which parts share a machine",
    tier=2,
    symptoms=(
        "Error while attaching to shared memory segment …: No such file or directory (2)",
        "nvmlDeviceGetHandleByPciBusId() failed: Not Found",
        "failed to open CUDA IPC handle",
    ),
    needs=("C-09", "C-10"),
)
def one_machine(ctx: CheckContext) -> CheckResult:
    """NCCL takes ranks with the same host name and boot id for neighbours that share /dev/shm. Two containers with one
    name and memories of their own are not; two with different names on one machine use the network between them."""
    view = ctx.gang
    if view is None:
        return skip(NOT_RUN)
    if not ctx.on_gpu:
        return ok("NCCL is not used")
    fix = Fix(
        host="run both parts in one container, or set another NCCL_HOSTID on each",
        docker="one container for both, or --ipc=host --pid=host --gpus all, or another -e NCCL_HOSTID on each",
        kubernetes="one pod per machine, or another NCCL_HOSTID per pod",
    )
    confused = view.hosts_sharing_nccl_id()
    if confused:
        return error(f"{' and '.join(confused[0])} look like one machine, and share no memory", "one or the other", fix)
    apart = view.separated_hosts()
    if apart:
        return warn(
            f"{' and '.join(apart[0])} are on one machine, and NCCL will use the network between them", "one part", fix
        )
    return ok("each part is a machine of its own")
