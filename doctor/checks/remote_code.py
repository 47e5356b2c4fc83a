"""Check that the checkpoint needs no Python code of its own (trust_remote_code)."""

from doctor.check import CheckResult, error, ok, skip, symptoms
from doctor.checks.categories import model_check
from doctor.checks.checkpoint_files import NO_MODEL
from doctor.context import CheckContext


@model_check("M-16", "the model needs no remote code", needs=("M-08",))
@symptoms("contains custom code which must be executed to correctly load the model")
def needs_no_remote_code(ctx: CheckContext) -> CheckResult:
    """Some checkpoints contain Python files that transformers would run (trust_remote_code). This server never runs
    them: the supported model families are built in."""
    if ctx.checkpoint is None:
        return skip(NO_MODEL)
    if ctx.checkpoint.config.get("auto_map") and ctx.spec is None:
        actual = "config.json refers to remote code (auto_map)"
        return error(actual, "a built-in model family", "choose another checkpoint")
    return ok("no code of the checkpoint is run")
