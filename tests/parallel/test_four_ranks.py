"""Two machines with two ranks each, as documented: WORLD_RANK is 0 on the first and 2 on the second."""

import json
from pathlib import Path

from tests.parallel.conftest import BODIES
from tests.parallel.parts import Gang, Part, free_start_port


def test_four_ranks_say_what_one_says(settings: dict[str, str], expected: dict[str, str], tmp_path: Path) -> None:
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
        for name, body in BODIES.items():
            assert gang.leader.complete(body) == expected[name]
        for part in gang.parts:
            assert part.fetch("/liveness") == (200, '"ok"')
            status, text = part.fetch("/metrics")
            assert status == 200
            assert all(f'rtp_llm_gang_member_up{{world_rank="{rank}"}} 1.0' in text for rank in range(4))
