"""What probes, routers and dashboards ask: health, liveness, status, models, log level."""

import json
import logging
import os
import time
from collections.abc import Iterator

import httpx
import pytest

from rtp_llm.api.part_state import STATUS_STALE_SECONDS
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput
from tests.api.servers import ServerProcess

HEALTH = ("/health", "/status", "/health_check", "/GraphService/cm2_status", "/SearchService/cm2_status")
LIVENESS = ("/liveness", "/frontend_health")


@pytest.fixture(scope="module")
def api(byte_model: ByteModel) -> Iterator[ApiServer]:
    with ApiServer(byte_model) as started:
        yield started


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", [*HEALTH, *LIVENESS])
def test_a_serving_part_is_ok(path: str, method: str, api: ApiServer) -> None:
    """The body is upstream's: a JSON string, quotes and all."""
    api.write_gang_status()
    with api.client() as client:
        answer = client.request(method, path)
    assert (answer.status_code, answer.content) == (200, b'"ok"')


UNHEALTHY = {
    "starting": None,
    "rendezvous": {"phase": "rendezvous", "progress": 0.0},
    "loading": {"phase": "loading", "progress": 0.25},
    "warmup": {"phase": "warmup"},
    "no heartbeat": {"silent_s": 1000.0},
    "made no progress": {"idle_s": 1000.0},
}


@pytest.mark.parametrize("name", UNHEALTHY)
def test_a_part_that_does_not_serve_says_why(name: str, api: ApiServer) -> None:
    """And lives all the same: a probe that kills a loading server would never let it finish."""
    rank_status = UNHEALTHY[name]
    if rank_status is None:
        api.part_spec.gang_status_path.unlink(missing_ok=True)
    else:
        api.write_gang_status(**rank_status)
    for path in HEALTH:
        answer = api.get(path)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["detail"]
    if rank_status and "progress" in rank_status:
        assert answer.json()["phase"] == rank_status["phase"]
        assert answer.json()["progress"] == rank_status["progress"]
    for path in LIVENESS:
        assert api.get(path).content == b'"ok"'
    assert api.metric("rtp_llm_ready") == 0
    assert api.metric("rtp_llm_live") == 1


def test_a_board_that_nobody_writes_any_more(api: ApiServer) -> None:
    api.write_gang_status()
    old = time.time() - STATUS_STALE_SECONDS - 1
    os.utime(api.part_spec.gang_status_path, (old, old))
    answer = api.get("/health")
    assert answer.status_code == 503
    assert "no status" in answer.json()["detail"]


def test_a_lost_connection_to_rank_0(start_api: StartApi) -> None:
    """Not ready between the end of one engine and the next one's greeting, ready again afterwards."""
    api = start_api()
    api.write_gang_status()
    assert api.get("/health").status_code == 200
    api.engine.close()
    api.wait_until(lambda: api.get("/health").status_code == 503)
    api.new_engine(sends_ready=False)
    api.engine.wait_for_connection()
    api.write_gang_status()
    assert api.get("/health").status_code == 503
    api.engine.send_ready()
    api.wait_until(lambda: api.get("/health").status_code == 200)


def test_models(api: ApiServer, http: httpx.Client, server: ServerProcess) -> None:
    for answer, name in ((api.get("/v1/models"), "fake"), (http.get("/v1/models"), "demo")):
        [card] = answer.json()["data"]
        assert answer.json()["object"] == "list"
        assert (card["id"], card["object"], card["max_model_len"]) == (name, "model", 2048)
        assert abs(card["created"] - time.time()) < 24 * 3600


def test_home(http: httpx.Client) -> None:
    """GET / beside POST /; a browser gets a page where there is one."""
    answer = http.get("/", headers={"Accept": "application/json"})
    assert answer.status_code == 200
    assert answer.json() == {"status": "home"}


STATUS_KEYS = {
    "role": str,
    "server_port": int,
    "http_port": int,
    "grpc_port": int,
    "alive": bool,
    "tp_size": int,
    "dp_size": int,
    "dp_rank": int,
    "precision": str,
    "max_seq_len": int,
    "running_task_info": list,
    "finished_task_list": list,
    "running_query_len": int,
    "waiting_query_len": int,
    "iterate_count": int,
    "step_latency_ms": float,
    "available_concurrency": int,
    "frontend_available_concurrency": int,
    "frontend_concurrency_limit": int,
    "status_version": int,
    "available_kv_cache": int,
    "total_kv_cache": int,
}


@pytest.mark.parametrize("path", ["/worker_status", "/rtp_llm/worker_status"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_worker_status(path: str, method: str, server: ServerProcess, http: httpx.Client) -> None:
    body = json.dumps({"latest_cache_version": 1, "latest_finised_version": 2}) if method == "POST" else None
    status = http.request(method, path, content=body).json()
    assert {key: type(status[key]) for key in STATUS_KEYS} == STATUS_KEYS
    assert f":{status['http_port']}" in server.url
    assert (status["alive"], status["tp_size"], status["max_seq_len"]) == (True, 1, 2048)
    assert status["total_kv_cache"] >= 2048


@pytest.mark.parametrize("path", ["/cache_status", "/rtp_llm/cache_status"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_cache_status(path: str, method: str, http: httpx.Client) -> None:
    body = json.dumps({"latest_cache_version": -1, "need_cache_keys": True}) if method == "POST" else None
    status = http.request(method, path, content=body).json()
    assert status["block_size"] == 16
    assert 0 <= status["available_kv_cache"] <= status["total_kv_cache"]
    assert status["total_kv_cache"] % 16 == 0
    assert isinstance(status["version"], int)


def test_status_follows_the_engine(api: ApiServer, byte_model: ByteModel) -> None:
    with api.open_stream("/v1/completions", {"prompt": "Hi", "stream": True}):
        submission = api.engine.next_submission()
        stats = {"running": 3, "waiting": 2, "kv_used": 10, "steps": 77, "step_tokens": 5, "step_seconds": 0.5}
        api.engine.send_frame(ScriptedOutput(byte_model.tokens("a")).for_request(submission.id), **stats)
        api.wait_until(lambda: api.get("/worker_status").json()["iterate_count"] == 77)
        status = api.get("/worker_status").json()
        assert (status["running_query_len"], status["waiting_query_len"]) == (3, 2)
        assert status["step_latency_ms"] == 500
        assert status["available_concurrency"] == 31
        assert status["available_kv_cache"] == (64 - 10) * 16
        cache = api.get("/cache_status").json()
        assert (cache["available_kv_cache"], cache["total_kv_cache"]) == (54 * 16, 64 * 16)
    assert api.engine.next_abort() == submission.id


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARN", "WARNING", "ERROR"])
def test_log_level(level: str, api: ApiServer) -> None:
    root = logging.getLogger()
    before = root.level
    try:
        assert api.post("/set_log_level", {"log_level": level}).json() == {"status": "ok"}
        assert logging.getLevelName(root.level) == {"WARN": "WARNING"}.get(level, level)
    finally:
        root.setLevel(before)


def test_every_origin_may_ask(api: ApiServer) -> None:
    """As upstream: a page from anywhere may use the API."""
    headers = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    with api.client() as client:
        assert client.options("/v1/chat/completions", headers=headers).headers["access-control-allow-origin"] == "*"
        assert client.get("/health", headers=headers).headers["access-control-allow-origin"] == "*"
        assert client.get("/nothing", headers=headers).headers["access-control-allow-origin"] == "*"


def test_a_browser_gets_a_page_and_a_program_upstreams_word(api: ApiServer) -> None:
    with api.client() as client:
        assert client.get("/").json() == {"status": "home"}
        page = client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    assert "//" not in page.text.replace("// Server-sent", ""), "nothing is loaded from elsewhere"
