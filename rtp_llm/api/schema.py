"""Schemas of request bodies: the fields that have an effect. `api.fields` handles all other fields."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from rtp_llm.api.constraints import StructuredOutputFields
from rtp_llm.api.fields import REFUSALS, Refusal


def _none_if_minus_one(value: Any) -> Any:
    return None if value == -1 and not isinstance(value, bool) else value


def _none_if_empty(value: Any) -> Any:
    return None if value in ("", [], [""]) else value


Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]  # strict: true is no number
Count = Annotated[int, Field(ge=0, lt=2**31)]
# Other servers' spellings of "not set": a limit or a seed of -1, an empty stop string.
MaxTokens = Annotated[Count | None, BeforeValidator(_none_if_minus_one)]
Seed = Annotated[Annotated[int, Field(ge=-(2**63), lt=2**64)] | None, BeforeValidator(_none_if_minus_one)]
Text = Annotated[str, Field(min_length=1)]
MAX_STOPS = 64  # stop strings per request, each of which is searched for after every token
MAX_BIASES = 4096
MAX_WORDS = 1024  # that must not occur
MAX_STOP_IDS = 4096  # in a list
MAX_ITEMS = 65536  # prompts of a batch, messages of a chat


def _limit_biases(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError("too_long", f"at most {MAX_BIASES} token ids may have a bias")
    return value


# fail_fast and `_limit_biases` limit the number of validation errors: a body can have millions of invalid items, and
# collecting an error for each would block the event loop for a minute.
Texts = Annotated[list[str], Field(fail_fast=True, max_length=MAX_ITEMS)]
Ids = Annotated[list[TokenId], Field(fail_fast=True)]
StopIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_IDS)]
AllowedIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_ITEMS)]
Words = Annotated[list[Text], Field(fail_fast=True, max_length=MAX_WORDS)]
Stops = Annotated[list[Text], Field(fail_fast=True, max_length=MAX_STOPS)]
Tools = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_ITEMS)]
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100, strict=True)]], BeforeValidator(_limit_biases)]
Stop = Annotated[Text | Stops | None, BeforeValidator(_none_if_empty)]


class RequestBody(BaseModel):
    """Base class of request bodies and of the objects in them. Drops unknown fields; `api.fields` rejects some of them
    before.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(RequestBody):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerateConfig(StructuredOutputFields, RequestBody):
    """The supported fields of alibaba/rtp-llm's `generate_config` (config/generate_config.py there)."""

    refusals: ClassVar[Mapping[str, Refusal]] = REFUSALS
    max_new_tokens: MaxTokens = Field(None, description="-1: not set; default 32000")
    min_new_tokens: Count = 0
    do_sample: bool = True
    top_k: int = Field(0, lt=2**31, description="0 or less: no limit")
    top_p: Finite = Field(1.0, ge=0, le=1, description="0: no limit")
    min_p: Finite = Field(0.0, ge=0, le=1)
    temperature: Finite = Field(1.0, ge=0)
    repetition_penalty: Finite = Field(1.0, ge=0.01, le=100)
    presence_penalty: Finite = Field(0.0, ge=-100, le=100)
    frequency_penalty: Finite = Field(0.0, ge=-100, le=100)
    random_seed: Seed = None
    num_return_sequences: int = Field(0, ge=0, le=128)
    stop_words_str: Stops = Field(default_factory=list)
    stop_words_list: list[StopIds] = Field(default_factory=list, fail_fast=True, max_length=MAX_STOPS)
    print_stop_words: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_input_ids: bool = False
    return_output_ids: bool = False
    return_incremental: bool = False
    yield_generator: bool = False
    is_streaming: bool = False
    return_cum_log_probs: bool = False
    return_softmax_probs: bool = False
    timeout_ms: int = Field(-1, lt=2**31)
    ttft_timeout_ms: int = Field(-1, lt=2**31)
    aux_info: bool = True


class OpenAIRequest(StructuredOutputFields, RequestBody):
    """Fields that the bodies of /v1/chat/completions and /v1/completions share. The fields after `user` are not
    OpenAI's, but common in other servers.
    """

    model: str | None = None
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop = None
    seed: Seed = Field(None, description="-1: random")
    temperature: Finite | None = Field(None, ge=0, le=100)
    top_p: Finite | None = Field(None, ge=0, le=1, description="0: greedy")
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    logit_bias: Biases | None = None
    user: str | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 or -1: no limit")
    min_p: Finite | None = Field(None, ge=0, le=1)
    repetition_penalty: Finite | None = Field(None, ge=0.01, le=100)
    allowed_token_ids: AllowedIds | None = Field(
        None, description="no other token is sampled, those that stop included"
    )
    bad_words: Words | None = Field(
        None, description="the last token of each, written with a space before it or without, cannot follow its others"
    )
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, lt=2**31, description="of each prompt, so many of its last tokens are read; -1: what fits; 0: all"
    )
    min_tokens: Count | None = Field(None, description="before so many tokens, none that stops is sampled")
    ignore_eos: bool | None = None
    stop_token_ids: StopIds | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20, description="not in a stream")
    timeout_ms: int | None = Field(None, lt=2**31, description="milliseconds; default MAX_RPC_TIMEOUT_MS")
    ttft_timeout_ms: int | None = Field(
        None, lt=2**31, description="milliseconds to the first token; default TTFT_TIMEOUT_MS"
    )


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One turn of a chat. Further fields are passed to the chat template unchanged."""

    model_config = ConfigDict(extra="allow")
    nullable_fields: ClassVar[frozenset[str]] = frozenset({"content"})  # templates tell null from absent

    role: Literal["system", "developer", "user", "assistant", "tool", "function", "observation"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_ITEMS)] | None = None
    name: str | None = None


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, max_length=MAX_ITEMS)]


class PromptOptions(RequestBody):
    """Fields that say how chat messages become a prompt, in all bodies with messages. `allow_special_tokens`: control
    tokens that the messages spell, such as <|im_start|>, have their effect; otherwise they are plain text.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    allow_special_tokens: bool | None = None
    enable_thinking: bool | None = None
    thinking: dict[str, Any] | bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_ITEMS)] | None = None


class ChatRequest(OpenAIRequest, PromptOptions):
    """Body of POST /v1/chat/completions."""

    messages: Messages = Field(min_length=1)
    max_tokens: MaxTokens = Field(None, description="-1: not set; default: up to MAX_SEQ_LEN")
    max_completion_tokens: MaxTokens = Field(None, description="goes before max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="with logprobs only")
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    thinking_budget: Count | None = Field(None, description="tokens of reasoning, after which it is ended")
    thinking_token_budget: Count | None = Field(None, description="vLLM's name of thinking_budget")
    extra_configs: GenerateConfig | None = Field(None, description="goes before the fields beside it")
    aux_info: bool = False
    debug_info: bool = False


Prompt = str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_ITEMS)]


class CompletionRequest(OpenAIRequest):
    """Body of POST /v1/completions."""

    prompt: Prompt
    max_tokens: MaxTokens = Field(None, description="-1: not set; default 16")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)
    suffix: str | None = None


class NativeRequest(BaseModel):
    """Body of POST /. Fields of generate_config may also be set at the top level, which takes precedence."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    prompt: str | Texts | None = None
    text: str | Texts | None = None
    prompt_batch: Texts | None = None
    messages: Messages | None = None
    urls: list[Any] | None = None
    images: list[Any] | None = None
    generate_config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    yield_generator: bool = False
    stream: bool = False


class BatchInferRequest(BaseModel):
    """Body of POST /batch_infer. Fields of generate_config may also be set at the top level, which takes precedence."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    prompt_batch: Texts = Field(min_length=1)
    generate_config: dict[str, Any] | None = None


class TokenizeRequest(PromptOptions):
    """Body of POST /tokenize: a prompt or chat messages. Fields that constrain the output have no effect."""

    refusals: ClassVar[Mapping[str, Refusal]] = {"chat_template": REFUSALS["chat_template"]}
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(RequestBody):
    """Body of POST /detokenize."""

    tokens: Ids


class EncodeRequest(RequestBody):
    """Body of POST /tokenizer/encode."""

    prompt: str
    return_offsets_mapping: bool = False


class LogLevelRequest(RequestBody):
    """Body of POST /set_log_level."""

    log_level: Literal["DEBUG", "INFO", "WARN", "WARNING", "ERROR"]
