"""Gangs that cannot form: parts that disagree, and missing parts. Every part exits with the reason.

All gangs start together, because they spend most of the time waiting.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.parallel.parts import Gang, Part
from tests.ports import free_start_port

pytestmark = pytest.mark.slow
SHORT_TIMEOUT = {"GANG_TIMEOUT_MIN": "0.1", "GANG_SLEEP_TIME": "1"}


def members(ports: list[int]) -> str:
    return json.dumps({f"x_part{n}": {"ip": "127.0.0.1", "port": port} for n, port in enumerate(ports)})


def two_parts(settings: dict[str, str], only: int | None = None, extra_members: int = 0, **of_part_1: str) -> Gang:
    """Starts two parts with one rank each. `of_part_1`: settings of part 1 only; `extra_members`: number of
    parts that only part 1's member list has; `only`: the single part to start.
    """
    ports = [free_start_port(), free_start_port()]
    common = {**settings, "TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "JSON_GANG_PARTS": members(ports)}
    members_of_part_1 = members([*ports, *(free_start_port() for _ in range(extra_members))])
    differences = [{}, {"JSON_GANG_PARTS": members_of_part_1, **of_part_1}]
    parts = [
        Part({**common, "START_PORT": str(port), "WORLD_RANK": str(n), **differences[n]}, port=port)
        for n, port in enumerate(ports)
        if only in (None, n)
    ]
    return Gang(*parts)


@pytest.fixture(scope="module")
def gangs(
    settings: dict[str, str], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Gang]]:
    changed = tmp_path_factory.mktemp("changed") / "model"
    shutil.copytree(checkpoint, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    short_timeout = {**settings, **SHORT_TIMEOUT}
    with ExitStack() as stack:
        yield {
            "settings": stack.enter_context(
                two_parts(settings, ACT_TYPE="bf16", MAX_SEQ_LEN="512", CHECKPOINT_PATH=str(changed))
            ),
            "sizes": stack.enter_context(two_parts(settings, extra_members=1, TP_SIZE="3")),
            "only part 0": stack.enter_context(two_parts(short_timeout, only=0)),
            "only part 1": stack.enter_context(two_parts(short_timeout, only=1)),
        }


def difference(part: Part) -> list[str]:
    """Returns the differences between the parts from a log: the indented lines after "disagree", of any process."""
    lines = part.log.split("the parts of the gang disagree:\n", 1)[1].splitlines()
    return list(dict.fromkeys(line for line in lines if line.startswith("  ") and line[2] != " "))


def rejection(gang: Gang) -> list[str]:
    """Asserts that all parts exit with 69 and print the same differences between their settings. Returns the lines of
    these."""
    assert [part.wait_end() for part in gang.parts] == [69, 69], [part.log for part in gang.parts]
    first, second = (difference(part) for part in gang.parts)
    assert first == second
    return first


def test_different_settings_and_checkpoints_are_listed(gangs: dict[str, Gang]) -> None:
    lines = rejection(gangs["settings"])
    assert "  config.MAX_SEQ_LEN: part0=0  part1=512" in lines
    assert '  model.dtype: part0="fp32"  part1="bf16"' in lines
    (line,) = [line for line in lines if "model.checkpoint" in line]
    digests = [field.split("=")[1] for field in line.split()[1:]]
    assert len(digests) == len(set(digests)) == 2
    assert len(lines) == 3


def test_different_world_sizes_are_listed(gangs: dict[str, Gang]) -> None:
    lines = rejection(gangs["sizes"])
    assert "  plan.world_size: part0=2  part1=3" in lines
    assert "  plan.tp_size: part0=2  part1=3" in lines
    assert any(line.startswith('  members.part2: part0=null  part1="x_part2 :') for line in lines)


@pytest.mark.parametrize(("here", "missing"), [(0, 1), (1, 0)])
def test_missing_part_is_logged_repeatedly(gangs: dict[str, Gang], here: int, missing: int) -> None:
    (part,) = gangs[f"only part {here}"].parts
    assert part.wait_end() == 69
    assert part.log.count(f"waiting for part{missing} (127.0.0.1:") >= 3
    assert f"gave up after 0.1 minutes (GANG_TIMEOUT_MIN): missing part{missing} (127.0.0.1:" in part.log
    assert "a restart cannot fix this; the part ends with exit code 69" in part.log
