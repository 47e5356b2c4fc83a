"""The access log: who asked for what, how much it took and how it ended."""

import json
import logging
from typing import Any

import pytest

from rtp_llm.log import JsonFormatter
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput

COMPLETION = "/v1/completions"


def records(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [JsonFormatter("part0 api").format(r) for r in caplog.records if r.name == "rtp_llm.access"]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_has_tokens_times_and_finish(
    stream: bool, start_api: StartApi, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    api = start_api(lambda submission: [ScriptedOutput([1], cached_tokens=2), ScriptedOutput([2], "length")])
    with api.client() as client:
        headers = {"X-Request-Id": "trace-1/a"}
        body = {"prompt": [3, 4, 5], "n": 2, "stream": stream}
        response = client.post(COMPLETION, json=body, headers=headers)
    assert response.headers["x-request-id"] == "trace-1/a"
    api.wait_until(lambda: any(r["path"] == COMPLETION for r in records(caplog)))
    line = next(r for r in records(caplog) if r["path"] == COMPLETION)
    expected = {"request_id": "trace-1/a", "method": "POST", "status": 200, "key": "", "client": "127.0.0.1"}
    expected |= {"prompt_tokens": 3, "cached_tokens": 2, "output_tokens": 4, "queue_ms": 1.0, "finish": "length"}
    assert expected.items() <= line.items()
    assert 0 <= line["ttft_ms"] <= line["duration_ms"]
    assert "prompt_tokens=3 cached_tokens=2 output_tokens=4" in line["message"]


def test_an_error_has_a_line_too(start_api: StartApi, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    api = start_api()
    response = api.post(COMPLETION, {"prompt": ""})
    api.wait_until(lambda: any(r["path"] == COMPLETION for r in records(caplog)))
    line = next(r for r in records(caplog) if r["path"] == COMPLETION)
    assert line["status"] == 400
    assert line["request_id"] == response.headers["x-request-id"]
    assert "prompt_tokens" not in line, "no sequence started"


@pytest.mark.parametrize("sent", ["a b", "x" * 129, "ä", "a\tb", ""])
def test_an_unsafe_id_is_replaced(sent: str, start_api: StartApi) -> None:
    api = start_api()
    with api.client() as client:
        response = client.get("/v1/models", headers={b"X-Request-Id": sent.encode()})
    assert response.headers["x-request-id"] not in ("", sent)
    assert response.headers["x-request-id"].isalnum()


def test_equal_ids_do_not_collide(start_api: StartApi) -> None:
    """Two requests with one X-Request-Id are two sequences of the engine."""
    api = start_api()
    with api.client() as client:
        for _ in range(2):
            with client.stream("POST", COMPLETION, json={"prompt": "a", "stream": True}, headers={"X-Request-Id": "b"}):
                submission = api.engine.next_submission()
                assert submission.id != "b"
                api.engine.send_outputs(submission, ScriptedOutput([1], "length"))


def test_no_path_can_forge_a_line(start_api: StartApi, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    api = start_api()
    api.get("/a%0Ab status=200")
    api.wait_until(lambda: any(r["path"].startswith("/a") for r in records(caplog)))
    line = next(r for r in records(caplog) if r["path"].startswith("/a"))
    assert r'path="/a\nb status=200" status=404' in line["message"]
