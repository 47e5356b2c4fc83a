"""Checks of the model hub (huggingface.co, or HF_ENDPOINT) from which the server downloads a model at its start if
CHECKPOINT_PATH is a name such as org/model. The checks query the hub, but download nothing.
"""

from doctor import fixes
from doctor.check import CheckResult, Precondition, error, ok, skip, symptoms
from doctor.checks.categories import model_check
from doctor.context import CheckContext
from doctor.fixes import Fix

TIMEOUT_SECONDS = 30.0  # of the check that asks the hub, for all of them


def _to_download(ctx: CheckContext) -> CheckResult | None:
    return None if ctx.missing_models else skip("the start downloads nothing")


DOWNLOADS: tuple[Precondition, ...] = (_to_download,)


def _hub_result(ctx: CheckContext, id: str, expected: str, fix: Fix | str) -> CheckResult:
    """Returns the error that the start would meet, if it is the one that the check `id` reports."""
    if ctx.hub_error and ctx.hub_error.check == id:
        return error(str(ctx.hub_error), expected, fix)
    return ok(expected)


@model_check("M-17", "the hub with the model can be reached", preconditions=DOWNLOADS, timeout=TIMEOUT_SECONDS)
@symptoms(
    "OfflineModeIsEnabled",
    "Failed to establish a new connection: … huggingface.co",
    "Please check your internet connection and try again",
)
def hub_is_reachable(ctx: CheckContext) -> CheckResult:
    """If CHECKPOINT_PATH is a name such as org/model, the start downloads the model from https://huggingface.co, or
    from HF_ENDPOINT. With HF_HUB_OFFLINE=1, or without a network, it can only take what the cache in HF_HOME has."""
    return _hub_result(ctx, "M-17", "a hub that answers, or the model in the cache", fixes.HUB)


@model_check("M-18", "the hub has the model", needs=("M-17",), preconditions=DOWNLOADS)
@symptoms(
    "RepositoryNotFoundError: 401 Client Error", "RepositoryNotFoundError: 404 Client Error", "RevisionNotFoundError"
)
def hub_has_model(ctx: CheckContext) -> CheckResult:
    """The hub does not tell a name that does not exist from a private model. The check lists similar names."""
    return _hub_result(
        ctx, "M-18", "org/name or org/name@revision of a model with safetensors files", "correct the name"
    )


@model_check("M-19", "the hub lets this account have the model", needs=("M-18",), preconditions=DOWNLOADS)
@symptoms("Cannot access gated repo for url", "GatedRepoError: 401 Client Error", "GatedRepoError: 403 Client Error")
def hub_grants_access(ctx: CheckContext) -> CheckResult:
    """Some models are gated: their files need a token (HF_TOKEN) of an account that has accepted their terms."""
    return _hub_result(ctx, "M-19", "a public model, or a token with access to it", fixes.HUB_TOKEN)


@model_check("M-20", "the cache has space for the model", needs=("M-19",), preconditions=DOWNLOADS)
@symptoms("Not enough free disk space to download the file")
def cache_has_space(ctx: CheckContext) -> CheckResult:
    """The download needs as much free space as the model's files are large, on the disk of HF_HUB_CACHE, by default
    below HF_HOME. Files that an earlier download has completed need no further space.
    """
    return _hub_result(ctx, "M-20", "space for the model's files", fixes.HUB_CACHE)
