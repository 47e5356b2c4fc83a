"""Turns the bytes of a request body into a validated request and the token ids of its prompts.

Everything whose cost grows with the body happens here: JSON, validation, the chat template, the tokenizer. The
functions are synchronous and use no state except tokenizer and template, so that `preparer` can run them in another
process. This module prepares chat, completion and tokenization requests. Others (`pooling_preparation`, `responses`,
`anthropic`, `native_preparation`) prepare theirs with functions that take a `Preparation`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rtp_llm.api.body import parse_body
from rtp_llm.api.chat_renderer import ChatRenderer
from rtp_llm.api.constraints import StructuredOutputFields, content_grammar
from rtp_llm.api.prepared import Prepared
from rtp_llm.api.prompt_encoder import PromptEncoder
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.api.schema import ChatRequest, CompletionRequest, OpenAIRequest
from rtp_llm.api.tools import ToolUse, tool_use
from rtp_llm.errors import empty_prompt, invalid_params, unsupported
from rtp_llm.text.grammar import check, combine
from rtp_llm.text.json_schema import GrammarError
from rtp_llm.text.output_format import AnswerFormats, OutputFormat
from rtp_llm.text.template import ChatTemplate
from rtp_llm.text.tokenizer import Tokenizer

Body = TypeVar("Body", bound=OpenAIRequest)


class Preparation:
    """Turns the JSON body of a chat, completion or tokenization request into a `Prepared` request: validates it,
    renders the chat template and tokenizes. Holds the tokenizer, the template and the formats in which the model writes
    tool calls and reasoning.

    All methods except `grammar_error` raise RequestError: 400 if the request is invalid, 429 if too few slots are free
    for a batch, 503 while the model is loading.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, formats: AnswerFormats):
        self.tokenizer, self.template, self._formats = tokenizer, template, formats
        self.renderer, self.encoder = ChatRenderer(template), PromptEncoder(tokenizer, template)

    def grammar_error(self, raw: bytes, limits: PromptLimits) -> str:
        """Returns why the grammar `raw` (a UTF-8 string for llguidance) is invalid; empty if it is valid.

        `limits` is not used: the signature is that of the methods that `Preparer` can run in another process.
        """
        try:
            check(raw.decode())
        except GrammarError as error:
            return str(error)
        return ""

    def chat(self, raw: bytes, limits: PromptLimits) -> Prepared[ChatRequest]:
        return self.chat_body(parse_body(ChatRequest, raw), limits)

    def chat_body(
        self, body: ChatRequest, limits: PromptLimits, prompt_field: str = "messages"
    ) -> Prepared[ChatRequest]:
        """Validates a chat request, applies the chat template and tokenizes. For other chat APIs, call it with the chat
        request into which their request is translated.

        `prompt_field`: the field of the original request that errors name if the prompt is too long.
        """
        if body.top_logprobs and not body.logprobs:
            raise invalid_params(f"top_logprobs={body.top_logprobs} needs logprobs: true", "top_logprobs")
        _check_prompt_logprobs(body)
        limits = replace(limits, prompt_field=prompt_field)
        content, constraint = content_grammar(self.tokenizer, body, body.extra_configs)
        limits.check_engine()
        use = tool_use(body)
        prompt = self.renderer.render_chat(body)
        max_tokens = body.max_completion_tokens or body.max_tokens or 1
        ids = self.encoder.encode_chat(prompt, limits, limits.num_kept(body.truncate_prompt_tokens, max_tokens))
        small = _without(body, "messages", "tools", "tool_choice", "chat_template_kwargs", "documents")
        output_format = self._formats.output_format(
            use.tools if use.choice != "none" else (),
            prompt.text,
            _prefill(body),
            include_reasoning=body.include_reasoning is not False,
            skip_special_tokens=body.skip_special_tokens is not False,
        )
        grammar = self._chat_grammar(content, constraint, use, output_format)
        return replace(
            Prepared.pack(small, [ids], prompt.text),
            output_format=output_format,
            bad_words=self.encoder.encode_bad_words(body.bad_words or ()),
            grammar=grammar,
            constraint=constraint or "tools",
        )

    def completion(self, raw: bytes, limits: PromptLimits) -> Prepared[CompletionRequest]:
        body = parse_body(CompletionRequest, raw)
        _check_prompt_logprobs(body)
        if body.suffix:
            raise unsupported("suffix is not supported: this model completes to the right only", "suffix")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise unsupported("best_of is not supported: leave it out, or make it equal to n", "best_of")
        limits.check_engine()
        items: Sequence[Any] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if not items:
            raise empty_prompt("prompt is an empty list: send a text, texts, token ids or lists of token ids")
        if isinstance(items[0], int):
            items = [items]
        limits.check_count(len(items) * (body.n or 1))
        last = limits.num_kept(body.truncate_prompt_tokens, body.max_tokens or 1)
        prompts = [self.encoder.encode_prompt(item, limits, last) for item in items]
        grammar, constraint = content_grammar(self.tokenizer, body)
        bad_words = self.encoder.encode_bad_words(body.bad_words or ())
        prepared = Prepared.pack(_without(body, "prompt"), prompts)
        return replace(prepared, bad_words=bad_words, grammar=grammar, constraint=constraint)

    def _chat_grammar(self, content: str, constraint: str, use: ToolUse, output_format: OutputFormat) -> str:
        """Returns the grammar of an answer: of its calls, of its content, and of the reasoning before; empty: any."""
        if content and use.choice == "required" and constraint != "response_format":
            message = f"{constraint} and this tool_choice exclude each other: a call has to be the whole answer"
            raise invalid_params(message, constraint)
        calls = ""
        if use.is_constrained or (content and use.choice == "auto"):
            try:
                calls = self._formats.tool_format.grammar(use.tools, use.parallel, self.tokenizer)
            except GrammarError as error:
                raise invalid_params(f"tools: {error}", "tools") from None
        return combine(
            self.tokenizer, content=content, calls=calls, choice=use.choice, reasoning=output_format.reasoning
        )


def _check_prompt_logprobs(body: OpenAIRequest) -> None:
    if body.stream and body.prompt_logprobs is not None:
        raise invalid_params("prompt_logprobs is not available in a stream: leave out stream", "prompt_logprobs")


def _without(body: Body, *used: str) -> Body:
    """Returns the body without the fields that have become prompt or grammar."""
    return body.model_copy(update=dict.fromkeys((*used, *StructuredOutputFields.model_fields)))


def _prefill(body: ChatRequest) -> str | None:
    """Returns the assistant's text that the answer continues, None if it begins a new turn."""
    if not body.continue_final_message:
        return None
    content = body.messages[-1].content or ""
    return content if isinstance(content, str) else "".join(part.text or "" for part in content)
