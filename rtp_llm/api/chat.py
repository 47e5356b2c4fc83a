"""Generates chat responses for all chat APIs (OpenAI, Responses, Anthropic).

Each of them translates its request to a `ChatRequest`, starts it with `start_chat`, and formats the resulting deltas of
content, reasoning and tool calls.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from rtp_llm.api.generation import Choice, GenerationRequest, make_generation
from rtp_llm.api.params import StopWords, merge_extra_configs, sampling_params
from rtp_llm.api.prepared import Prepared
from rtp_llm.api.schema import ChatRequest
from rtp_llm.api.service import Service
from rtp_llm.api.text_stream import OutputChunk
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import invalid_params
from rtp_llm.text.output import ContentParser, OutputDelta, OutputParser, ToolCallDelta
from rtp_llm.text.output_format import OutputFormat

CHAT_TEMPERATURE = 0.7  # upstream's default; OpenAI's is 1


@dataclass
class ToolCall:
    """A complete tool call. `arguments`: JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        """Returns the tool call in OpenAI's format."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Answer:
    """The parsed output of one sequence: content, reasoning and tool calls, as deltas in order."""

    deltas: list[OutputDelta] = field(default_factory=list)

    @property
    def content(self) -> str:
        return "".join(delta.content for delta in self.deltas)

    @property
    def reasoning(self) -> str:
        return "".join(delta.reasoning for delta in self.deltas)

    @property
    def has_calls(self) -> bool:
        return any(delta.call for delta in self.deltas)

    @property
    def calls(self) -> list[ToolCall]:
        pieces: defaultdict[int, list[ToolCallDelta]] = defaultdict(list)
        for delta in self.deltas:
            if delta.call:
                pieces[delta.call.index].append(delta.call)
        return [ToolCall(call[0].id, call[0].name, "".join(p.arguments for p in call)) for call in pieces.values()]


@dataclass
class ChatChoice(Choice):
    """One entry of `choices` in a chat response, whose output text is parsed into content, reasoning and tool calls.

    answer      the parsed output so far
    new_deltas  the parts of it that the newest chunk from the engine added, for a stream
    """

    parser: OutputParser = field(default_factory=ContentParser)
    answer: Answer = field(default_factory=Answer)
    new_deltas: list[OutputDelta] = field(default_factory=list)

    def add(self, chunk: OutputChunk) -> None:
        super().add(chunk)
        reasoned = self.parser.in_reasoning
        self.new_deltas = self.parser.push(chunk.text) + (self.parser.finish() if chunk.finish_reason else [])
        self.answer.deltas += self.new_deltas
        if reasoned or self.parser.in_reasoning:
            self.num_reasoning_tokens += len(chunk.tokens)

    @property
    def finish_reason(self) -> str | None:
        """Returns OpenAI's finish reason: "tool_calls" instead of "stop" if the output has tool calls; None until the
        choice has ended.
        """
        reason = super().finish_reason
        return "tool_calls" if reason == "stop" and self.answer.has_calls else reason


async def start_chat(
    prepared: Prepared[ChatRequest], service: Service, stop_words: StopWords, temperature: float = CHAT_TEMPERATURE
) -> GenerationRequest[ChatChoice]:
    """Returns the generation of a validated and tokenized chat. It has reserved a slot for each of its n sequences, and
    starts with `run` or `collect`.

    temperature  used if neither the request nor generation_config.json sets one

    Raises RequestError 400 for invalid parameters, 429 if too few slots are free, 503 if the server is stopping.
    """
    body, prompts = prepared.body, await prepared.prompts()
    extra = body.extra_configs
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if extra and "max_new_tokens" in extra.model_fields_set:
        limit = extra.max_new_tokens
    if limit == 0:
        raise invalid_params("max_tokens is 0: nothing would be generated; allowed: 1 or more", "max_tokens")
    merged = merge_extra_configs(body, extra, service.tokenizer)
    params = sampling_params(
        merged,
        service,
        stop_words,
        prompts[0],
        max_tokens=limit,
        temperature=temperature,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=prepared.grammar,
        bad_words=prepared.bad_words,
        prompt_logprobs=body.prompt_logprobs,
    )
    output_format = prepared.output_format
    params = _with_reasoning_budget(params, body, output_format, service)
    generation = make_generation(
        lambda prompt, params: ChatChoice(prompt, params, parser=output_format.parser()),
        service,
        stop_words,
        merged,
        prompts,
        [params],
    )
    visible_ids = frozenset(output_format.special_markers.values())
    generation.text_params = replace(generation.text_params, visible_ids=visible_ids)
    return generation


def _with_reasoning_budget(
    params: SamplingParams, body: ChatRequest, output_format: OutputFormat, service: Service
) -> SamplingParams:
    """Returns the parameters with the request's reasoning budget, if the output can begin with reasoning."""
    budget = body.thinking_budget if body.thinking_budget is not None else body.thinking_token_budget
    markers = output_format.reasoning
    if budget is None or markers is None:
        return params
    start = () if markers.state == "inside" else service.tokenizer.encode(markers.open, add_special_tokens=False)
    end = service.tokenizer.encode(markers.close, add_special_tokens=False)
    return replace(params, reasoning_budget=budget, reasoning_start=tuple(start), reasoning_end=tuple(end))
