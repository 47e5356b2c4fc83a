"""Schema of POST /v1/responses."""

from typing import Annotated, Any, Literal

from pydantic import Field

from rtp_llm.api.schema import MAX_ITEMS, Count, Finite, RequestBody, Text

Effort = Annotated[str, Field(max_length=32)]


class Part(RequestBody):
    """A content part of a message: `input_text`, `output_text`, `text`, `reasoning_text`, `summary_text`, `refusal`."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None  # of an answer, as the server has sent it
    logprobs: Any = None


Parts = Annotated[list[Part], Field(fail_fast=True, max_length=MAX_ITEMS)]


class InputItem(RequestBody):
    """A message, a tool call, the output of a tool, or reasoning. `type` determines which fields are used."""

    type: str = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Parts | None = None
    summary: Parts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None  # of a call of a custom tool
    output: str | Parts | None = None


class Tool(RequestBody):
    """A function, or a tool of another type, which this server cannot run."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(RequestBody):
    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


class TextFormat(RequestBody):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(RequestBody):
    format: TextFormat | None = None


class Reasoning(RequestBody):
    effort: Effort | None = None


class ResponsesRequest(RequestBody):
    """Body of POST /v1/responses."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: Finite | None = Field(None, ge=0, le=100)
    top_p: Finite | None = Field(None, ge=0, le=1)
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_ITEMS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = Field(None, max_length=64)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: Text | None = None
    conversation: Any = None
    prompt: Any = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    seed: Count | None = None  # not OpenAI's; as in its other APIs
    chat_template_kwargs: dict[str, Any] | None = None  # not OpenAI's
