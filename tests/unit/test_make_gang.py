"""The distribute file by numbered names, as the image's `make-gang` writes it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rtp_llm.config import Config
from rtp_llm.parallel.plan import make_plan

MAKE_GANG = Path(__file__).parents[2] / "image" / "make-gang"


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(MAKE_GANG), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("places", [["a:1100", "b:1200"], ["a:1100", "b:1200", "--wait", "0"]])
def test_places_one_by_one(tmp_path: Path, places: list[str]) -> None:
    assert run(tmp_path / "g", *places).returncode == 0
    members = json.loads((tmp_path / "g").read_text())
    assert members["gang_part1"] == {"name": "gang_part1", "ip": "b", "port": 1200}


def test_numbered_names_make_a_plan(tmp_path: Path) -> None:
    assert run(tmp_path / "g", "part%d:10000", "--parts", 3).returncode == 0
    sizes = {"world_size": 6, "local_world_size": 2, "world_index": 1}
    plan = make_plan(Config.model_validate({"distribute_config_file": str(tmp_path / "g"), **sizes}), 2)
    assert ([m.ip for m in plan.members], list(plan.ranks)) == (["part0", "part1", "part2"], [2, 3])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a"], "HOST:PORT is expected"),
        (["a:0"], "from 1 to 65535"),
        (["a:b"], "from 1 to 65535"),
        (["a:1", "--parts", "2"], "one place that has %d"),
        (["a%d:1", "b%d:1", "--parts", "2"], "one place that has %d"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run(tmp_path / "g", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "g").exists()


def test_it_waits_for_names(tmp_path: Path) -> None:
    assert run(tmp_path / "g", "localhost:1100", "--wait", "60").returncode == 0
    done = run(tmp_path / "h", "nobody.invalid:1100", "--wait", "0.01")
    assert done.returncode == 69
    assert "nobody.invalid" in done.stderr
