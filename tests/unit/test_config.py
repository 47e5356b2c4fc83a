"""Settings: precedence of sources, error messages for invalid values, and remarks on unused or misspelled variables."""

import inspect
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rtp_llm
from rtp_llm.config import (
    SECRET_FIELDS,
    Config,
    LoadedConfig,
    SharedMark,
    allowed,
    foreign_variables,
    load,
    secret,
    table_markdown,
    upstream_variables,
)
from rtp_llm.errors import ConfigError, ExitCode
from rtp_llm.parallel.plan import make_plan

PACKAGE = Path(rtp_llm.__file__).parent
DEFAULTS = Config.model_validate({})
UNSUPPORTED = sorted(name for name, variable in upstream_variables().items() if variable.refuse)
ACCEPTED = sorted(name for name, variable in upstream_variables().items() if not variable.refuse)


def from_env(**environ: str) -> Config:
    return load([], environ).config


def error_lines(argv: list[str] | None = None, /, **environ: str) -> list[str]:
    """Returns the lines of the ConfigError that `load` raises."""
    with pytest.raises(ConfigError) as caught:
        load(argv or [], environ)
    assert caught.value.exit_code == ExitCode.BAD_CONFIG
    return str(caught.value).splitlines()


def test_defaults_without_input() -> None:
    assert load([], {}) == LoadedConfig(DEFAULTS, (), ())
    assert (DEFAULTS.start_port, DEFAULTS.dp_size, DEFAULTS.tp_size, DEFAULTS.warm_up) == (10000, 1, None, True)


@pytest.mark.parametrize("argv", [["--tp_size", "2"], ["--tp_size=2"]])
def test_flag_is_the_variable_in_lower_case(argv: list[str]) -> None:
    assert load(argv, {}).config == from_env(TP_SIZE="2") == Config.model_validate({"tp_size": 2})


@pytest.mark.parametrize("name", [name for name in Config.model_fields if name not in SECRET_FIELDS])
def test_every_variable_has_a_flag(name: str) -> None:
    field = Config.model_fields[name]
    value = next((v for v in getattr(field.annotation, "__args__", ()) if isinstance(v, str) and v), None) or "1"
    value = {"start_port": "11000", "worker_info_port_num": "8", "heartbeat_timeout": "2"}.get(name, value)
    by_env, by_flag = load([], {name.upper(): value}), load([f"--{name}", value], {})
    assert by_env == by_flag
    assert getattr(by_env.config, name) is not None


def test_flag_overrides_environment_overrides_default() -> None:
    environ = {"TP_SIZE": "2", "WORLD_SIZE": "4"}
    config = load(["--tp_size=4"], environ).config
    assert (config.tp_size, config.world_size, config.dp_size) == (4, 4, 1)


def test_empty_variable_counts_as_unset() -> None:
    assert from_env(TP_SIZE="", WARM_UP="", LOG_LEVEL="") == DEFAULTS


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("YES", True), ("on", True), ("0", False), ("off", False)]
)
def test_spellings_of_booleans(text: str, value: bool) -> None:
    assert from_env(WARM_UP=text).warm_up is value


def test_config_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DEFAULTS.tp_size = 2


@pytest.mark.parametrize(
    ("name", "value", "allowed_values"),
    [
        ("TP_SIZE", "0", "an integer from 1 to 4096"),
        ("TP_SIZE", "two", "an integer from 1 to 4096"),
        ("WORLD_SIZE", "4097", "an integer from 1 to 4096"),
        ("CONCURRENCY_LIMIT", "1.5", "an integer of 1 or more"),
        ("WORLD_RANK", "-1", "an integer of 0 or more"),
        ("START_PORT", "1034", "an integer from 1035 to 65000"),
        ("START_PORT", "65001", "an integer from 1035 to 65000"),
        ("WORKER_INFO_PORT_NUM", "6", "an integer from 7 to 1000"),
        ("GANG_TIMEOUT_MIN", "0", "a number above 0"),
        ("GANG_TIMEOUT_MIN", "inf", "a number above 0"),
        ("HEARTBEAT_TIMEOUT", "nan", "a number of 2 or more"),
        ("WARM_UP", "maybe", "1/0, true/false, yes/no or on/off"),
        ("ACT_TYPE", "int8", "one of fp32, bf16, fp16"),
        ("LOG_LEVEL", "LOUD", "one of DEBUG, INFO, WARN, WARNING, ERROR"),
        ("MAX_RPC_TIMEOUT_MS", "soon", "an integer"),
    ],
)
def test_invalid_value_is_reported_with_allowed_values(name: str, value: str, allowed_values: str) -> None:
    (line,) = error_lines(**{name: value})
    assert line == f"{name}={value!r}: not valid; allowed: {allowed_values}"
    assert error_lines([f"--{name.lower()}={value}"]) == [line]


@pytest.mark.parametrize(
    ("name", "value"),
    [("START_PORT", "1035"), ("START_PORT", "65000"), ("WORKER_INFO_PORT_NUM", "7"), ("SHUTDOWN_TIMEOUT", "-1")],
)
def test_bounds_are_inclusive(name: str, value: str) -> None:
    assert getattr(from_env(**{name: value}), name.lower()) == int(value)


def test_all_invalid_values_are_reported_at_once() -> None:
    lines = error_lines(["--dp_size=x"], TP_SIZE="0", ACT_TYPE="int4")
    assert [line.split("=")[0] for line in lines] == ["TP_SIZE", "DP_SIZE", "ACT_TYPE"]


def test_service_variable_of_kubernetes_is_explained() -> None:
    (line,) = error_lines(START_PORT="tcp://10.0.0.7:80")
    assert "enableServiceLinks: false" in line
    assert "Kubernetes" in line


def test_negative_number_is_a_value_not_a_flag() -> None:
    assert load(["--shutdown_timeout", "-1"], {}).config.shutdown_timeout == -1


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [("--tpsize=2", "--tp_size"), ("--checkpoint-path", "--checkpoint_path"), ("--worldsize", "--world_size")],
)
def test_unknown_flag_is_rejected_with_a_suggestion(argument: str, suggestion: str) -> None:
    (line,) = error_lines([argument])
    assert line == f"command line: unknown argument {argument!r}: did you mean {suggestion}?"


def test_unknown_argument_is_rejected_without_a_suggestion() -> None:
    assert error_lines(["--qqqqqqqq"]) == ["command line: unknown argument '--qqqqqqqq'"]
    assert error_lines(["stray"]) == ["command line: unknown argument 'stray'"]


def test_flags_cannot_be_abbreviated() -> None:
    assert "unknown argument '--tp=2'" in error_lines(["--tp=2"])[0]


def test_flag_without_value_is_rejected() -> None:
    assert "--tp_size" in error_lines(["--tp_size"])[0]


def test_unused_upstream_variables_are_listed_without_values() -> None:
    by_env = load([], dict.fromkeys(ACCEPTED, "s3cret"))
    names = f"upstream variables without effect in this server: {', '.join(ACCEPTED)}"
    stdout = "all logs go to stdout, where the container engine keeps them; no file is written"
    assert by_env == LoadedConfig(DEFAULTS, (names, stdout), ())
    assert load([], {"LOG_DIR": "/logs"}).notes[1:] == (stdout,)
    assert load([f"--{upstream_variables()[name].flag}=s3cret" for name in ACCEPTED], {}) == by_env


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_upstream_feature_is_rejected_unless_off(name: str) -> None:
    variable = upstream_variables()[name]
    (line,) = error_lines(**{name: "something-else"})
    assert line.startswith(f"{name}='something-else': {variable.refuse}")
    if variable.default:
        assert load([], {name: variable.default}).notes == (
            f"upstream variables without effect in this server: {name}",
        )


def test_all_spellings_of_off_are_accepted() -> None:
    off = [name for name in UNSUPPORTED if upstream_variables()[name].default in ("0", "False")]
    assert off
    for text in ("0", "false", "False", "off", "no"):
        load([], dict.fromkeys(off, text))


@pytest.mark.parametrize(
    ("typo", "meant"), [("TP_SZIE", "TP_SIZE"), ("CHECKPOINTPATH", "CHECKPOINT_PATH"), ("WORLD_RNAK", "WORLD_RANK")]
)
def test_misspelled_variable_is_a_warning_without_its_value(typo: str, meant: str) -> None:
    loaded = load([], {typo: "s3cret"})
    assert loaded.warnings == (f"{typo} is not a variable of this server: did you mean {meant}?",)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("API_KEYS", "API_KEY"),
        ("APIKEY", "API_KEY"),
        ("API_KEYS_FILE", "API_KEY_FILE"),
        ("ADMIN_KEYS", "ADMIN_KEY"),
        ("GANG_SERCET", "GANG_SECRET"),
        ("SSL_CERTFLE", "SSL_CERTFILE"),
    ],
)
def test_a_misspelled_access_setting_is_an_error(name: str, meant: str) -> None:
    """The server would be open by mistake."""
    with pytest.raises(ConfigError, match=f"^{name} is not .* open without {meant}; allowed: ") as raised:
        load([], {name: "s3cret"}).check_access()
    assert "s3cret" not in str(raised.value)


def test_a_near_miss_is_no_error_where_the_setting_is_set() -> None:
    load([], {"API_KEYS": "a", "API_KEY": "b"}).check_access()
    load([], {"API_KEYS": "a", "API_KEY_FILE": "/keys"}).check_access()
    load([], {"LOG_LEVLE": "INFO", "OPENAI_API_KEY": "a", "HF_API_KEY": "a", "ALLOWED_HOST": "a"}).check_access()


@pytest.mark.parametrize("name", ["DP_RANK", "EP_RANK", "LOGLEVEL", "USE_CACHE", "LWS_LEADER_ADDRESS", "LOG_DIR"])
def test_variable_of_another_program_is_not_a_typo(name: str) -> None:
    assert load([], {name: "1"}).misspelled == ()


def test_foreign_variables_hide_no_setting() -> None:
    assert foreign_variables().isdisjoint({name.upper() for name in Config.model_fields})


def test_common_shell_variables_are_not_misspelled() -> None:
    shell = {
        "PATH": "/bin",
        "HOME": "/",
        "LANG": "C",
        "PWD": "/",
        "HOSTNAME": "a",
        "tp_szie": "1",
        "OMP_NUM_THREADS": "1",
    }
    assert load([], shell) == LoadedConfig(DEFAULTS, (), ())


def test_readme_table_has_a_row_per_variable() -> None:
    table = table_markdown()
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == [n.upper() for n in Config.model_fields]


def test_every_field_has_a_description_and_allowed_values() -> None:
    for field in Config.model_fields.values():
        assert field.description
        assert allowed(field)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([n.upper() for n in Config.model_fields] + UNSUPPORTED + ACCEPTED[:5]),
        st.text(st.characters(exclude_characters="\0"), max_size=8) | st.integers().map(str) | st.floats().map(str),
        max_size=4,
    )
)
def test_any_environment_loads_or_raises_config_error(environ: dict[str, str]) -> None:
    with suppress(ConfigError):
        load([], environ)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(max_size=12) | st.sampled_from(["--tp_size", "-", "--", "--warm_up=", "-1", "--help2"]), max_size=4
    )
)
def test_any_command_line_loads_or_raises_config_error(argv: list[str]) -> None:
    with suppress(ConfigError):
        load([argument for argument in argv if argument not in ("-h", "--help")], {})


def test_secret_file_dev_null_is_an_empty_secret() -> None:
    """The compose file mounts /dev/null under another name if GANG_SECRET_FILE is not set."""
    assert secret(Config.model_validate({"gang_secret_file": os.devnull})) == b""
    with pytest.raises(ConfigError, match="it is a device; allowed: a regular file"):
        secret(Config.model_validate({"gang_secret_file": "/dev/zero"}))


# Settings of one part only, although its ranks read them, and why the others may have different values.
PER_PART = {
    "rtp_threads": "machines may have different numbers of cores",
    "rtp_cpu_kernels": "machines may have different CPUs",
    "rtp_device": "the plan, which is compared, holds the device",
    "heartbeat_timeout": "how long a part waits for another shapes neither memory nor collectives",
    "gang_timeout_min": "as above",
    "gang_sleep_time": "only the log",
    "log_level": "only the log",
    "log_format": "only the log",
    "act_type": "model.dtype is compared",
    "model_type": "model.family is compared",
    "checkpoint_path": "model.checkpoint is compared",
    "tokenizer_path": "only rank 0 reads it, for grammars",
    "itl_budget_ms": "only rank 0 uses it, which decides what a step computes",
}
RANK_CODE = ("engine", "runner", "model", "layers", "kernels")


def settings_read_by_ranks() -> set[str]:
    """Returns the fields of Config that the ranks' code reads, as `config.name`, also through a property of Config."""
    sources = [f for package in RANK_CODE for f in (PACKAGE / package).glob("*.py")] + [PACKAGE / "parallel/group.py"]
    names = {name for file in sources for name in re.findall(r"\b(?:config|settings)\.([a-z_]+)", file.read_text())}
    for name in names - Config.model_fields.keys():
        accessor = getattr(Config, name, None)
        if isinstance(accessor, property):
            names |= set(re.findall(r"self\.([a-z_]+)", inspect.getsource(accessor.fget)))  # type: ignore[arg-type]
    return names & Config.model_fields.keys()


def test_every_setting_that_ranks_read_is_shared_or_excused() -> None:
    read, shared = settings_read_by_ranks(), {name.lower() for name in DEFAULTS.shared()}
    assert {"max_batch_size", "concurrency_limit", "kv_cache_mem_mb", "rtp_pipeline_depth", "reuse_cache"} <= read
    assert read - shared - PER_PART.keys() == set(), "mark the field as Shared, or say in PER_PART why it may differ"


@pytest.mark.parametrize("name", Config.model_fields)
def test_a_shared_setting_changes_the_fingerprint_and_a_secret_is_never_in_it(name: str) -> None:
    field = Config.model_fields[name]
    is_shared = name.upper() in DEFAULTS.shared()
    assert is_shared == any(isinstance(mark, SharedMark) for mark in field.metadata)
    assert not (is_shared and name in PER_PART)
    assert not (is_shared and "Secret" in str(field.annotation))
    if is_shared:
        changed = DEFAULTS.model_copy(update={name: object()})
        assert {key for key, value in changed.shared().items() if value != DEFAULTS.shared()[key]} == {name.upper()}


def test_shared_settings_survive_part_json() -> None:
    """The doctor of one part compares its own settings with those that another part has read from its file."""
    config = Config.model_validate({})
    reloaded = Config.model_validate(json.loads(json.dumps(config.model_dump(exclude=set(SECRET_FIELDS)))))
    assert json.dumps(config.shared()) == json.dumps(reloaded.shared())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ""),
        ({"QUANTIZATION": "none", "INT8_MODE": "0"}, ""),
        ({"QUANTIZATION": "w8a8"}, "W8A8"),
        ({"QUANTIZATION": "Int4"}, "INT4"),
        ({"INT8_MODE": "1"}, "INT8"),
        ({"WEIGHT_TYPE": "int8", "QUANTIZATION": "INT8"}, "INT8"),
    ],
)
def test_spellings_of_quantization(environment: dict[str, str], expected: str) -> None:
    config = load([], environment).config
    assert config.weight_quantization == expected
    make_plan(config, gpus=0)


def test_contradicting_or_unsupported_quantization_is_refused() -> None:
    assert "one of INT8, W8A8, INT4" in error_lines(QUANTIZATION="fp8")[0]
    with pytest.raises(ConfigError, match="QUANTIZATION=INT4, INT8_MODE=1: these contradict each other"):
        make_plan(load([], {"QUANTIZATION": "INT4", "INT8_MODE": "1"}).config, gpus=0)
    with pytest.raises(ConfigError, match="WEIGHT_TYPE=INT8: weights are quantized on CPU only; allowed"):
        make_plan(load([], {"WEIGHT_TYPE": "INT8"}).config, gpus=1)
