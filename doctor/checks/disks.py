"""The disks that this server writes, and the one that it reads the weights from."""

import os
import time
from pathlib import Path

from doctor.check import CheckResult, Fix, Status, check, error, ok, skip, warn
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm.model.checkpoint import Checkpoint

CATEGORY = "model"
NO_MODEL = "CHECKPOINT_PATH is not set"
MIN_DISK_BYTES, DISK_OK_BYTES = 1 << 30, 5 << 30
READ_BYTES = 64 << 20
SLOW_LOAD_SECONDS = 600.0
NETWORK_DISKS = ("nfs", "nfs4", "cifs", "ceph", "lustre", "glusterfs", "9p", "virtiofs")


@check(
    "M-09",
    CATEGORY,
    "there is room on the disks that are written",
    symptoms=("[Errno 28] No space left on device: '/tmp…'",),
    severity=Status.ERROR,
)
def disk(ctx: CheckContext) -> CheckResult:
    """The run directory and temporary files of torch and Triton lie in RTP_RUN_DIR and TMPDIR. Without room for a few
    kilobytes there not even sockets can be made."""
    folders = {ctx.config.rtp_run_dir or "", ctx.host.environ.get("TMPDIR", "/tmp")} - {""}
    low, text = DISK_OK_BYTES, []
    for name in sorted(folders):
        existing = next(p for p in (Path(name), *Path(name).parents) if ctx.host.exists(str(p)))
        space = ctx.host.space(str(existing))
        low = min(low, space.free if space.inodes != 0 else 0)
        text.append(f"{name} has {format_bytes(space.free)} free" + (", no inode" if space.inodes == 0 else ""))
    fix = Fix(
        host="free some space, or set TMPDIR and RTP_RUN_DIR to another disk",
        docker="docker run --tmpfs /tmp:size=2g …",
        compose="tmpfs: [/tmp:size=2g]",
        kubernetes="mount an emptyDir {sizeLimit: 2Gi} at /tmp",
    )
    if low < 16 << 20:
        return error(", ".join(text), format_bytes(MIN_DISK_BYTES), fix)
    return warn(", ".join(text), format_bytes(MIN_DISK_BYTES), fix) if low < MIN_DISK_BYTES / 8 else ok(", ".join(text))


@check(
    "M-10", CATEGORY, "the weights can be read in good time", severity=Status.WARN, needs=("M-06", "M-08"), timeout=12
)
def read_speed(ctx: CheckContext) -> CheckResult:
    """64 MiB of the checkpoint are read past the page cache (tier 1), and the time for all of it predicted. A disk that
    gives no answer at all shows as a check that was killed."""
    checkpoint = ctx.checkpoint
    if checkpoint is None:
        return skip(NO_MODEL)
    mount = ctx.host.mount(str(checkpoint.path.resolve()))
    kind = mount.fstype if mount else "?"
    if ctx.tier < 1:
        far = kind in NETWORK_DISKS or kind.startswith("fuse")
        return skip(f"on {kind}" + (", over the network; --tier 1 measures it" if far else "; --tier 1 measures it"))
    seconds, count = _read_cold(checkpoint)
    total = sum(f.stat().st_size for f in {t.file for t in checkpoint.tensors.values()})
    speed = count / max(seconds, 1e-6)
    text = f"{format_bytes(speed)}/s from {kind}: {format_bytes(total)} in {total / speed:.1f} s"
    if total / speed > SLOW_LOAD_SECONDS:
        fix = "copy the checkpoint to a local disk, and raise the start-up probe's budget"
        return warn(text, f"at most {SLOW_LOAD_SECONDS:.0f} s", fix, bytes_per_second=round(speed))
    return ok(text, bytes_per_second=round(speed))


def _read_cold(checkpoint: Checkpoint) -> tuple[float, int]:
    """Seconds and bytes of reading the beginning of the largest shard, its pages dropped from the cache before."""
    file = max({t.file for t in checkpoint.tensors.values()}, key=lambda f: f.stat().st_size)
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, READ_BYTES, os.POSIX_FADV_DONTNEED)
        started, count = time.monotonic(), 0
        while count < READ_BYTES and (piece := stream.read(4 << 20)):
            count += len(piece)
    return time.monotonic() - started, count
