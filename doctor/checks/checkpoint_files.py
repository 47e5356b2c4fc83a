"""The checkpoint's files: present, readable and complete."""

import os
from pathlib import Path

from doctor.check import CheckResult, Fix, Repair, check, error, ok, skip
from doctor.context import CheckContext

CATEGORY = "model"
NO_MODEL = "CHECKPOINT_PATH is not set"


def _errors_of_check(ctx: CheckContext, id: str) -> str:
    """What the checkpoint's own reader says under this id, a line each."""
    own = [*ctx.checkpoint_errors, *([ctx.spec_error] if ctx.spec_error else [])]
    return "; ".join(str(f) for f in own if (f.check or "M-12") == id)


def _folder(ctx: CheckContext) -> Path | None:
    path = ctx.checkpoint_path
    return path if path and path.is_dir() else None


@check(
    "M-08",
    CATEGORY,
    "CHECKPOINT_PATH is a folder here",
    symptoms=(
        "LocalEntryNotFoundError: Cannot find the requested files in the disk cache",
        "CHECKPOINT_PATH=…: does not exist",
    ),
    repair=Repair.DOWNLOAD,
)
def checkpoint_folder_exists(ctx: CheckContext) -> CheckResult:
    """The server reads a local folder and downloads nothing, so a hub name such as org/model is not a place it knows,
    and a path of the host is not one of the container unless it is mounted."""
    path = ctx.checkpoint_path
    if path is None:
        return skip(NO_MODEL)
    hung = _errors_of_check(ctx, "M-08")
    if hung:
        return error(hung, "an answer", "mount it anew, or copy the checkpoint to a local disk")
    if path.is_dir():
        return ok(f"{path} is a folder")
    hub = not path.is_absolute() and str(path).count("/") == 1 and not path.exists()
    local = f"/models/{path.name}"
    actual = f"CHECKPOINT_PATH={path} " + ("is a name on a hub, not a folder" if hub else "is no folder here")
    download = f"hf download {path} --local-dir {local}, then " if hub else ""
    return error(
        actual,
        "a local folder with config.json and *.safetensors",
        Fix(
            host=f"{download}CHECKPOINT_PATH={local}",
            docker=f"{download}docker run -v {local}:{local}:ro -e CHECKPOINT_PATH={local} …",
            compose=f'{download}volumes: ["{local}:{local}:ro"] and CHECKPOINT_PATH: {local}',
            kubernetes=f"mount the volume that holds the model, and set CHECKPOINT_PATH={local}",
        ),
    )


@check(
    "M-11",
    CATEGORY,
    "the checkpoint's files may be read",
    symptoms=("PermissionError: [Errno 13] Permission denied: '…safetensors'", "…: cannot be read: Permission denied"),
    needs=("M-08",),
)
def permissions(ctx: CheckContext) -> CheckResult:
    """A container runs as a user of its own, often not the one who downloaded the model."""
    path = _folder(ctx)
    if path is None:
        return skip(NO_MODEL)
    files = [*path.glob("*.json"), *path.glob("*.safetensors")]
    closed = sorted(f.name for f in files if f.exists() and not os.access(f, os.R_OK))  # else M-06
    fault = _errors_of_check(ctx, "M-11")
    if closed or fault:
        owner = path.stat()
        return error(
            f"uid {ctx.host.uid} may not read {', '.join(closed[:3])}" if closed else fault,
            "every file readable",
            Fix(
                host=f"chmod -R a+rX {path}",
                docker=f"docker run --user {owner.st_uid}:{owner.st_gid} …, or on the host: chmod -R a+rX {path}",
                compose=f'user: "{owner.st_uid}:{owner.st_gid}", or on the host: chmod -R a+rX {path}',
                kubernetes=f"securityContext: {{fsGroup: {owner.st_gid}}}",
            ),
        )
    return ok(f"{len(files)} files can be read")


@check(
    "M-05",
    CATEGORY,
    "the files are the weights, not pointers to them",
    symptoms=("Error while deserializing header: HeaderTooLarge", "is a git-lfs pointer, not the file itself"),
    needs=("M-08", "M-11"),
    repair=Repair.DOWNLOAD,
)
def lfs_pointers(ctx: CheckContext) -> CheckResult:
    """`git clone` without git-lfs leaves text files of some 130 bytes in place of the weights."""
    return _files_result(ctx, "M-05", "no git-lfs pointer among the files", "git lfs install && git lfs pull")


@check(
    "M-06",
    CATEGORY,
    "no shard is missing",
    symptoms=("FileNotFoundError: … model-…-of-…safetensors", "names … shards, missing:"),
    needs=("M-08", "M-11"),
    repair=Repair.DOWNLOAD,
)
def missing_shards(ctx: CheckContext) -> CheckResult:
    """model.safetensors.index.json names the files that hold the tensors; a download that was broken off leaves some
    out, or leaves *.incomplete files."""
    path = _folder(ctx)
    partial = sorted(p.name for p in path.rglob("*.incomplete")) if path else []
    actual = "every shard of the index is there" + (f"; left over: {partial[0]}" if partial else "")
    return _files_result(ctx, "M-06", actual, "download the named files again")


@check(
    "M-04",
    CATEGORY,
    "no file is cut off or damaged",
    symptoms=(
        "Error while deserializing header: MetadataIncompleteBuffer",
        "Error while deserializing header: InvalidHeaderDeserialization",
        "cut off: … bytes, its header says …",
    ),
    needs=("M-08", "M-11"),
    repair=Repair.DOWNLOAD,
)
def damaged_files(ctx: CheckContext) -> CheckResult:
    """A safetensors file begins with the table of its tensors, which says how long the file must be. Only these
    headers are read, so a terabyte takes no longer than a megabyte."""
    return _files_result(
        ctx, "M-04", "every file is as long as its header says", "copy or download the named files again"
    )


def _files_result(ctx: CheckContext, id: str, good: str, fix: str) -> CheckResult:
    path = _folder(ctx)
    if path is None:
        return skip(NO_MODEL)
    fault, beside = _errors_of_check(ctx, id), ctx.tokenizer_error
    if fault:
        place = ctx.tokenizer_path if beside and fault == str(beside) else path
        return error(fault, "whole files", f"{fix} in {place}")
    count = len({t.file for t in ctx.checkpoint.tensors.values()}) if ctx.checkpoint else 0
    return ok(f"{good} ({count} files)" if count else good)
