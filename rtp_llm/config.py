"""The one table of settings: name, type, default and meaning of every variable stand here and nowhere else.

`Config` is that table: field `tp_size` is the variable TP_SIZE and the flag --tp_size. A flag beats the environment,
the environment beats the default. What upstream rtp-llm knows and we do not use stands in `upstream_variables.json`
and is accepted with a log line.
"""

import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as package
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from rtp_llm import files
from rtp_llm.errors import ConfigError

MAX_RANKS = 4096  # a typing slip beyond that would only be found by waiting
MAX_START_PORT = 65000
MIN_START_PORT = 1024 + 11  # part 0 also uses the eleven ports below its START_PORT


class Config(BaseModel):
    """Settings of one part, as given; what follows from several of them together is worked out in `parallel.plan`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Who is who
    tp_size: int | None = Field(
        None, ge=1, le=MAX_RANKS, description="tensor-parallel ranks; default WORLD_SIZE / DP_SIZE"
    )
    dp_size: int = Field(1, ge=1, le=MAX_RANKS, description="data-parallel groups; WORLD_SIZE = TP_SIZE x DP_SIZE")
    world_size: int | None = Field(
        None, ge=1, le=MAX_RANKS, description="ranks of all parts together; default TP_SIZE x DP_SIZE"
    )
    local_world_size: int | None = Field(
        None,
        ge=1,
        le=MAX_RANKS,
        description="ranks of this part; default min(GPUs, WORLD_SIZE), without GPUs WORLD_SIZE",
    )
    world_rank: int | None = Field(None, ge=0, description="first rank of this part: part number x LOCAL_WORLD_SIZE")
    world_index: int | None = Field(None, ge=0, description="part number, in place of WORLD_RANK")
    tp_rank: int | None = Field(None, ge=0, description="checked against WORLD_RANK % TP_SIZE; not needed")
    distribute_config_file: str = Field("", description="JSON file with the members x_part0, x_part1, …")
    gang_config_string: str = Field("", description="the members as name:x_part0,ip:…,port:…;name:x_part1,…")
    json_gang_parts: str = Field("", description="the members as inline JSON")
    leader_address: str = Field("", description="part 0's address where no member list exists (LeaderWorkerSet)")
    zone_name: str = Field("", description="keep only members named <…>_<zone>_part<N>")
    gang_timeout_min: float = Field(30, gt=0, description="minutes to wait for missing parts at start")
    gang_sleep_time: float = Field(10, gt=0, description="seconds between two lines that say who is missing, at most")
    dist_comm_timeout: float = Field(300, gt=0, description="seconds until a collective that makes no progress fails")
    heartbeat_timeout: float = Field(20, ge=2, description="seconds without a heartbeat until a rank counts as lost")

    # The service
    start_port: int = Field(10000, ge=MIN_START_PORT, le=MAX_START_PORT, description="HTTP port of this part")
    worker_info_port_num: int = Field(9, ge=7, le=1000, description="ports reserved per local rank")
    concurrency_limit: int = Field(32, ge=1, description="sequences in the engine at once; more wait in the queue")
    queue_limit: int = Field(256, ge=0, description="requests that may wait; more are answered 429")
    timeout_keep_alive: int = Field(5, ge=1, description="seconds an idle HTTP connection stays open")
    shutdown_timeout: int = Field(30, ge=-1, description="seconds for open streams to end at shutdown (-1 = 600)")
    max_body_mb: float = Field(16, gt=0, description="largest HTTP body, MiB")
    max_rpc_timeout_ms: int = Field(7_200_000, description="deadline of a request without timeout_ms; <= 0 none")
    resume_timeout: float = Field(300, gt=0, description="seconds an accepted request waits for lost ranks to return")
    legacy_http_status: bool = Field(False, description="answer every error with HTTP 500, as upstream does")
    disable_access_log: bool = Field(False, description="no log line per HTTP request")
    metrics_vllm_aliases: bool = Field(False, description="/metrics also has vLLM's names, for dashboards made for it")
    restart_limit: int = Field(3, ge=0, description="restarts of the ranks in 10 minutes before the part gives up")

    # The model
    model_type: str = Field("", description="model family; default: from config.json")
    checkpoint_path: str = Field("", description="folder with config.json and *.safetensors")
    tokenizer_path: str = Field("", description="folder with tokenizer.json; default CHECKPOINT_PATH")
    served_model_name: str = Field("", description="model name in answers; default: the checkpoint's folder name")
    act_type: Literal["", "fp32", "bf16", "fp16"] = Field("", description="compute type; default: the checkpoint's")
    max_seq_len: int = Field(0, ge=0, description="longest prompt + output; 0 = the checkpoint's")
    json_model_override_args: str = Field("", description="JSON object laid over config.json")
    hack_layer_num: int = Field(0, ge=0, description="use only the first N layers (benchmarks)")
    stop_words_str: str = Field("", description="JSON list of further stop strings")
    stop_words_list: str = Field("", description="JSON list of further stop sequences, each a list of token ids")
    force_stop_words: bool = Field(False, description="use only the stop words above, not the model's")
    model_template_type: str = Field("", description="built-in chat template, or path of a .jinja file")
    default_chat_template_key: str = Field("default", description="which of the tokenizer's templates")
    default_tool_use_template_key: str = Field("tool_use", description="which of them when tools are given")

    # Memory and batches
    reuse_cache: bool = Field(True, description="prefix cache")
    seq_size_per_block: int = Field(0, ge=0, le=1024, description="tokens per KV block; 0 = 16")
    kv_cache_mem_mb: int = Field(-1, ge=-1, description="MiB of KV cache per rank; -1 or 0 = measured")
    test_block_num: int = Field(0, ge=0, description="exact number of KV blocks; 0 = measured")
    reserver_runtime_mem_mb: int = Field(1024, ge=0, description="MiB per rank left free beside the KV cache")
    max_batch_size: int = Field(0, ge=0, description="sequences per step; 0 = CONCURRENCY_LIMIT")
    max_batch_tokens_size: int = Field(0, ge=0, description="tokens per step; 0 = 512 on CPU, 8192 on a GPU")
    max_context_batch_size: int = Field(0, ge=0, description="prompts that may be computed in one step; 0 = any")
    warm_up: bool = Field(True, description="run a step of the largest size before serving")

    # This process
    log_level: Literal["DEBUG", "INFO", "WARN", "WARNING", "ERROR"] = Field("INFO", description="least level logged")
    log_format: Literal["text", "json"] = Field("text", description="lines for people, or a JSON object a line")
    aux_string: str = Field("", description="returned as aux_info.aux_string")
    rtp_run_dir: str = Field("", description="folder for sockets and state; default: a fresh temporary one")
    rtp_device: Literal["", "cpu", "cuda"] = Field("", description="cpu or cuda; default: cuda where a GPU is visible")
    rtp_threads: int = Field(0, ge=0, description="CPU threads per rank; 0 = cores / local ranks")

    # The doctor
    rtp_doctor: Literal["enforce", "warn", "off"] = Field(
        "enforce", description="checks before the start: enforce refuses it on errors, warn only logs them"
    )
    gang_secret: SecretStr = Field(SecretStr(""), description="signs what the parts' doctors tell each other")
    gang_secret_file: str = Field("", description="file that holds GANG_SECRET")

    @property
    def max_sequences(self) -> int:
        """Sequences that one step may hold."""
        return self.max_batch_size or self.concurrency_limit

    @property
    def drain_seconds(self) -> int:
        """SHUTDOWN_TIMEOUT in seconds; -1, upstream's "no bound", is ten minutes: nothing here waits for ever."""
        return 600 if self.shutdown_timeout < 0 else self.shutdown_timeout


@dataclass(frozen=True)
class UpstreamVariable:
    """A variable of upstream rtp-llm that this server does not use; `refuse` says why it may not be ignored."""

    name: str
    flag: str
    default: str
    refuse: str = ""


@dataclass(frozen=True)
class LoadedConfig:
    """A valid configuration, and the lines the operator should see about it."""

    config: Config
    notes: tuple[str, ...]
    misspelled: tuple[tuple[str, str], ...]  # (name as given, name that was likely meant)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"{given} is not a variable of this server: did you mean {meant}?" for given, meant in self.misspelled
        )


def load(argv: Sequence[str], environ: Mapping[str, str]) -> LoadedConfig:
    """Reads flags and environment. Raises ConfigError that lists every bad value, each with what is allowed."""
    upstream = upstream_variables()
    given = {name: value for name, value in environ.items() if value != ""} | _flags(argv, upstream)
    own = {name.upper() for name in Config.model_fields}
    config = _validate({name.lower(): given[name] for name in own & given.keys()})
    foreign = {name: given[name] for name in given.keys() & upstream.keys()}
    _refuse(foreign, upstream)
    # Names only: some of upstream's variables hold credentials.
    notes = ("accepted, and not used by this server: " + ", ".join(sorted(foreign)),) if foreign else ()
    return LoadedConfig(config, notes, tuple(_misspelled(given, own | upstream.keys())))


def secret(config: Config) -> bytes:
    """GANG_SECRET, or what GANG_SECRET_FILE holds, without white space at its ends. Raises ConfigError."""
    if not config.gang_secret_file:
        return config.gang_secret.get_secret_value().strip().encode()
    try:
        return files.read(Path(config.gang_secret_file)).strip()
    except OSError as error:
        raise ConfigError(
            f"GANG_SECRET_FILE={config.gang_secret_file}: cannot be read: {error.strerror}", check="M-14"
        ) from None


def upstream_variables() -> dict[str, UpstreamVariable]:
    """Upstream's variables that are accepted without effect, by name."""
    table = json.loads(package("rtp_llm").joinpath("upstream_variables.json").read_text())
    return {name: UpstreamVariable(name=name, **entry) for name, entry in table.items()}


def allowed(field: FieldInfo) -> str:
    """What values a field takes, in words: "an integer of 1 or more"."""
    annotation = str(field.annotation)
    if "Literal" in annotation:
        return "one of " + ", ".join(v for v in field.annotation.__args__ if v)  # type: ignore[union-attr]
    if "bool" in annotation:
        return "1/0, true/false, yes/no or on/off"
    if "str" in annotation:
        return "text"
    kind = "a number" if "float" in annotation else "an integer"
    low, high, above = (_bound(field, name) for name in ("ge", "le", "gt"))
    if low is not None and high is not None:
        return f"{kind} from {low} to {high}"
    if low is not None:
        return f"{kind} of {low} or more"
    return f"{kind} above {above}" if above is not None else kind


def table_markdown() -> str:
    """The README's table of variables."""
    rows = ["| Variable | Default | Meaning |", "| --- | --- | --- |"]
    for name, field in Config.model_fields.items():
        default = "" if field.default in ("", None) else str(field.default)
        rows.append(f"| `{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


def _bound(field: FieldInfo, name: str) -> Any:
    return next((getattr(m, name) for m in field.metadata if hasattr(m, name)), None)


class _ConfigParser(argparse.ArgumentParser):
    """argparse that raises ConfigError in place of printing usage and exiting with 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}", check="M-14")


def _flags(argv: Sequence[str], upstream: Mapping[str, UpstreamVariable]) -> dict[str, str]:
    parser = _ConfigParser(prog="rtp_llm.start_server", allow_abbrev=False)
    for name, field in Config.model_fields.items():
        default = "" if field.default in ("", None) else f" (default {field.default})"
        parser.add_argument(f"--{name}", metavar="X", help=f"{field.description}{default}".replace("%", "%%"))
    for variable in upstream.values():
        parser.add_argument(f"--{variable.flag}", dest=variable.name.lower(), help=argparse.SUPPRESS)
    found, unknown = parser.parse_known_args(list(argv))
    unknown = [u for u in unknown if u.startswith("-")] or unknown
    if unknown:
        names = [f"--{n}" for n in Config.model_fields] + [f"--{v.flag}" for v in upstream.values()]
        lines = [f"command line: unknown argument {u!r}{_suggest(u, names)}" for u in unknown]
        raise ConfigError("\n".join(lines), check="M-14")
    return {name.upper(): value for name, value in vars(found).items() if value is not None}


def _validate(values: dict[str, str]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        names = [str(e["loc"][0]) for e in error.errors()]
        text = "\n".join(_sentence(name, values) for name in names)
        raise ConfigError(text, check="M-14", names=tuple(name.upper() for name in names)) from None


def _sentence(name: str, values: Mapping[str, str]) -> str:
    value = values[name]
    text = f"{name.upper()}={value!r}: not valid; allowed: {allowed(Config.model_fields[name])}"
    if value.startswith(("tcp://", "udp://")):
        text += (
            ". This looks like a variable that Kubernetes sets for a Service whose name ends in 'start':"
            " set enableServiceLinks: false in the pod spec, or rename the Service"
        )
    return text


def _refuse(foreign: Mapping[str, str], upstream: Mapping[str, UpstreamVariable]) -> None:
    bad = {
        name: f"{name}={value!r}: {upstream[name].refuse}; allowed: {upstream[name].default or 'leave it unset'}"
        for name, value in sorted(foreign.items())
        if upstream[name].refuse and not _same(value, upstream[name].default)
    }
    if bad:
        raise ConfigError("\n".join(bad.values()), check="M-14", names=tuple(bad))


def _same(value: str, default: str) -> bool:
    """Whether a value says what the default says: `0`, `False` and `off` are one."""
    falsy = {"0", "false", "no", "off", "f", "n", "", "{}", "none", "disabled"}
    return value.lower() == default.lower() or (value.lower() in falsy and default.lower() in falsy)


def _misspelled(given: Mapping[str, str], known: set[str] | frozenset[str]) -> list[tuple[str, str]]:
    """(given, meant) for variables that are one slip away from a known one: `TP_SZIE`, `CHECKPOINTPATH`."""
    found = []
    for name in sorted(given.keys() - known):
        if len(name) < 5 or name != name.upper():
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            found.append((name, close[0]))
    return found


def _suggest(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.split("=")[0], names, n=1, cutoff=0.6)
    return f": did you mean {close[0]}?" if close else ""
