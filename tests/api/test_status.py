"""The endpoints of probes, routers and dashboards: health, liveness, status, models, log level."""

import json
import logging
import os
import re
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
    with ApiServer(byte_model) as api:
        yield api


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", [*HEALTH, *LIVENESS])
def test_a_serving_part_is_ok(path: str, method: str, api: ApiServer) -> None:
    """Every health path returns the JSON string "ok", with quotes, as alibaba/rtp-llm does."""
    api.write_gang_status()
    with api.client() as client:
        response = client.request(method, path)
    assert (response.status_code, response.content) == (200, b'"ok"')


UNHEALTHY = {
    "starting": None,
    "rendezvous": {"phase": "rendezvous", "progress": 0.0},
    "loading": {"phase": "loading", "progress": 0.25},
    "warmup": {"phase": "warmup"},
    "no heartbeat": {"silent_s": 1000.0},
    "made no progress": {"idle_s": 1000.0},
    "stands still": {"idle_s": 3.0, "stands_still": True},
    "out_of_memory": {"lacks_memory": True},
}


@pytest.mark.parametrize("name", UNHEALTHY)
def test_health_of_a_part_that_is_not_ready(name: str, api: ApiServer) -> None:
    """/health is 503 with a reason. /liveness is 200, or a liveness probe would kill a server that is loading."""
    rank_status = UNHEALTHY[name]
    if rank_status is None:
        api.part_spec.gang_status_path.unlink(missing_ok=True)
    else:
        api.write_gang_status(**rank_status)
    for path in HEALTH:
        response = api.get(path)
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert response.json()["detail"]
    if rank_status and "progress" in rank_status:
        assert response.json()["phase"] == rank_status["phase"]
        assert response.json()["progress"] == rank_status["progress"]
    if rank_status and "lacks_memory" in rank_status:
        detail = "rank 0 waits for memory: its machine or container has 7 MiB left"
        assert response.json() == {"detail": detail, "phase": "out_of_memory", "progress": 1.0}
        assert api.metric("rtp_llm_state", state="out_of_memory") == 1
    for path in LIVENESS:
        assert api.get(path).content == b'"ok"'
    assert api.metric("rtp_llm_ready") == 0
    assert api.metric("rtp_llm_live") == 1


@pytest.mark.parametrize(("epoch", "phase"), [(0, "rendezvous"), (3, "recovering")])
def test_the_phase_between_two_epochs_is_not_that_of_the_last(epoch: int, phase: str, api: ApiServer) -> None:
    """A rank has died: the last heartbeats of the others are no statement about the next epoch."""
    api.write_gang_status(phase="warmup")
    status = json.loads(api.part_spec.gang_status_path.read_text())
    status |= {"epoch": epoch, "in_epoch": False, "message": "rank 1 is lost"}
    api.part_spec.gang_status_path.write_text(json.dumps(status))
    response = api.get("/health")
    assert response.status_code == 503
    assert response.json() == {"detail": "rank 1 is lost", "phase": phase, "progress": 0.0}
    assert api.metric("rtp_llm_state", state=phase) == 1


def test_a_stale_gang_status_is_unhealthy(api: ApiServer) -> None:
    """By the time since it was written last, not by its date: the clock may jump."""
    api.write_gang_status()
    assert api.get("/health").status_code == 200
    old = time.time() - 3600
    os.utime(api.part_spec.gang_status_path, (old, old))
    assert api.get("/health").status_code == 200
    deadline = time.monotonic() + 10 * STATUS_STALE_SECONDS
    while (response := api.get("/health")).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert response.status_code == 503
    assert "no status" in response.json()["detail"]


def test_a_lost_connection_to_rank_0(start_api: StartApi) -> None:
    """After a lost connection to rank 0, /health is 503 until the next engine has sent READY."""
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
    for response, name in ((api.get("/v1/models"), "fake"), (http.get("/v1/models"), "demo")):
        [card] = response.json()["data"]
        assert response.json()["object"] == "list"
        assert (card["id"], card["object"], card["max_model_len"]) == (name, "model", 2048)
        assert abs(card["created"] - time.time()) < 24 * 3600


def test_home(http: httpx.Client) -> None:
    """GET / returns alibaba/rtp-llm's JSON to clients other than browsers."""
    response = http.get("/", headers={"Accept": "application/json"})
    assert response.status_code == 200
    assert response.json() == {"status": "home"}


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


def test_every_origin_is_allowed(start_api: StartApi) -> None:
    """With ALLOWED_ORIGINS=*, web pages of any site may use the API, as with alibaba/rtp-llm."""
    api = start_api(allowed_origins="*")
    headers = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    with api.client() as client:
        assert (
            client.options("/v1/chat/completions", headers=headers).headers["access-control-allow-origin"]
            == "http://elsewhere"
        )
        assert client.get("/health", headers=headers).headers["access-control-allow-origin"] == "http://elsewhere"
        assert client.get("/nothing", headers=headers).headers["access-control-allow-origin"] == "http://elsewhere"


def test_home_is_a_page_for_browsers_and_json_for_programs(api: ApiServer) -> None:
    with api.client() as client:
        assert client.get("/").json() == {"status": "home"}
        page = client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    assert not re.search(r"""(src|href)=["']?[^"'>]*//|url\(|@import""", page.text), "the page loads no external files"
