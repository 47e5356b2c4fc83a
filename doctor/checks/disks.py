"""Checks of the disks to which the server writes, and of the disk with the weights."""

import os
import time
from pathlib import Path

from doctor import fixes
from doctor.check import CheckResult, Reading, Status, skip, symptoms
from doctor.checks.categories import model_check
from doctor.checks.checkpoint_files import NO_MODEL
from doctor.context import CheckContext
from doctor.host import format_bytes
from rtp_llm.model.checkpoint import Checkpoint

MIN_FREE_BYTES, RECOMMENDED_FREE_BYTES, EXPECTED_FREE_BYTES = 16 << 20, 128 << 20, 1 << 30
READ_BYTES = 64 << 20
MAX_LOAD_SECONDS = 600.0
NETWORK_DISKS = ("nfs", "nfs4", "cifs", "ceph", "lustre", "glusterfs", "9p", "virtiofs")


@model_check("M-09", "the disks that the server writes to have free space")
@symptoms("[Errno 28] No space left on device: '/tmp…'")
def disks_have_free_space(ctx: CheckContext) -> Reading:
    """The server keeps its run directory below RTP_RUN_DIR or TMPDIR, and torch and Triton write temporary files to
    TMPDIR. If these disks are full, the server cannot even create its Unix sockets."""
    folders = {ctx.config.rtp_run_dir or "", ctx.host.environ.get("TMPDIR", "/tmp")} - {""}
    free, texts = [], []
    for name in sorted(folders):
        existing = next(p for p in (Path(name), *Path(name).parents) if ctx.host.exists(str(p)))
        space = ctx.host.space(str(existing))
        free.append(space.free if space.inodes != 0 else 0)
        texts.append(f"{name} has {format_bytes(space.free)} free" + (", no inode" if space.inodes == 0 else ""))
    return Reading(
        min(free, default=RECOMMENDED_FREE_BYTES),
        ", ".join(texts),
        format_bytes(EXPECTED_FREE_BYTES),
        fixes.DISK_SPACE,
        minimum=MIN_FREE_BYTES,
        recommended=RECOMMENDED_FREE_BYTES,
    )


@model_check("M-10", "the checkpoint is read fast enough", severity=Status.WARN, needs=("M-06", "M-08"), timeout=12)
def weights_load_fast(ctx: CheckContext) -> CheckResult | Reading:
    """Tier 1 reads 64 MiB of the checkpoint, bypassing the page cache, and predicts the time to load all of it. If the
    disk does not respond at all, the check is killed after its timeout. Tests of tier 1 load the hardware, and run only
    with `--tier 1`."""
    checkpoint = ctx.checkpoint
    if checkpoint is None:
        return skip(NO_MODEL)
    mount = ctx.host.mount(str(checkpoint.path.resolve()))
    fstype = mount.fstype if mount else "?"
    if ctx.tier < 1:
        is_network = fstype in NETWORK_DISKS or fstype.startswith("fuse")
        network = ", a network file system" if is_network else ""
        return skip(f"the checkpoint is on {fstype}{network}; --tier 1 measures its speed")
    seconds, num_bytes = _read_cold(checkpoint)
    total = sum(f.stat().st_size for f in {t.file for t in checkpoint.tensors.values()})
    speed = num_bytes / max(seconds, 1e-6)
    return Reading(
        total / speed,
        f"{fstype} reads {format_bytes(speed)}/s, so {format_bytes(total)} take {total / speed:.1f} s",
        f"at most {MAX_LOAD_SECONDS:.0f} s",
        "copy the checkpoint to a local disk, or raise failureThreshold of the start-up probe",
        maximum=MAX_LOAD_SECONDS,
        evidence={"bytes_per_second": round(speed)},
    )


def _read_cold(checkpoint: Checkpoint) -> tuple[float, int]:
    """Reads up to READ_BYTES of the largest shard after dropping them from the page cache. Returns (seconds, bytes
    read)."""
    path = max({t.file for t in checkpoint.tensors.values()}, key=lambda f: f.stat().st_size)
    with path.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, READ_BYTES, os.POSIX_FADV_DONTNEED)
        started, num_bytes = time.monotonic(), 0
        while num_bytes < READ_BYTES and (chunk := stream.read(4 << 20)):
            num_bytes += len(chunk)
    return time.monotonic() - started, num_bytes
