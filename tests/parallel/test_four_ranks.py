"""Two machines with two ranks each, as documented: WORLD_RANK is 0 on the first and 2 on the second."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.parallel.conftest import BODIES
from tests.parallel.parts import Gang, Part
from tests.ports import free_start_port


@pytest.mark.slow
def test_four_ranks_have_the_outputs_of_one(settings: dict[str, str], expected: dict[str, str], tmp_path: Path) -> None:
    ports = [free_start_port(2), free_start_port(2)]
    file = tmp_path / "gang.json"
    members = {f"x_part{n}": {"name": f"x_part{n}", "ip": "127.0.0.1", "port": port} for n, port in enumerate(ports)}
    file.write_text(json.dumps(members))
    common = {"DISTRIBUTE_CONFIG_FILE": str(file), "TP_SIZE": "4", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    parts = [
        Part({**common, **settings, "START_PORT": str(port), "WORLD_RANK": str(rank)}, port=port, ranks=2)
        for rank, port in zip((0, 2), ports, strict=True)
    ]
    with Gang(*parts) as gang:
        gang.wait_healthy()
        assert gang.leader.complete(BODIES["short"]) == expected["short"]
        for part in gang.parts:
            assert part.fetch("/liveness") == (200, '"ok"')
            status, text = part.fetch("/metrics")
            assert status == 200
            assert all(f'rtp_llm_gang_member_up{{world_rank="{rank}"}} 1.0' in text for rank in range(4))
        kill_start_server(parts[1])


def kill_start_server(part: Part) -> None:
    """Kills start_server: all child processes exit. Only the run directory remains, which start_server would remove."""
    part.kill("start_server")
    assert part.wait_end() == -signal.SIGKILL
    part.assert_no_process_left()
    shutil.rmtree(part.run_dir)
