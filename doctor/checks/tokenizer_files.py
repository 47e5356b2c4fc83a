"""The tokenizer and its chat template."""

import json
from pathlib import Path

from doctor.check import CheckResult, Repair, Status, check, error, ok, skip, warn
from doctor.context import CheckContext

CATEGORY = "model"
NO_MODEL = "CHECKPOINT_PATH is not set"


@check(
    "M-07",
    CATEGORY,
    "the tokenizer is there and fits the model",
    symptoms=("Can't load tokenizer for '…'", "…: no tokenizer.json"),
    needs=("M-08", "M-11"),
    repair=Repair.DOWNLOAD,
)
def tokenizer(ctx: CheckContext) -> CheckResult:
    """Part 0 needs tokenizer.json in TOKENIZER_PATH, with no more tokens than the embedding has rows; the chat API
    needs a chat template: the checkpoint's own, or, by the model's family, one that is built in."""
    folder = ctx.tokenizer_path
    if folder is None:
        return skip("only part 0 reads the tokenizer" if ctx.plan and ctx.plan.part else NO_MODEL)
    fix = "set TOKENIZER_PATH to the folder that has tokenizer.json"
    fault = ctx.tokenizer_error
    if fault and fault.check == "M-07":
        return error(str(fault), "a whole tokenizer.json", f"{fix}, or download it again")
    if fault:
        return CheckResult(Status.SKIP, f"because {fault.check}", evidence={"because": fault.check})
    tokens = _largest_token(folder / "tokenizer.json")
    if tokens and ctx.spec and tokens > ctx.spec.vocab_size:
        actual = f"the tokenizer has ids up to {tokens - 1}, the embedding {ctx.spec.vocab_size} rows"
        return error(actual, "a tokenizer of this model", fix)
    if ctx.config.model_template_type or _has_template(folder):
        return ok(f"tokenizer.json, {tokens} tokens")
    return warn(
        f"{folder} has no chat template",
        "one, for /v1/chat/completions",
        "set MODEL_TEMPLATE_TYPE to a built-in template or a .jinja file",
    )


def _largest_token(file: Path) -> int:
    """1 + the largest id of a file that has a vocabulary."""
    table = json.loads(file.read_bytes())
    vocabulary, added = table["model"]["vocab"], table.get("added_tokens") or []
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
    return max([*ids, *(t["id"] for t in added)], default=-1) + 1


def _has_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    inline = json.loads(config.read_bytes()).get("chat_template") if config.exists() else None
    return bool(inline) or (folder / "chat_template.jinja").exists()
