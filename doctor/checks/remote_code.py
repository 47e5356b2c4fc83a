"""Python code that a checkpoint brings along."""

from doctor.check import CheckResult, check, error, ok, skip
from doctor.context import CheckContext

CATEGORY = "model"
NO_MODEL = "CHECKPOINT_PATH is not set"


@check(
    "M-16",
    CATEGORY,
    "the model needs no code of its own",
    symptoms=("contains custom code which must be executed to correctly load the model",),
    needs=("M-08",),
)
def remote_code(ctx: CheckContext) -> CheckResult:
    """Some checkpoints bring Python files that transformers would run. This server never runs code of a checkpoint:
    the families it knows are built in, so such a file is not used."""
    if ctx.checkpoint is None:
        return skip(NO_MODEL)
    if ctx.checkpoint.config.get("auto_map") and ctx.spec is None:
        return error(
            "config.json asks for code of its own (auto_map)", "a built-in family", "choose another checkpoint"
        )
    return ok("nothing of the checkpoint is executed")
