"""Names of the served model, and its defaults: /v1/models, STRICT_MODEL_NAME, generation_config.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from rtp_llm.config import Config
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.sdk_clients import openai_client

CHAT, COMPLETION, NATIVE = "/v1/chat/completions", "/v1/completions", "/"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    COMPLETION: {"prompt": "a"},
    NATIVE: {"prompt": "a"},
}
NAMES = ["fake", "org/name", "a b"]


def ends_at_once(submission: Submission) -> list[ScriptedOutput]:
    return [ScriptedOutput([], "length")]


@pytest.fixture
def api(start_api: StartApi) -> ApiServer:
    return start_api(ends_at_once, served_model_name="fake, org/name,a b", strict_model_name=True)


@pytest.fixture
def client(api: ApiServer) -> Iterator[openai.OpenAI]:
    with openai_client(api.url) as client:
        yield client


def test_models(client: openai.OpenAI, api: ApiServer) -> None:
    """Every name has a card; a name with a slash is found with and without escapes."""
    assert [m.id for m in client.models.list()] == NAMES
    for name in NAMES:
        card = client.models.retrieve(name)
        assert (card.id, card.object) == (name, "model")
    assert api.get("/v1/models/org%2Fname").json() == api.get("/v1/models/org/name").json()
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"
    assert "org/other" in caught.value.message


def test_strict_model_names(client: openai.OpenAI, api: ApiServer, start_api: StartApi) -> None:
    for name in NAMES:
        answer = client.completions.create(model=name, prompt="a")
        assert answer.model == "fake"
    others = {"/v1/responses": {"input": "a"}, "/v1/messages": BODIES[CHAT] | {"max_tokens": 1}}
    for path, body in (BODIES | others | {"/tokenize": {"prompt": "a"}}).items():
        response = api.post(path, body | {"model": "gpt-4"})
        assert response.status_code == 404
        if path == "/v1/messages":  # whose errors have Anthropic's form
            assert "gpt-4" in response.json()["error"]["message"]
            continue
        assert (response.json()["error"]["code"], response.json()["error"]["param"]) == ("model_not_found", "model")
        assert api.post(path, body).status_code == 200
    lenient = start_api(ends_at_once)
    answer = lenient.post(CHAT, BODIES[CHAT] | {"model": "gpt-4"}).json()
    assert answer["model"] == "fake", "an answer names the served model"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/models/demo", ("demo",)),
        ("/models/.demo", ("demo",)),
        ("/hub/models--org--name/snapshots/0123abcd", ("org/name",)),
        ("/hub/models--name/snapshots/0123abcd", ("name",)),
        ("/hub/models--org--a--b/snapshots/0123abcd/", ("org/a--b",)),
        ("/models/snapshots/x", ("x",)),
    ],
)
def test_the_name_of_a_checkpoint(path: str, names: tuple[str, ...]) -> None:
    assert Config.model_validate({"checkpoint_path": path}).served_model_names == names
    several = {"checkpoint_path": path, "served_model_name": " a, b/c,"}
    assert Config.model_validate(several).served_model_names == ("a", "b/c")


# generation_config.json


@pytest.fixture
def start_with(start_api: StartApi, byte_model: ByteModel, tmp_path: Path) -> Any:
    def start(content: dict[str, Any]) -> ApiServer:
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps(content))
        return start_api(ends_at_once, generation_config_path=str(path))

    return start


def params(api: ApiServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = api.post(path, BODIES[path] | body)
    assert response.status_code == 200, response.text
    return api.engine.next_submission().params


FILE = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.05}


@pytest.mark.parametrize("path", BODIES)
def test_the_order_of_defaults(path: str, start_with: Any) -> None:
    """A parameter is the request's, else the file's, else the endpoint's."""
    api = start_with(FILE | {"max_new_tokens": 100})
    assert params(api, path, {}).items() >= (FILE | {"max_tokens": 100}).items()
    request = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    limit = {"max_new_tokens" if path == NATIVE else "max_tokens": 200}
    assert params(api, path, request | limit).items() >= (request | {"max_tokens": 200}).items(), "no ceiling"


@pytest.mark.parametrize("path", BODIES)
def test_a_model_that_does_not_sample(path: str, start_with: Any) -> None:
    api = start_with({"do_sample": False, "temperature": 0.6})
    assert params(api, path, {})["temperature"] == 0.0
    assert params(api, path, {"temperature": 0.9})["temperature"] == 0.9
    api = start_with({})
    assert params(api, path, {})["temperature"] == {CHAT: 0.7}.get(path, 1.0)


def test_native_do_sample(start_with: Any) -> None:
    api = start_with({"temperature": 0.6})
    assert params(api, NATIVE, {"do_sample": False})["temperature"] == 0.0
    assert params(api, NATIVE, {"do_sample": True})["temperature"] == 0.6
    assert params(api, CHAT, {"extra_configs": {"do_sample": False}})["temperature"] == 0.0
    assert params(api, CHAT, {"extra_configs": {"top_k": 5}}).items() >= {"top_k": 5, "temperature": 0.6}.items()
