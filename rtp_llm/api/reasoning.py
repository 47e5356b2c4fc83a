"""Reasoning options of a chat request, as OpenAI, DeepSeek, Qwen and vLLM name them."""

from typing import Any

from rtp_llm.api.schema import PromptOptions


def template_kwargs(body: PromptOptions) -> dict[str, Any]:
    """Returns the variables for the chat template: the request's own, and those that switch reasoning on or off.

    Templates call the switch `enable_thinking` (Qwen, GLM) or `thinking` (DeepSeek, Kimi); those without one ignore it.
    """
    kwargs = dict(body.chat_template_kwargs or {})
    thinks = body.enable_thinking
    if thinks is None and body.thinking is not None:
        thinks = body.thinking if isinstance(body.thinking, bool) else body.thinking.get("type") != "disabled"
    if thinks is None and body.reasoning_effort == "none":
        thinks = False
    if thinks is not None:
        kwargs = {"enable_thinking": thinks, "thinking": thinks} | kwargs
    if body.reasoning_effort:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    return kwargs
