"""Renders the messages of a request with the model's chat template, according to the request's fields.

Such fields are `tools`, `chat_template_kwargs`, `add_generation_prompt` and `continue_final_message`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from rtp_llm.api import fields
from rtp_llm.api.reasoning import template_kwargs
from rtp_llm.api.schema import ChatMessage, ChatRequest, PromptOptions
from rtp_llm.api.tools import rendered_tools
from rtp_llm.errors import invalid_params
from rtp_llm.text.template import ChatTemplate, Prompt, TemplateError

# Arguments of `ChatTemplate.render`, which have request fields of their own.
_RESERVED_KWARGS = {"messages", "tools", "add_generation_prompt", "continue_final_message", "allow_special_tokens"}


class ChatRenderer:
    """Renderer of chats with the model's chat template. All methods raise RequestError 400 if the template cannot
    render the messages, or if two options of the request exclude each other.
    """

    def __init__(self, template: ChatTemplate):
        self._template = template

    def render_chat(self, body: ChatRequest) -> Prompt:
        return self.render(body.messages, body, rendered_tools(body))

    def render(
        self, messages: Sequence[ChatMessage], options: PromptOptions, tools: Sequence[dict[str, Any]] | None = None
    ) -> Prompt:
        self._report_unread(messages)
        kwargs = template_kwargs(options)
        if reserved := _RESERVED_KWARGS & kwargs.keys():
            message = f"chat_template_kwargs: {min(reserved)!r} is reserved; use the request field of that name"
            raise invalid_params(message, "chat_template_kwargs")
        if options.continue_final_message and options.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other: send one of them as true"
            raise invalid_params(message, "continue_final_message")
        if options.documents:
            kwargs["documents"] = options.documents
        begins_answer = options.add_generation_prompt is not False and not options.continue_final_message
        try:
            return self._template.render(
                [m.model_dump(exclude_unset=True) for m in messages],
                tools=tools or None,
                add_generation_prompt=begins_answer,
                continue_final_message=bool(options.continue_final_message),
                allow_special_tokens=bool(options.allow_special_tokens),
                **kwargs,
            )
        except TemplateError as error:
            raise invalid_params(str(error), "messages") from None

    def _report_unread(self, messages: Sequence[ChatMessage]) -> None:
        """Reports fields of messages and their content parts that the chat template does not read."""
        names: set[str] = set().union(*(m.model_extra or () for m in messages))
        fields.ignore("messages.", (n for n in sorted(names - fields.MESSAGE_HINTS) if not self._template.reads(n)))
        parts = itertools.chain.from_iterable(m.content for m in messages if isinstance(m.content, list))
        names = set().union(*(part.model_extra or () for part in parts))
        unread = (n for n in sorted(names - fields.MESSAGE_HINTS) if not self._template.reads(n))
        fields.ignore("messages.content.", unread)
