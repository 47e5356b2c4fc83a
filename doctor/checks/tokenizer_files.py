"""Checks of the tokenizer and its chat template."""

import json
from pathlib import Path

from doctor.check import CheckResult, Repair, error, ok, skip, symptoms, warn
from doctor.checks.categories import model_check
from doctor.checks.checkpoint_files import NO_MODEL
from doctor.context import CheckContext


@model_check("M-07", "the tokenizer is present and matches the model", needs=("M-08", "M-11"), repair=Repair.DOWNLOAD)
@symptoms("Can't load tokenizer for '…'", "…: no tokenizer.json")
def tokenizer_is_usable(ctx: CheckContext) -> CheckResult:
    """Part 0 needs tokenizer.json in TOKENIZER_PATH, with at most as many tokens as the embedding has rows. The chat
    API of a language model also needs a chat template: the checkpoint's own, or the one that MODEL_TEMPLATE_TYPE
    selects."""
    folder = ctx.tokenizer_path
    if folder is None and ctx.missing_models:
        return skip("the start downloads it first")
    if folder is None:
        return skip("only part 0 reads the tokenizer" if ctx.plan and ctx.plan.part else NO_MODEL)
    fix, tokenizer_error = "set TOKENIZER_PATH to the folder that has tokenizer.json", ctx.tokenizer_error
    if tokenizer_error and tokenizer_error.check == "M-07":
        return error(str(tokenizer_error), "a valid tokenizer.json", f"{fix}, or download it again")
    if tokenizer_error:
        return skip(f"not run, because {tokenizer_error.check} did not pass", because=tokenizer_error.check)
    if ctx.spec and ctx.num_tokens > ctx.spec.vocab_size:
        actual = f"the tokenizer has ids up to {ctx.num_tokens - 1}, the embedding {ctx.spec.vocab_size} rows"
        return error(actual, "a tokenizer of this model", fix)
    if ctx.task != "LANGUAGE_MODEL" or ctx.config.model_template_type or _has_template(folder):
        return ok(f"tokenizer.json, {ctx.num_tokens} tokens")
    fix = "set MODEL_TEMPLATE_TYPE to a built-in template or a .jinja file"
    return warn(f"{folder} has no chat template", "a chat template, for /v1/chat/completions", fix)


def _has_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    inline = json.loads(config.read_bytes()).get("chat_template") if config.exists() else None
    return bool(inline) or (folder / "chat_template.jinja").exists()
