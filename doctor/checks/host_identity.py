"""Which parts NCCL takes for one machine."""

from doctor import fixes
from doctor.check import CheckResult, error, ok, symptoms, warn
from doctor.checks.categories import gang_check
from doctor.context import CheckContext
from doctor.gang.view import GangView


@gang_check("S-05", "NCCL detects which parts share a machine")
@symptoms(
    "Error while attaching to shared memory segment …: No such file or directory (2)",
    "nvmlDeviceGetHandleByPciBusId() failed: Not Found",
    "failed to open CUDA IPC handle",
)
def nccl_host_ids_match(ctx: CheckContext, view: GangView) -> CheckResult:
    """NCCL assumes that ranks with the same host name and boot id share /dev/shm. Two containers with the same host
    name but separate shared memory then cannot connect; two with different host names on one machine use the network
    instead of shared memory."""
    if not ctx.on_gpu:
        return ok("NCCL is not used")
    for a, b in view.hosts_sharing_nccl_id():
        actual = f"{a} and {b} look like one machine, and share no memory"
        return error(actual, "one host id if they share memory, else two", fixes.NCCL_HOSTID)
    for a, b in view.separated_hosts():
        actual = f"{a} and {b} are on one machine, and NCCL will use the network between them"
        return warn(actual, "one part", fixes.NCCL_HOSTID)
    return ok("each part is a machine of its own")
