"""Keys, origins, hosts: who may call which route."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI

from rtp_llm.api.auth import Keyring, NamedKey
from rtp_llm.api.status import HEALTH_PATHS, LIVENESS_PATHS
from rtp_llm.config import Config, load
from rtp_llm.errors import ConfigError
from tests.api.api_server import ApiServer, routes
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput

OPEN = {(method, path) for path in (*HEALTH_PATHS, *LIVENESS_PATHS) for method in ("GET", "POST")} | {("GET", "/")}
ADMIN = {("GET", "/doctor"), ("POST", "/set_log_level")}
CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def closed(byte_model: ByteModel) -> Iterator[ApiServer]:
    """A server with two named keys and an admin key."""
    script = lambda submission: [ScriptedOutput(byte_model.tokens("ok"), "length")]  # noqa: E731
    with ApiServer(byte_model, script, api_key="alice:key-a, key-b", admin_key="root:key-r") as api:
        yield api


def test_a_key_closes_every_route(closed: ApiServer) -> None:
    found = set(routes(closed.app.routes))
    assert {("POST", CHAT), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/metrics"), *ADMIN, *OPEN} <= found
    with closed.client() as client:
        for method, path in sorted(found | {("GET", "/unknown"), ("POST", "/health\n".replace("\n", "%0A"))}):
            status = client.request(method, path).status_code
            assert (status != 401) == ((method, path) in OPEN), (method, path, status)
        for method, path in sorted(ADMIN):
            for key, is_refused in (("key-a", True), ("key-b", True), ("key-r", False)):
                status = client.request(method, path, headers={"x-api-key": key}).status_code
                assert (status == 403) == is_refused, (method, path, key, status)
            # A router that also matches a path with a line break must not open it.
            assert client.request(method, f"{path}%0A", headers={"x-api-key": "key-a"}).status_code in (403, 404)


def test_any_valid_key_suffices(closed: ApiServer) -> None:
    good = [
        {"Authorization": "Bearer key-a"},
        {"authorization": "bearer  key-b"},
        {"x-api-key": "key-b"},
        {"api-key": "key-r"},
        {"Authorization": "Bearer sk-other", "x-api-key": "key-a"},
        {"Authorization": "Bearer key-a", "api-key": "wrong"},
    ]
    bad = [{}, {"Authorization": "Bearer key"}, {"x-api-key": ""}, {"x-api-key": "alice:key-a"}, {"Cookie": "key-a"}]
    with closed.client() as client:
        assert [client.get("/v1/models", headers=headers).status_code for headers in good] == [200] * len(good)
        for headers in bad:
            response = client.get("/v1/models", headers=headers)
            assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "key-a" not in response.text


def test_the_openai_client(closed: ApiServer) -> None:
    client = OpenAI(base_url=f"{closed.url}/v1", api_key="key-a")
    answer = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content == "ok"
    with pytest.raises(AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_health_tells_strangers_only_the_phase(closed: ApiServer) -> None:
    closed.write_gang_status(phase="loading", progress=0.25)
    with closed.client() as client:
        assert client.get("/health").json() == {"phase": "loading"}
        assert client.get("/health", headers={"x-api-key": "key-a"}).json()["progress"] == 0.25
    closed.write_gang_status()
    assert closed.get("/health").content == b'"ok"'


def test_metrics_open(start_api: StartApi) -> None:
    assert start_api(api_key="k", metrics_open=True).get("/metrics").status_code == 200


def test_with_a_key_every_origin_may_call(closed: ApiServer) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    with closed.client() as client:
        preflight = client.options(CHAT, headers=headers | {"Access-Control-Request-Headers": "authorization"})
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "*")
        assert preflight.headers["access-control-allow-headers"] == "authorization"
        refused = client.post(CHAT, json=HI, headers=headers)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "*")


ORIGINS = {
    "http://localhost:3000": True,
    "http://127.0.0.1": True,
    "https://[::1]:8080": True,
    "app://obsidian.md": True,
    "tauri://localhost": True,
    "vscode-webview://abc": True,
    "https://chat.example.com": True,
    "null": False,
    "https://evil.example": False,
    "http://localhost.evil.example": False,
    "http://127.0.0.1.evil.example": False,
    "https://chat.example.com.evil.example": False,
    "file://": False,
}


def test_origins_without_a_key(start_api: StartApi) -> None:
    api = start_api(lambda submission: [ScriptedOutput([], "stop")], allowed_origins="https://chat.example.com")
    with api.client() as client:
        for origin, is_allowed in ORIGINS.items():
            headers = {"Origin": origin}
            preflight = client.options(CHAT, headers=headers | {"Access-Control-Request-Method": "POST"})
            response = client.post(CHAT, json=HI, headers=headers)
            assert [preflight.status_code, response.status_code] == ([200, 200] if is_allowed else [403, 403]), origin
            if is_allowed:
                assert response.headers["access-control-allow-origin"] == origin
            else:
                assert "access-control-allow-origin" not in response.headers
                assert f"ALLOWED_ORIGINS={origin}" in response.json()["message"]
        # The page at / of this server, under an address of it; under a public name it may be anybody's.
        for host, status in (("10.0.0.5:10000", 200), ("gpu1:10000", 200), ("evil.example:10000", 403)):
            same_origin = {"Host": host, "Origin": f"http://{host}"}
            assert client.post(CHAT, json=HI, headers=same_origin).status_code == status, host


def test_a_form_of_a_web_page_is_refused(start_api: StartApi) -> None:
    """Without an Origin, any content type is taken, as alibaba/rtp-llm does."""
    api = start_api(lambda submission: [ScriptedOutput([], "stop")])
    body = b'{"messages": [{"role": "user", "content": "Hi"}]}'
    with api.client() as client:
        for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            headers = {"Content-Type": content_type}
            assert client.post(CHAT, content=body, headers=headers).status_code == 200
            refused = client.post(CHAT, content=body, headers=headers | {"Origin": "http://localhost"})
            assert (refused.status_code, "application/json" in refused.json()["message"]) == (415, True)
        assert client.post(CHAT, content=body, headers={"Origin": "http://localhost"}).status_code == 415


def test_host_header_on_a_loopback_bind(start_api: StartApi) -> None:
    api = start_api(host="127.0.0.1", allowed_hosts="tunnel.example")
    expected = {"localhost:1": 200, "127.0.0.1": 200, "[::1]:80": 200, "Tunnel.example:443": 200, "evil.example": 403}
    with api.client() as client:
        for host, status in expected.items():
            response = client.get("/v1/models", headers={"Host": host})
            assert response.status_code == status, host
        assert "ALLOWED_HOSTS=evil.example" in response.json()["message"]
    other = start_api(host="127.0.0.1", api_key="k")
    with other.client() as client:
        assert client.get("/v1/models", headers={"Host": "evil.example", "x-api-key": "k"}).status_code == 200


def test_admin_routes_without_any_key_answer_local_programs_only(start_api: StartApi) -> None:
    api = start_api()
    with api.client() as client:
        assert client.get("/doctor").status_code == 404  # it has not run
        for header in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"):
            assert client.get("/doctor", headers={header: "10.0.0.9"}).status_code == 403, header
        assert client.get("/doctor", headers={"Host": "evil.example"}).status_code == 403


def test_head_works_where_get_does(start_api: StartApi) -> None:
    api = start_api()
    api.write_gang_status()
    with api.client() as client:
        for path in ("/health", "/liveness", "/metrics", "/v1/models", "/", "/docs", "/openapi.json"):
            got, head = client.get(path), client.head(path)
            assert (head.status_code, head.content) == (got.status_code, b""), path
            assert head.headers["content-type"] == got.headers["content-type"]


def test_docs_load_nothing_from_elsewhere(start_api: StartApi) -> None:
    page = start_api().get("/docs").text
    assert CHAT in page
    assert "messages" in page
    assert "//" not in page.replace("<!doctype", "")
    assert "<script" not in page


def test_answers_of_a_draining_part_end_the_connection(start_api: StartApi) -> None:
    api = start_api()
    with api.client() as client:
        assert "connection" not in client.get("/liveness").headers
        api.state.is_draining = True
        for path in ("/liveness", "/health", "/v1/models", "/unknown"):
            assert client.get(path).headers["connection"] == "close", path


def config_of(path: Path) -> Config:
    return Config.model_validate({"api_key_file": str(path)})


def test_keys_are_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team\nalice:key-a\n\nkey-b\n")
    keyring = Keyring.from_config(config_of(path))
    digests = [hashlib.sha256(key).digest() for key in (b"key-a", b"key-b")]
    assert keyring.api == (NamedKey("alice", digests[0]), NamedKey("api2", digests[1]))
    assert Keyring.from_config(config_of(Path("/dev/null"))) == Keyring()
    for text in ("", "# nothing\n", "two words\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="API_KEY_FILE=") as raised:
            Keyring.from_config(config_of(path))
        assert "two words" not in str(raised.value)


def test_secrets_are_no_flags() -> None:
    with pytest.raises(ConfigError, match="set API_KEY or API_KEY_FILE instead of --api_key") as raised:
        load(["--api_key", "key-a"], {})
    assert "key-a" not in str(raised.value)
