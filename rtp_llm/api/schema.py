"""Schemas of request bodies. Known fields are validated, unknown ones ignored, as in OpenAI's API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
MAX_STOPS = 64  # stop strings per request, each of which is searched for after every token
MAX_BIASES = 4096
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
Stops = Annotated[list[Text], Field(fail_fast=True, max_length=MAX_STOPS)]
Tools = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_ITEMS)]
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_limit_biases)]


# Whether the field is set: its value, which can be large, is not kept.
Unsupported = Annotated[bool, BeforeValidator(bool)]


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class StreamOptions(RequestBody):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerateConfig(RequestBody):
    """Native `generate_config` (alibaba/rtp-llm, config/generate_config.py): the supported fields and those that are
    rejected if set.
    """

    max_new_tokens: int = Field(32000, ge=0, lt=2**31)
    min_new_tokens: int = Field(0, ge=0, lt=2**31)
    do_sample: bool = True
    top_k: int = Field(0, lt=2**31)
    top_p: Finite = Field(1.0, ge=0, le=1)
    min_p: Finite = Field(0.0, ge=0, le=1)
    temperature: Finite = Field(1.0, ge=0)
    repetition_penalty: Finite = Field(1.0, ge=0.01, le=100)
    presence_penalty: Finite = Field(0.0, ge=-100, le=100)
    frequency_penalty: Finite = Field(0.0, ge=-100, le=100)
    random_seed: Seed | None = None
    num_beams: int = 1
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
    # Unsupported: a value other than the default is rejected.
    adapter_name: Unsupported = False
    bad_words_list: Unsupported = False
    calculate_loss: Unsupported = False
    no_repeat_ngram_size: Unsupported = False
    return_all_probs: Unsupported = False
    return_hidden_states: Unsupported = False
    return_all_hidden_states: Unsupported = False
    return_logits: Unsupported = False
    select_tokens_str: Unsupported = False
    select_tokens_id: Unsupported = False
    variable_num_beams: Unsupported = False
    json_schema: Unsupported = False
    regex: Unsupported = False
    ebnf: Unsupported = False
    structural_tag: Unsupported = False


NATIVE_UNSUPPORTED = (
    *("adapter_name", "bad_words_list", "calculate_loss", "no_repeat_ngram_size", "return_all_probs"),
    *("return_hidden_states", "return_all_hidden_states", "return_logits", "select_tokens_str", "select_tokens_id"),
    *("variable_num_beams", "json_schema", "regex", "ebnf", "structural_tag"),
)


class OpenAIRequest(RequestBody):
    """Fields that the bodies of /v1/chat/completions and /v1/completions share. The fields after `user` are not
    OpenAI's, but common in other servers."""

    model: str | None = None
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Stops | None = None
    seed: Seed | None = None
    temperature: Finite | None = Field(None, ge=0, le=100)
    top_p: Finite | None = Field(None, ge=0, le=1)
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    logit_bias: Biases | None = None
    user: str | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: Finite | None = Field(None, ge=0, le=1)
    repetition_penalty: Finite | None = Field(None, ge=0.01, le=100)
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopIds | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    timeout_ms: int | None = Field(None, lt=2**31)
    ttft_timeout_ms: int | None = Field(None, lt=2**31)


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One turn of a chat. Further fields are passed to the chat template unchanged."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function", "observation"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_ITEMS)] | None = None
    name: str | None = None


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, max_length=MAX_ITEMS)]


class ChatRequest(OpenAIRequest):
    """Body of POST /v1/chat/completions."""

    messages: Messages = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    extra_configs: GenerateConfig | None = None
    aux_info: bool = False
    debug_info: bool = False


Prompt = str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_ITEMS)]


class CompletionRequest(OpenAIRequest):
    """Body of POST /v1/completions."""

    prompt: Prompt
    max_tokens: Count | None = 16
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
    """Body of POST /batch_infer."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    prompt_batch: Texts = Field(min_length=1)
    generate_config: dict[str, Any] | None = None


class TokenizeRequest(RequestBody):
    """Body of POST /tokenize: a prompt or chat messages."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True


class EncodeRequest(RequestBody):
    """Body of POST /tokenizer/encode."""

    prompt: str
    return_offsets_mapping: bool = False


class LogLevelRequest(RequestBody):
    """Body of POST /set_log_level."""

    log_level: Literal["DEBUG", "INFO", "WARN", "WARNING", "ERROR"]
