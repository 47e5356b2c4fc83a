"""The generated supervisord.conf, parsed with configparser and by supervisord itself."""

import configparser
import shlex
from pathlib import Path
from typing import Any

import pytest
from supervisor.options import ServerOptions

from rtp_llm.config import Config
from rtp_llm.parallel.part_spec import ModelInfo, PartSpec
from rtp_llm.parallel.plan import make_plan
from rtp_llm.supervise.supervisord import DRAIN_MARGIN_SECONDS, supervisord_config

RUN_PROGRAM = " -m rtp_llm.supervise.program"
PARTS = '{"x_part0": {"ip": "a", "port": 10000}, "x_part1": {"ip": "b", "port": 10000}}'


def part_spec(run_dir: Path, **settings: Any) -> PartSpec:
    config = Config.model_validate({"tp_size": 2, **settings})
    return PartSpec(run_dir, config, make_plan(config, 0), ModelInfo("m", "qwen3", "fp32", 1024), {}, False)


def parse(run_dir: Path, **settings: Any) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read_string(supervisord_config(part_spec(run_dir, **settings)))
    return parser


def parse_with_supervisord(run_dir: Path) -> ServerOptions:
    """Returns the options of supervisord. Raises ValueError if it rejects the file."""
    run_dir.mkdir(exist_ok=True)
    conf = run_dir / "supervisord.conf"
    conf.write_text(supervisord_config(part_spec(run_dir)))
    options = ServerOptions()
    options.realize(["-c", str(conf)])
    return options


@pytest.mark.parametrize(
    ("recovery", "workers"), [("reform", ["worker0", "worker1", "worker2"]), ("restart", ["worker0", "worker1"])]
)
def test_one_worker_per_rank_of_this_part_and_a_spare(recovery: str, workers: list[str]) -> None:
    """A spare takes the place of a lost rank beside survivors; where all ranks restart it would be of no use."""
    settings = {"tp_size": 4, "local_world_size": 2, "world_rank": 2, "json_gang_parts": PARTS}
    conf = parse(Path("/run/x"), rtp_recovery=recovery, **settings)
    assert conf["group:ranks"]["programs"].split(",") == workers
    for index, name in enumerate(workers):
        assert conf[f"program:{name}"]["command"].endswith(f"{RUN_PROGRAM} rtp_llm.engine.main /run/x {index}")
    assert conf["supervisord"]["identifier"] == "part1"


def test_only_part_0_runs_the_coordinator() -> None:
    settings = {"tp_size": 2, "local_world_size": 1, "json_gang_parts": PARTS}
    first, second = (parse(Path("/run/x"), world_rank=rank, **settings) for rank in (0, 1))
    assert first["program:coordinator"]["command"].endswith(f"{RUN_PROGRAM} rtp_llm.parallel.coordinator /run/x")
    assert first["group:gang"]["programs"] == "coordinator"
    assert not second.has_section("program:coordinator")
    assert not second.has_section("group:gang")


def test_the_api_stops_before_the_ranks_and_these_before_the_coordinator() -> None:
    """supervisord stops the group with the highest priority number first."""
    conf = parse(Path("/run/x"))
    priorities = [int(conf[f"group:{name}"]["priority"]) for name in ("service", "ranks", "gang")]
    assert priorities == sorted(set(priorities), reverse=True)


@pytest.mark.parametrize(("timeout", "seconds"), [(30, 30), (0, 0), (-1, 600)])
def test_api_stop_timeout_covers_the_drain_time(timeout: int, seconds: int) -> None:
    conf = parse(Path("/run/x"), shutdown_timeout=timeout)
    assert int(conf["program:api"]["stopwaitsecs"]) == seconds + DRAIN_MARGIN_SECONDS


def test_supervisord_restarts_only_the_guard() -> None:
    conf = parse(Path("/run/x"))
    restarts = {name: conf[name]["autorestart"] for name in conf.sections() if "autorestart" in conf[name]}
    assert restarts == {
        "program:api": "false",
        "program:coordinator": "false",
        "program:worker0": "false",
        "program:worker1": "false",
        "program:worker2": "false",
        "eventlistener:guard": "true",
    }


def test_stdout_of_the_guard_is_not_redirected() -> None:
    conf = parse(Path("/run/x"))["eventlistener:guard"]
    assert conf["redirect_stderr"] == "false"
    assert "stdout_logfile" not in conf


@pytest.mark.parametrize("name", ["plain", "100%", "50%(x)s", "%(here)s"])
def test_supervisord_parses_any_name_of_the_run_directory(tmp_path: Path, name: str) -> None:
    run_dir = tmp_path / name
    options = parse_with_supervisord(run_dir)
    groups = {group.name: group for group in options.process_group_configs}
    assert set(groups) == {"gang", "ranks", "service", "guard"}
    for group, last_args in (("ranks", ["rtp_llm.engine.main", str(run_dir), "0"]), ("service", [str(run_dir)])):
        assert shlex.split(groups[group].process_configs[0].command)[-len(last_args) :] == last_args
    assert groups["ranks"].process_configs[0].stdout_logfile == "/dev/fd/1"
    assert options.logfile == str(run_dir / "supervisord.log")


@pytest.mark.parametrize("name", ["with space", "quo'te", "$HOME"])
def test_run_directory_is_one_argument_of_the_command(tmp_path: Path, name: str) -> None:
    run_dir = tmp_path / name
    options = parse_with_supervisord(run_dir)
    for group in options.process_group_configs:
        for program in group.process_configs:
            assert str(run_dir) in shlex.split(program.command)


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        ({"local_world_size": 1, "json_gang_parts": PARTS}, True),
        ({"local_world_size": 1, "json_gang_parts": PARTS, "rtp_doctor": "off"}, False),
        ({}, False),
    ],
    ids=["two parts", "two parts without it", "one part"],
)
def test_gang_doctor_runs_only_with_other_parts(tmp_path: Path, settings: dict[str, Any], runs: bool) -> None:
    assert parse(tmp_path, **settings).has_section("group:doctor") == runs
