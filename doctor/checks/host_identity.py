"""Check of the host ids by which NCCL decides which parts are on the same machine."""

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
    if sharing := view.hosts_sharing_nccl_id():
        a, b = sharing[0]
        actual = f"NCCL considers {a} and {b} one machine, but they do not share /dev/shm"
        return error(actual, "a different NCCL_HOSTID for each part with its own /dev/shm", fixes.NCCL_HOSTID)
    if separated := view.separated_hosts():
        a, b = separated[0]
        actual = f"{a} and {b} are on one machine, but NCCL will use the network between them"
        return warn(actual, "one part per machine", fixes.NCCL_HOSTID)
    return ok("NCCL detects correctly which parts share a machine")
