"""Defines all settings: name, type, default and description of every variable.

Field `tp_size` of `Config` is the variable TP_SIZE and the flag --tp_size. A flag overrides the environment, which
overrides the default. Variables of alibaba/rtp-llm that this server does not use are in `upstream_variables.json`:
most are ignored with a log line, some are rejected if their value is not the default.
"""

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from rtp_llm import files
from rtp_llm.errors import ConfigError

MAX_RANKS = 4096  # detects a typo in a size at once, instead of by a timeout of the rendezvous
MAX_START_PORT = 65000
MIN_START_PORT = 1024 + 11  # part 0 also uses the 11 ports below its START_PORT


@dataclass(frozen=True)
class SharedMark:
    """Marks a field of `Config` that must be equal on all parts, because ranks with different values would fail or
    hang.

    The rendezvous and the doctor compare the marked fields.
    """


T = TypeVar("T")
TaskType = Literal["LANGUAGE_MODEL", "DENSE_EMBEDDING", "RERANKER"]
Shared = Annotated[T, SharedMark()]


def _normalize(value: str) -> str:
    """Returns the value in upper case; that of "none" is empty."""
    return "" if value.lower() == "none" else value.upper()


class Config(BaseModel):
    """Settings of one part, each validated alone. `parallel.plan.make_plan` checks that they are consistent with each
    other, and derives the ranks, addresses and ports of the gang from them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Parallelism and gang
    tp_size: int | None = Field(
        None, ge=1, le=MAX_RANKS, description="number of tensor-parallel ranks; default WORLD_SIZE / DP_SIZE"
    )
    dp_size: int = Field(1, ge=1, le=MAX_RANKS, description="number of data-parallel groups; only 1 is supported")
    world_size: int | None = Field(
        None, ge=1, le=MAX_RANKS, description="total number of ranks; default TP_SIZE x DP_SIZE"
    )
    local_world_size: int | None = Field(
        None,
        ge=1,
        le=MAX_RANKS,
        description="number of ranks in this part; default min(GPUs, WORLD_SIZE), or WORLD_SIZE without GPUs",
    )
    world_rank: int | None = Field(None, ge=0, description="first rank of this part: part number x LOCAL_WORLD_SIZE")
    world_index: int | None = Field(None, ge=0, description="number of this part, from 0; an alternative to WORLD_RANK")
    tp_rank: int | None = Field(None, ge=0, description="may stay unset; if set, it must equal WORLD_RANK % TP_SIZE")
    distribute_config_file: str = Field(
        "", description="path of the member list, a JSON file with name, ip and port of each part"
    )
    gang_config_string: str = Field("", description="the member list as text: name:x_part0,ip:…,port:…;name:x_part1,…")
    json_gang_parts: str = Field("", description="the member list as JSON text")
    leader_address: str = Field("", description="address of part 0 if there is no member list (LeaderWorkerSet)")
    zone_name: str = Field("", description="use only members of this zone: those whose name is …_zone_partN")
    gang_timeout_min: float = Field(30, gt=0, description="minutes to wait at start until all parts have joined")
    gang_sleep_time: float = Field(
        10, gt=0, description="maximum seconds between log lines while this part waits for other parts"
    )
    dist_comm_timeout: Shared[float] = Field(
        300, gt=0, description="seconds without progress after which a collective operation fails"
    )
    heartbeat_timeout: float = Field(
        8, ge=2, description="seconds without a heartbeat after which a rank counts as lost"
    )

    hang_seconds: float = Field(
        10,
        gt=0,
        description="seconds without progress in a step after which a rank is killed; more if its steps are slow",
    )
    rtp_recovery: Literal["reform", "restart"] = Field(
        "reform",
        description="after the loss of a rank: reform keeps the other ranks and their weights, restart restarts all",
    )

    # The service
    start_port: int = Field(10000, ge=MIN_START_PORT, le=MAX_START_PORT, description="HTTP port of this part")
    worker_info_port_num: int = Field(
        9, ge=7, le=1000, description="number of ports reserved per local rank, from START_PORT up"
    )
    concurrency_limit: Shared[int] = Field(
        32, ge=1, description="maximum sequences that run at the same time; more wait in the queue"
    )
    queue_limit: int = Field(256, ge=0, description="maximum sequences in the queue; more are rejected with HTTP 429")
    host: str = Field("", description="IP address on which HTTP listens; default: all addresses, IPv4 and IPv6")
    timeout_keep_alive: int = Field(
        90, ge=1, description="seconds after which an idle HTTP connection is closed; more than a proxy's own timeout"
    )
    shutdown_timeout: int = Field(
        30, ge=-1, description="seconds that accepted requests may take to finish at shutdown; -1 = 600"
    )
    max_body_mb: float = Field(16, gt=0, description="maximum size of an HTTP request body, MiB")
    max_rpc_timeout_ms: int = Field(
        7_200_000, description="timeout in milliseconds of requests that set no timeout_ms; 0 or less = none"
    )
    ttft_timeout_ms: int = Field(
        0, description="milliseconds to the first token of requests that set no ttft_timeout_ms; 0 or less = no limit"
    )
    sse_ping_seconds: float = Field(
        10, ge=0, description="seconds after which a silent event stream sends a comment, for proxies; 0 = never"
    )
    responses_store_mb: int = Field(
        0, ge=0, lt=2**20, description="memory for stored responses of /v1/responses, MiB; 0 = none is stored"
    )
    resume_timeout: float = Field(
        300, gt=0, description="seconds that accepted requests wait for lost ranks to restart; then they fail"
    )
    legacy_http_status: bool = Field(
        False, description="respond to every error with HTTP 500, as upstream rtp-llm does"
    )
    strict_fields: bool = Field(
        False, description="reject requests with unknown fields, instead of ignoring and naming these"
    )
    disable_access_log: bool = Field(False, description="do not log HTTP requests")
    metrics_vllm_aliases: bool = Field(
        False, description="also export the metrics under vLLM's names, for its dashboards"
    )
    restart_limit: int = Field(
        3, ge=0, description="maximum restarts of the ranks in 10 minutes; when they are used up, the part exits"
    )

    # Access
    api_key: SecretStr = Field(
        SecretStr(""), description="keys that open the API: key or name:key, separated by commas; default: open to all"
    )
    api_key_file: str = Field("", description="path of a file that contains API_KEY, one key or name:key per line")
    admin_key: SecretStr = Field(
        SecretStr(""), description="keys for /doctor and /set_log_level; default API_KEY, without it only this machine"
    )
    admin_key_file: str = Field("", description="path of a file that contains ADMIN_KEY")
    metrics_open: bool = Field(False, description="serve /metrics without a key")
    allowed_origins: str = Field(
        "",
        description="web origins, beside local ones, that may use the API without a key, by commas; * = all",
    )
    allowed_hosts: str = Field(
        "", description="host names under which this server is reached, separated by commas; * = all names"
    )
    ssl_certfile: str = Field("", description="path of the TLS certificate chain (PEM); makes START_PORT serve HTTPS")
    ssl_keyfile: str = Field("", description="path of the certificate's private key (PEM, without a passphrase)")

    # The model
    model_type: str = Field("", description="model family; default: detected from config.json")
    checkpoint_path: str = Field("", description="folder with config.json and *.safetensors")
    tokenizer_path: str = Field("", description="folder with tokenizer.json; default CHECKPOINT_PATH")
    served_model_name: str = Field(
        "", description="model names, by commas, of which the first is in responses; default: the checkpoint's name"
    )
    strict_model_name: bool = Field(False, description="reject requests for other models with HTTP 404")
    generation_config: Literal["auto", "none"] = Field(
        "auto", description="auto: sampling defaults from the checkpoint's generation_config.json; none: not from there"
    )
    generation_config_path: str = Field(
        "", description="path of another generation_config.json, or of its folder, for the sampling defaults"
    )
    task_type: Shared[Literal["", TaskType]] = Field(
        "",
        description="what is served: LANGUAGE_MODEL, DENSE_EMBEDDING or RERANKER; default: embeddings if the checkpoint"
        " has sentence-transformers' modules.json, else a language model",
    )
    embedding_model: Shared[bool] = Field(False, description="upstream's older spelling of TASK_TYPE=DENSE_EMBEDDING")
    act_type: Literal["", "fp32", "bf16", "fp16"] = Field(
        "", description="data type of the computation; default: the checkpoint's"
    )
    quantization: Shared[Annotated[Literal["", "INT8", "W8A8", "INT4"], BeforeValidator(_normalize)]] = Field(
        "",
        description="quantize 16- or 32-bit weights at load, on CPU: INT8 = 8 bits per weight; W8A8 = 8 bits per weight"
        " and activation; INT4 = 4 bits per weight, a scale for 32 of them",
    )
    int8_mode: Shared[bool] = Field(False, description="upstream's older spelling of QUANTIZATION=INT8")
    weight_type: Shared[Annotated[Literal["", "INT8"], BeforeValidator(_normalize)]] = Field(
        "", description="upstream's other spelling of QUANTIZATION=INT8"
    )
    max_seq_len: Shared[int] = Field(
        0, ge=0, description="maximum tokens of prompt + output; 0 = the checkpoint's maximum"
    )
    json_model_override_args: Shared[str] = Field("", description="JSON object that overrides keys of config.json")
    hack_layer_num: Shared[int] = Field(
        0, ge=0, description="run only the first N decoder layers, for benchmarks; 0 = all"
    )
    stop_words_str: str = Field("", description="JSON list of additional stop strings")
    stop_words_list: str = Field("", description="JSON list of additional stop sequences, each a list of token ids")
    force_stop_words: bool = Field(
        False, description="stop only at STOP_WORDS_STR and STOP_WORDS_LIST, not at the model's EOS tokens"
    )
    model_template_type: str = Field(
        "", description="name of a built-in chat template, or path of a .jinja file; default: the checkpoint's"
    )
    default_chat_template_key: str = Field("default", description="name of the tokenizer's chat template to use")
    default_tool_use_template_key: str = Field(
        "tool_use", description="name of the tokenizer's chat template to use for requests with tools"
    )

    tool_call_parser: str = Field(
        "", description="hermes, llama3_json, mistral, pythonic or qwen3_coder; default: the chat template's"
    )
    reasoning_parser: str = Field("", description="deepseek_r1, mistral, qwen3 or none; default: the chat template's")

    # Memory and batches
    reuse_cache: Shared[bool] = Field(True, description="prefix caching: reuse the KV cache of equal prompt prefixes")
    seq_size_per_block: Shared[int] = Field(0, ge=0, le=1024, description="tokens per KV block; 0 = 16")
    kv_cache_mem_mb: Shared[int] = Field(
        -1, ge=-1, description="MiB of KV cache per rank; -1 or 0 = computed from the free memory"
    )
    test_block_num: Shared[int] = Field(
        0, ge=0, description="exact number of KV blocks, for tests; 0 = computed from the KV cache's memory"
    )
    reserver_runtime_mem_mb: Shared[int] = Field(
        1024, ge=0, description="MiB of free memory per rank that a KV cache of computed size leaves unused"
    )
    max_batch_size: Shared[int] = Field(0, ge=0, description="maximum sequences per step; 0 = CONCURRENCY_LIMIT")
    max_batch_tokens_size: Shared[int] = Field(
        0, ge=0, description="maximum tokens per step; 0 = 512 on CPU, 8192 on a GPU"
    )
    max_context_batch_size: Shared[int] = Field(
        0, ge=0, description="maximum sequences whose prompts are computed in one step; 0 = no limit"
    )
    itl_budget_ms: float = Field(
        0,
        ge=0,
        description="milliseconds that a step with decodes may take, with smaller chunks of the prompts beside them;"
        " 0 = about streams / output tokens per second",
    )
    rtp_pipeline_depth: Shared[int] = Field(
        0, ge=0, le=1, description="steps that are scheduled before the result of the last one is known"
    )
    enable_cuda_graph: Shared[bool] = Field(True, description="on a GPU, capture and replay steps of decodes")
    warm_up: Shared[bool] = Field(True, description="run one step of the maximum size before serving")

    # Logging and runtime
    log_level: Literal["DEBUG", "INFO", "WARN", "WARNING", "ERROR"] = Field("INFO", description="minimum log level")
    log_format: Literal["text", "json"] = Field("text", description="plain text, or one JSON object per line")
    aux_string: str = Field("", description="text that responses of the native API contain as aux_info.aux_string")
    rtp_run_dir: str = Field("", description="folder for sockets and state; default: a new temporary folder")
    rtp_device: Literal["", "cpu", "cuda"] = Field("", description="cpu or cuda; default: cuda if a GPU is visible")
    rtp_threads: int = Field(0, ge=0, description="CPU threads per rank; 0 = usable cores / LOCAL_WORLD_SIZE")
    rtp_cpu_kernels: str = Field(
        "auto", description="kernels on CPU: auto = the fastest level of this CPU; off = torch; or a level: avx2, …"
    )

    # The doctor
    rtp_doctor: Literal["enforce", "warn", "off"] = Field(
        "enforce",
        description="checks before the start: enforce prevents a start with errors, warn only logs them, off runs none",
    )
    gang_secret: SecretStr = Field(
        SecretStr(""), description="secret with which the doctors of the parts sign their messages"
    )
    gang_secret_file: str = Field("", description="path of a file that contains GANG_SECRET")

    @property
    def served_model_names(self) -> tuple[str, ...]:
        """Returns the names under which the API serves the model: those in SERVED_MODEL_NAME. If it is empty, returns
        the name of the checkpoint's folder, or for a snapshot in the Hugging Face cache
        (…/models--org--name/snapshots/<commit>), org/name.
        """
        names = tuple(name.strip() for name in self.served_model_name.split(",") if name.strip())
        folder = Path(self.checkpoint_path).resolve()
        if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
            return names or (folder.parents[1].name.removeprefix("models--").replace("--", "/", 1),)
        return names or (folder.name.lstrip("."),)

    @property
    def max_sequences(self) -> int:
        """Returns the maximum number of sequences in one step of the engine."""
        return self.max_batch_size or self.concurrency_limit

    @property
    def weight_quantization(self) -> str:
        """Returns how weights are quantized at load, as a value of QUANTIZATION; "" if they are not."""
        return self.quantization or ("INT8" if self.int8_mode or self.weight_type else "")

    @property
    def drain_seconds(self) -> int:
        """Returns for how many seconds accepted requests may continue after SIGTERM: SHUTDOWN_TIMEOUT, or 600 if that
        is -1 (which means no limit in alibaba/rtp-llm), so that every stop ends.
        """
        return 600 if self.shutdown_timeout < 0 else self.shutdown_timeout

    def shared(self) -> dict[str, Any]:
        """Returns the settings that must be equal on all parts, as {variable: value}.

        Converts integers in float fields (300 to 300.0), because a Config that was read from JSON has floats there:
        values that differ only in this would be reported as a difference between parts.
        """
        fields = {name: f for name, f in type(self).model_fields.items() if SharedMark() in f.metadata}
        values = {name: getattr(self, name) for name in fields}
        return {
            name.upper(): float(value) if isinstance(value, int) and fields[name].annotation is float else value
            for name, value in values.items()
        }


# Passed to the processes of a part by the environment only: in no file, no command line, no log.
SECRET_FIELDS = tuple(name for name, field in Config.model_fields.items() if field.annotation is SecretStr)


# If these are unset, more clients have access. Names in one group have the same effect.
ACCESS_SETTINGS = (
    ("API_KEY", "API_KEY_FILE"),
    ("ADMIN_KEY", "ADMIN_KEY_FILE"),
    ("GANG_SECRET", "GANG_SECRET_FILE"),
    ("SSL_CERTFILE",),
    ("SSL_KEYFILE",),
)


@dataclass(frozen=True)
class UpstreamVariable:
    """A variable of alibaba/rtp-llm that this server does not use.

    `refuse`: reason why values other than the default are rejected; empty if the variable is ignored.
    """

    name: str
    flag: str
    default: str
    refuse: str = ""


@dataclass(frozen=True)
class LoadedConfig:
    """A valid configuration. `notes` are messages about it to log at INFO, `warnings` at WARNING."""

    config: Config
    notes: tuple[str, ...]
    misspelled: tuple[tuple[str, str], ...]  # (name in the environment, similar known name)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"{name} is not a variable of this server: did you mean {meant}?" for name, meant in self.misspelled
        )

    def check_access(self) -> None:
        """Raises ConfigError if a variable is probably a typo of a security setting that is not set, such as API_KYE
        for API_KEY: without that setting, the server would be open to all clients.
        """
        names = {name: meant for name, meant in self.misspelled if opens_access(self.config, meant)}
        if names:
            lines = [
                f"{name} is not a variable of this server, which would be open without {meant}; allowed: set {meant},"
                f" or unset {name}"
                for name, meant in names.items()
            ]
            raise ConfigError("\n".join(lines), check="M-13", names=tuple(names))


def load(argv: Sequence[str], environ: Mapping[str, str]) -> LoadedConfig:
    """Returns the settings from flags and environment. Raises ConfigError that lists all invalid values and, for each,
    the allowed ones.
    """
    upstream = upstream_variables()
    values = {name: value for name, value in environ.items() if value != ""} | _parse_flags(argv, upstream)
    names = {name.upper() for name in Config.model_fields}
    config = _validate({name.lower(): values[name] for name in names & values.keys()})
    unused = {name: values[name] for name in values.keys() & upstream.keys()}
    _refuse_unsupported(unused, upstream)
    # Logs the names without values, because some upstream variables hold credentials.
    notes = ["upstream variables without effect in this server: " + ", ".join(sorted(unused))] if unused else []
    if unused.keys() & {"LOG_DIR", "LOG_PATH"}:
        notes.append("all logs go to stdout, where the container engine keeps them; no file is written")
    return LoadedConfig(config, tuple(notes), tuple(_find_misspelled(values, names | upstream.keys())))


def secret(config: Config, name: str = "gang_secret") -> bytes:
    """Returns the value of the secret setting `name`, or the content of the file that the setting `<name>_file` (such
    as GANG_SECRET_FILE) names, if that is set. Strips whitespace at both ends; empty if neither is set.

    Raises ConfigError if the file cannot be read.
    """
    path: str = getattr(config, f"{name}_file")
    if not path:
        value: SecretStr = getattr(config, name)
        return value.get_secret_value().strip().encode()
    try:
        return files.read(Path(path)).strip()
    except OSError as error:
        message = f"{name.upper()}_FILE={path}: cannot be read: {error.strerror}"
        raise ConfigError(message, check="M-14") from None


def opens_access(config: Config, meant: str) -> bool:
    """Returns whether a typo in the name of the setting `meant` lets more clients in: `meant` is a security setting,
    and neither it nor one with the same effect (API_KEY and API_KEY_FILE) is set.
    """
    same_effect = next((names for names in ACCESS_SETTINGS if meant in names), ())
    return bool(same_effect) and not any(getattr(config, name.lower()) for name in same_effect)


def upstream_variables() -> dict[str, UpstreamVariable]:
    """Returns the variables of alibaba/rtp-llm that this server does not use, by name."""
    table = json.loads(package("rtp_llm").joinpath("upstream_variables.json").read_text())
    return {name: UpstreamVariable(name=name, **entry) for name, entry in table.items()}


def foreign_variables() -> set[str]:
    """Returns the names of environment variables of other programs (torchrun, LeaderWorkerSet, Hugging Face …) that
    resemble settings of this server, so that `load` does not report them as typos.
    """
    table = json.loads(package("rtp_llm").joinpath("foreign_variables.json").read_text())
    return {name for names in table.values() for name in names}


def allowed(field: FieldInfo) -> str:
    """Returns a description of the values that a setting allows, for error messages: "an integer of 1 or more"."""
    annotation = str(field.annotation)
    if "Literal" in annotation:
        return "one of " + ", ".join(v for v in field.annotation.__args__ if v)  # type: ignore[union-attr]
    if "bool" in annotation:
        return "1/0, true/false, yes/no or on/off"
    if "str" in annotation:
        return "text"
    number = "a number" if "float" in annotation else "an integer"
    minimum, maximum, above = (_bound(field, name) for name in ("ge", "le", "gt"))
    if minimum is not None and maximum is not None:
        return f"{number} from {minimum} to {maximum}"
    if minimum is not None:
        return f"{number} of {minimum} or more"
    return f"{number} above {above}" if above is not None else number


def table_markdown() -> str:
    """Returns the README's table of settings."""
    rows = ["| Variable | Default | Meaning |", "| --- | --- | --- |"]
    for name, field in Config.model_fields.items():
        default = "" if field.default in ("", None) else str(field.default)
        rows.append(f"| `{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


def _bound(field: FieldInfo, name: str) -> Any:
    return next((getattr(m, name) for m in field.metadata if hasattr(m, name)), None)


class _ConfigParser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError instead of printing its usage and exiting with 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}", check="M-14")


def _parse_flags(argv: Sequence[str], upstream: Mapping[str, UpstreamVariable]) -> dict[str, str]:
    parser = _ConfigParser(prog="rtp_llm.start_server", allow_abbrev=False)
    for name, field in Config.model_fields.items():
        default = "" if field.default in ("", None) else f" (default {field.default})"
        parser.add_argument(f"--{name}", metavar="X", help=f"{field.description}{default}".replace("%", "%%"))
    for variable in upstream.values():
        parser.add_argument(f"--{variable.flag}", dest=variable.name.lower(), help=argparse.SUPPRESS)
    args, unknown = parser.parse_known_args(list(argv))
    exposed = [field for field in SECRET_FIELDS if getattr(args, field) is not None]
    if exposed:
        fixes = "; ".join(f"set {field.upper()} or {field.upper()}_FILE instead of --{field}" for field in exposed)
        raise ConfigError(
            f"command line: it contains a secret, which all users of this machine can read there; {fixes}",
            check="M-14",
        )
    unknown = [argument for argument in unknown if argument.startswith("-")] or unknown
    if unknown:
        names = [f"--{n}" for n in Config.model_fields] + [f"--{v.flag}" for v in upstream.values()]
        lines = [f"command line: unknown argument {a!r}{_suggest(a, names)}" for a in unknown]
        raise ConfigError("\n".join(lines), check="M-14")
    return {name.upper(): value for name, value in vars(args).items() if value is not None}


def _validate(values: dict[str, str]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        names = [str(e["loc"][0]) for e in error.errors()]
        text = "\n".join(_describe_error(name, values) for name in names)
        raise ConfigError(text, check="M-14", names=tuple(name.upper() for name in names)) from None


def _describe_error(name: str, values: Mapping[str, str]) -> str:
    value = values[name]
    text = f"{name.upper()}={value!r}: not valid; allowed: {allowed(Config.model_fields[name])}"
    if value.startswith(("tcp://", "udp://")):
        text += (
            ". This looks like a variable that Kubernetes sets for a Service whose name ends in 'start':"
            " set enableServiceLinks: false in the pod spec, or rename the Service"
        )
    return text


def _refuse_unsupported(values: Mapping[str, str], upstream: Mapping[str, UpstreamVariable]) -> None:
    errors = {
        name: f"{name}={value!r}: {upstream[name].refuse}; allowed: {upstream[name].default or 'leave it unset'}"
        for name, value in sorted(values.items())
        if upstream[name].refuse and not _equals_default(value, upstream[name].default)
    }
    if errors:
        raise ConfigError("\n".join(errors.values()), check="M-14", names=tuple(errors))


def _equals_default(value: str, default: str) -> bool:
    """Returns whether the value equals the default. `0`, `False` and `off` count as equal."""
    falsy = {"0", "false", "no", "off", "f", "n", "", "{}", "none", "disabled"}
    return value.lower() == default.lower() or (value.lower() in falsy and default.lower() in falsy)


def _find_misspelled(values: Mapping[str, str], known_names: set[str] | frozenset[str]) -> list[tuple[str, str]]:
    """Returns (name, known name) of variables that are probably typos, such as `TP_SZIE` or `CHECKPOINTPATH`."""
    misspelled = []
    for name in sorted(values.keys() - known_names - foreign_variables()):
        if len(name) < 5 or name != name.upper():
            continue
        matches = difflib.get_close_matches(name, known_names, n=1, cutoff=0.85)
        if matches:
            misspelled.append((name, matches[0]))
    return misspelled


def _suggest(argument: str, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(argument.split("=")[0], names, n=1, cutoff=0.6)
    return f": did you mean {matches[0]}?" if matches else ""
