"""A rank is killed in the middle of constrained streams: they continue where they were, and match their grammars."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import jsonschema_rs
import pytest

from tests.parallel.parts import Part
from tests.parallel.stream import Stream
from tests.ports import free_start_port
from tests.structured.schemas import array, closed

pytestmark = pytest.mark.slow

# Long enough that both streams still flow when the rank is killed: a step takes 2 ms.
PATTERN = "([a-z]{3,5} ){400}end"
SCHEMA = array(closed({"name": {"type": "string", "minLength": 5, "maxLength": 7}, "ok": {"type": "boolean"}}), 40, 40)
COMMON = {"prompt": "A large language model is", "max_tokens": 1900, "temperature": 1.0, "seed": 3}
BODIES = [
    {**COMMON, "guided_regex": PATTERN},
    {**COMMON, "response_format": {"type": "json_schema", "json_schema": {"name": "list", "schema": SCHEMA}}},
]


@pytest.fixture(scope="module")
def part(checkpoint: Path) -> Iterator[Part]:
    port = free_start_port(2)
    settings = {
        "CHECKPOINT_PATH": str(checkpoint),
        "RTP_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "WARM_UP": "0",
        "RESTART_LIMIT": "10",
        "TP_SIZE": "2",
        "WORLD_SIZE": "2",
        "START_PORT": str(port),
    }
    with Part(settings, port=port, ranks=2) as running:
        yield running.wait_healthy()


@pytest.mark.parametrize("rank", ["rank1", "rank0"])
def test_constrained_streams_outlive_a_rank(part: Part, rank: str) -> None:
    undisturbed = [part.complete(body) for body in BODIES]
    streams = [Stream(part, body) for body in BODIES]
    for stream in streams:
        stream.wait_flowing()
    os.kill(part.pid(rank), signal.SIGKILL)
    for stream in streams:
        stream.wait()
        assert (stream.done, stream.finish) == (True, "stop")
    texts = ["".join(stream.chunks) for stream in streams]
    assert texts == undisturbed
    assert re.fullmatch(PATTERN, texts[0])
    jsonschema_rs.validator_for(SCHEMA).validate(json.loads(texts[1]))
