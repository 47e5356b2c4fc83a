"""A request that kills a rank ends alone, on real ranks: eight streams beside it keep their texts, the part lives."""

import json
import signal
from pathlib import Path

import openai
import pytest

from tests.parallel.conftest import GREEDY
from tests.parallel.parts import Part
from tests.parallel.poison.sitecustomize import POISON
from tests.parallel.stream import Stream
from tests.ports import free_start_port
from tests.sdk_clients import openai_client

# So long that none ends before the last one flows, also on a busy machine.
INNOCENTS = [{**GREEDY, "prompt": f"{n} matrices and", "max_tokens": 400} for n in range(8)]


def part_settings(settings: dict[str, str], port: int, **env: str) -> dict[str, str]:
    return {**settings, "TP_SIZE": "2", "WORLD_SIZE": "2", "TEST_BLOCK_NUM": "512", "START_PORT": str(port), **env}


def verdicts(part: Part) -> dict[str, str]:
    loaded: dict[str, str] = json.loads((part.run_dir / "verdicts.json").read_text())
    return loaded


def send_poison(part: Part) -> openai.APIError:
    """Sends the poison request with the SDK's default retries. Returns the error with which it ends."""
    url = f"http://127.0.0.1:{part.port}"
    with (
        openai_client(url, max_retries=openai.DEFAULT_MAX_RETRIES) as client,
        pytest.raises(openai.APIError) as error,
    ):
        client.completions.create(model="any", prompt=POISON)
    return error.value


@pytest.mark.slow
@pytest.mark.parametrize("method", ["to_bytes", "from_bytes"])
def test_a_poison_request_ends_alone(settings: dict[str, str], method: str) -> None:
    """One failure is allowed, so the part would end if all three crashes counted."""
    port = free_start_port(2)
    fault = {"PYTHONPATH": str(Path(__file__).with_name("poison")), "POISON_METHOD": method, "RESTART_LIMIT": "1"}
    with Part(part_settings(settings, port, **fault), port=port, ranks=2) as part:
        part.wait_healthy()
        texts = [part.complete(body) for body in INNOCENTS]
        streams = [Stream(part, body).wait_flowing(1) for body in INNOCENTS]
        error = send_poison(part)
        assert isinstance(error, openai.InternalServerError)
        assert "also without others" in str(error)
        assert [stream.text() for stream in streams] == texts
        assert verdicts(part) == dict.fromkeys("123", "request")
        assert part.log.count("was alone in a failed step") == 1
        status, metrics = part.fetch("/metrics")
        assert status == 200
        answers = 'rtp_llm_http_requests_total{handler="/v1/completions",method="POST",status="500"}'
        assert f"{answers} 1.0" in metrics.splitlines(), [
            line for line in metrics.splitlines() if "requests_total" in line
        ]
        part.wait_healthy(3)
        assert part.complete(INNOCENTS[0]) == texts[0]


@pytest.mark.slow
def test_a_killed_rank_convicts_nobody(settings: dict[str, str]) -> None:
    port = free_start_port(2)
    with Part(part_settings(settings, port), port=port, ranks=2) as part:
        part.wait_healthy()
        texts = [part.complete(body) for body in INNOCENTS]
        streams = [Stream(part, body).wait_flowing(1) for body in INNOCENTS]
        part.kill("rank1", signal.SIGKILL)
        assert [stream.text() for stream in streams] == texts
        assert verdicts(part) == {"1": "engine"}
        assert "resumed 8 of the 8 unfinished sequences" in part.log
