"""Schemas of /v1/messages and /v1/messages/count_tokens."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rtp_llm.api.schema import MAX_ITEMS, Finite, RequestBody, Stops


class Block(BaseModel):
    """An entry of a message's `content`, such as text, a tool call or the result of one. `type` determines which of the
    fields are used.
    """

    model_config = ConfigDict(extra="ignore")

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | Blocks | None" = None
    is_error: bool | None = None
    signature: Any = None  # of thinking, which this server does not check
    cache_control: Any = None  # this server caches every prefix


Blocks = Annotated[list[Block], Field(fail_fast=True, max_length=MAX_ITEMS)]


class Message(RequestBody):
    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class Tool(RequestBody):
    """A tool of the client. A `type` other than "custom" means a tool that Anthropic runs or defines."""

    type: str | None = None
    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(RequestBody):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(RequestBody):
    type: str  # "disabled", or any of the ways to enable it
    budget_tokens: int | None = Field(None, ge=1, lt=2**31)


class JsonFormat(RequestBody):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestBody):
    effort: str | None = None
    format: JsonFormat | None = None


class CountTokensRequest(RequestBody):
    """Body of POST /v1/messages/count_tokens: the fields from which the prompt is rendered."""

    model: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, max_length=MAX_ITEMS)] = Field(min_length=1)
    system: str | Blocks | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_ITEMS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None  # the name of output_config.format while it was in beta
    chat_template_kwargs: dict[str, Any] | None = None  # not Anthropic's; as in the other chat APIs


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(ge=1, lt=2**31)
    stream: bool | None = None
    stop_sequences: Stops | None = None
    temperature: Finite | None = Field(None, ge=0, le=2)
    top_p: Finite | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
