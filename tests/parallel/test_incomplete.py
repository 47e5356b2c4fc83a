"""Gangs that cannot form: parts that disagree, and parts that never come. Every part ends, and says why.

All of them are started together, since they mostly wait.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.parallel.parts import Gang, Part
from tests.ports import free_start_port

GIVE_UP = {"GANG_TIMEOUT_MIN": "0.1", "GANG_SLEEP_TIME": "1"}


def members(ports: list[int]) -> str:
    return json.dumps({f"x_part{n}": {"ip": "127.0.0.1", "port": port} for n, port in enumerate(ports)})


def two_parts(settings: dict[str, str], only: int | None = None, more: int = 0, **of_the_second: str) -> Gang:
    """Two parts with one rank each. `of_the_second`: what only part 1 is told; `more`: parts that only part 1 knows of;
    `only`: the one part that comes.
    """
    ports = [free_start_port(), free_start_port()]
    common = {**settings, "TP_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "JSON_GANG_PARTS": members(ports)}
    known = members([*ports, *(free_start_port() for _ in range(more))])
    differences = [{}, {"JSON_GANG_PARTS": known, **of_the_second}]
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
    other = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    impatient = {**settings, **GIVE_UP}
    with ExitStack() as stack:
        yield {
            "settings": stack.enter_context(
                two_parts(settings, ACT_TYPE="bf16", MAX_SEQ_LEN="512", CHECKPOINT_PATH=str(other))
            ),
            "sizes": stack.enter_context(two_parts(settings, more=1, TP_SIZE="3")),
            "only part 0": stack.enter_context(two_parts(impatient, only=0)),
            "only part 1": stack.enter_context(two_parts(impatient, only=1)),
        }


def difference(part: Part) -> list[str]:
    """The indented lines behind "disagree"."""
    lines = part.log.split("the parts of the gang disagree:\n", 1)[1].splitlines()
    return [line for line in lines if line.startswith("  ")]


def refusals(gang: Gang) -> list[str]:
    """The difference that all parts print, once all have ended with 69."""
    assert [part.wait_end() for part in gang.parts] == [69, 69], [part.log for part in gang.parts]
    first, second = (difference(part) for part in gang.parts)
    assert first == second
    return first


def test_other_settings_and_another_checkpoint(gangs: dict[str, Gang]) -> None:
    lines = refusals(gangs["settings"])
    assert "  config.MAX_SEQ_LEN: part0=0  part1=512" in lines
    assert '  model.dtype: part0="fp32"  part1="bf16"' in lines
    (line,) = [line for line in lines if "model.checkpoint" in line]
    _, one, other = line.split(": ")[0], *(word.split("=")[1] for word in line.split()[1:])
    assert one != other
    assert len(lines) == 3


def test_another_world_size(gangs: dict[str, Gang]) -> None:
    lines = refusals(gangs["sizes"])
    assert "  plan.world_size: part0=2  part1=3" in lines
    assert "  plan.tp_size: part0=2  part1=3" in lines
    assert any(line.startswith("  plan.members: part0=[") for line in lines)


@pytest.mark.parametrize(("here", "missing"), [(0, 1), (1, 0)])
def test_a_part_that_never_comes_is_named_again_and_again(gangs: dict[str, Gang], here: int, missing: int) -> None:
    (part,) = gangs[f"only part {here}"].parts
    assert part.wait_end() == 69
    assert part.log.count(f"waiting for part{missing} (127.0.0.1:") >= 3
    assert f"gave up after 0.1 minutes (GANG_TIMEOUT_MIN): missing part{missing} (127.0.0.1:" in part.log
    assert "a restart cannot fix this; the part ends with exit code 69" in part.log
