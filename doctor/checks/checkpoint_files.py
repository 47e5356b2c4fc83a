"""Checks that the checkpoint's files are present, readable and complete. Of the weights, only the headers are read."""

import os

from doctor import fixes
from doctor.check import CheckResult, Repair, error, ok, skip, symptoms
from doctor.checks.categories import model_check
from doctor.context import CheckContext

NO_MODEL = "CHECKPOINT_PATH is not set"


def checkpoint_errors(ctx: CheckContext, id: str) -> str:
    """Returns, as one text, the errors of this checkpoint that the check `id` has to report; empty if there are none.

    The errors come from the server's own checkpoint reader, and each names the check that reports it.
    """
    errors = [*ctx.checkpoint_errors, *([ctx.spec_error] if ctx.spec_error else [])]
    return "; ".join(str(e) for e in errors if (e.check or "M-12") == id)


@model_check("M-08", "CHECKPOINT_PATH is a local folder", repair=Repair.DOWNLOAD)
@symptoms(
    "LocalEntryNotFoundError: Cannot find the requested files in the disk cache", "CHECKPOINT_PATH=…: does not exist"
)
def checkpoint_folder_exists(ctx: CheckContext) -> CheckResult:
    """The server reads a local folder and downloads nothing. The exception is a Hugging Face name such as org/model,
    which the start turns into a folder first (M-17 to M-20). A path of the host exists in the container only if it is
    mounted."""
    path = ctx.checkpoint_path
    if path is None and ctx.running:  # with its own settings, which this shell does not have
        return skip(NO_MODEL)
    if path is None:
        return error(NO_MODEL, "a folder with config.json and *.safetensors", fixes.checkpoint_path("/models/NAME"))
    timeout_error = checkpoint_errors(ctx, "M-08")
    if timeout_error:
        return error(timeout_error, "a disk that responds", "remount it, or copy the checkpoint to a local disk")
    if path.is_dir():
        return ok(f"{path} is a folder")
    if ctx.missing_models:
        names = " and ".join(map(str, ctx.missing_models))
        return skip(f"the start downloads {names} first", because="M-08")
    return error(
        f"CHECKPOINT_PATH={path} is not a folder here",
        "a local folder with config.json and *.safetensors",
        fixes.checkpoint_path(f"/models/{path.name}"),
    )


@model_check("M-11", "the checkpoint's files are readable", needs=("M-08",))
@symptoms("PermissionError: [Errno 13] Permission denied: '…safetensors'", "…: cannot be read: Permission denied")
def checkpoint_is_readable(ctx: CheckContext) -> CheckResult:
    """A container often runs as another user than the one who downloaded the model, and then cannot read its files."""
    path = ctx.checkpoint_path
    if path is None or not path.is_dir():
        return skip(NO_MODEL)
    files = [*path.glob("*.json"), *path.glob("*.safetensors")]
    # A symbolic link to a missing file is not reported here, but by M-06.
    unreadable = sorted(f.name for f in files if f.exists() and not os.access(f, os.R_OK))
    actual = f"uid {ctx.host.uid} cannot read {', '.join(unreadable[:3])}" if unreadable else ""
    actual = actual or checkpoint_errors(ctx, "M-11")
    if actual:
        owner = path.stat()
        return error(actual, "readable files", fixes.readable_by(owner.st_uid, owner.st_gid, str(path)))
    return ok(f"{len(files)} files are readable")


@model_check("M-05", "no file is a git-lfs pointer", needs=("M-08", "M-11"), repair=Repair.DOWNLOAD)
@symptoms("Error while deserializing header: HeaderTooLarge", "is a git-lfs pointer, not the file itself")
def no_lfs_pointers(ctx: CheckContext) -> CheckResult:
    """`git clone` without git-lfs leaves text files of about 130 bytes in place of the weights."""
    return _check_files(ctx, "M-05", "no file is a git-lfs pointer", "git lfs install && git lfs pull")


@model_check("M-06", "no shard is missing", needs=("M-08", "M-11"), repair=Repair.DOWNLOAD)
@symptoms("FileNotFoundError: … model-…-of-…safetensors", "names … shards, missing:")
def no_missing_shards(ctx: CheckContext) -> CheckResult:
    """model.safetensors.index.json lists the files that hold the tensors. An interrupted download leaves some of them
    out, or leaves *.incomplete files."""
    partial = sorted(p.name for p in ctx.checkpoint_path.rglob("*.incomplete")) if ctx.checkpoint_path else []
    incomplete = f"; {partial[0]} is left from an interrupted download" if partial else ""
    actual = f"every shard in the index exists{incomplete}"
    return _check_files(ctx, "M-06", actual, "download the named files again")


@model_check("M-04", "no file is truncated or corrupted", needs=("M-08", "M-11"), repair=Repair.DOWNLOAD)
@symptoms(
    "Error while deserializing header: MetadataIncompleteBuffer",
    "Error while deserializing header: InvalidHeaderDeserialization",
    "cut off: … bytes, its header says …",
)
def no_damaged_files(ctx: CheckContext) -> CheckResult:
    """A safetensors file starts with a header that lists the offset of each tensor, from which the length of the file
    follows. The check reads only the headers, so it takes no longer for a large checkpoint than for a small one."""
    fix = "copy or download the named files again"
    return _check_files(ctx, "M-04", "every file is as long as its header says", fix)


def _check_files(ctx: CheckContext, id: str, healthy: str, fix: str) -> CheckResult:
    """Returns the result of the check `id`: the errors of the checkpoint reader that this check reports, or else the
    text `healthy`."""
    path = ctx.checkpoint_path
    if path is None or not path.is_dir():
        return skip(NO_MODEL)
    actual, tokenizer_error = checkpoint_errors(ctx, id), ctx.tokenizer_error
    if actual:
        folder = ctx.tokenizer_path if tokenizer_error and actual == str(tokenizer_error) else path
        return error(actual, "complete files", f"{fix} in {folder}")
    num_files = len({t.file for t in ctx.checkpoint.tensors.values()}) if ctx.checkpoint else 0
    return ok(f"{healthy} ({num_files} files)" if num_files else healthy)
