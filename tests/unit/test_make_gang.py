"""Tests of the image's `make-gang`, which writes the distribute file (the gang's member list)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rtp_llm.config import Config
from rtp_llm.parallel.plan import make_plan

MAKE_GANG = Path(__file__).parents[2] / "image" / "make-gang"


def make_gang(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(MAKE_GANG), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("addresses", [["a:1100", "b:1200"], ["a:1100", "b:1200", "--wait", "0"]])
def test_addresses_become_numbered_members(tmp_path: Path, addresses: list[str]) -> None:
    assert make_gang(tmp_path / "g", *addresses).returncode == 0
    members = json.loads((tmp_path / "g").read_text())
    assert members["gang_part1"] == {"name": "gang_part1", "ip": "b", "port": 1200}


def test_numbered_host_names_make_a_plan(tmp_path: Path) -> None:
    assert make_gang(tmp_path / "g", "part%d:10000", "--parts", 3).returncode == 0
    sizes = {"world_size": 6, "local_world_size": 2, "world_index": 1}
    plan = make_plan(Config.model_validate({"distribute_config_file": str(tmp_path / "g"), **sizes}), 2)
    assert ([m.ip for m in plan.members], list(plan.ranks)) == (["part0", "part1", "part2"], [2, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "HOST:PORT is expected"),
        (["a:0"], "from 1 to 65535"),
        (["a:b"], "from 1 to 65535"),
        (["a:1", "--parts", "2"], "exactly one address, with one %d"),
        (["a%d:1", "b%d:1", "--parts", "2"], "exactly one address, with one %d"),
    ],
)
def test_invalid_arguments_exit_2_with_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    completed = make_gang(tmp_path / "g", *arguments)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert not (tmp_path / "g").exists()


def test_wait_exits_69_if_a_host_does_not_resolve(tmp_path: Path) -> None:
    assert make_gang(tmp_path / "g", "localhost:1100", "--wait", "60").returncode == 0
    completed = make_gang(tmp_path / "h", "unknown.invalid:1100", "--wait", "0.01")
    assert completed.returncode == 69
    assert "unknown.invalid" in completed.stderr
