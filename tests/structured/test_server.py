"""Structured output as clients ask for it, from a served model with random weights and two ranks."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import jsonschema_rs
import pytest
from pydantic import BaseModel, Field

from tests.api.servers import ServerProcess, running_server
from tests.quick import slow_except
from tests.sdk_clients import openai_client
from tests.structured.schemas import closed

SCHEMA = closed({"n": {"type": "integer", "minimum": 10, "maximum": 99}, "kind": {"enum": ["a", "b"]}})
PATTERN = "[a-c]{3,5}-[0-9]{2}"
CHOICES = ["yes", "no", "perhaps"]
GBNF = 'root ::= "item " [0-9] [0-9]'
TAGS = {
    "type": "structural_tag",
    "structures": [{"begin": "<f=", "schema": SCHEMA, "end": ">"}],
    "triggers": ["<f="],
}
TEXT_SCHEMA = json.dumps(SCHEMA)


def is_valid(text: str) -> bool:
    return jsonschema_rs.validator_for(SCHEMA).is_valid(json.loads(text))


def matches(pattern: str) -> Any:
    return lambda text: re.fullmatch(pattern, text)


def is_choice(text: str) -> bool:
    return text in CHOICES


# (fields, whether a text is right)
SPELLINGS: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, is_valid),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        is_valid,
    ),
    ({"structured_outputs": {"json": SCHEMA}}, is_valid),
    (
        {"structured_outputs": {"json": TEXT_SCHEMA, "disable_any_whitespace": True}},
        matches(r'\{"n":\d+,"kind":"[ab]"\}'),
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": "~"}},
        matches(r'\{~?"n"~?:~?\d+~?,~?"kind"~?:~?"[ab]"~?\}'),
    ),
    ({"structured_outputs": {"regex": PATTERN}}, matches(PATTERN)),
    ({"structured_outputs": {"choice": CHOICES}}, is_choice),
    ({"structured_outputs": {"grammar": GBNF}}, matches(r"item \d\d")),
    ({"guided_json": SCHEMA}, is_valid),
    ({"guided_json": TEXT_SCHEMA, "guided_decoding_backend": "outlines"}, is_valid),
    ({"guided_regex": PATTERN}, matches(PATTERN)),
    ({"guided_choice": CHOICES}, is_choice),
    ({"guided_grammar": GBNF}, matches(r"item \d\d")),
    ({"json_schema": TEXT_SCHEMA}, is_valid),
    ({"json_schema": SCHEMA}, is_valid),
    ({"regex": PATTERN}, matches(PATTERN)),
    ({"ebnf": GBNF}, matches(r"item \d\d")),
]
OBJECTS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"json_object": True}},
    {"guided_json_object": True},
]
NEUTRAL: list[dict[str, Any]] = [
    {"response_format": {"type": "text"}},
    {"response_format": None, "guided_json": None, "guided_choice": [], "guided_regex": "", "json_schema": {}},
    {"structured_outputs": {}, "guided_json_object": False, "regex": "", "ebnf": None, "structural_tag": None},
]
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_json": {"not": {}}}, "guided_json", '"not"'),
    ({"guided_regex": "a("}, "guided_regex", "unclosed"),
    ({"guided_regex": "a", "regex": "b"}, "regex", "guided_regex and regex"),
    ({"response_format": {"type": "json_object"}, "ebnf": GBNF}, "ebnf", "response_format and ebnf"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "json_object"),
    ({"structured_outputs": {"json": {"format": "zip"}}}, "structured_outputs.json", "zip"),
    ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs.regex", "can follow only one"),
    ({"ebnf": "root := x"}, "ebnf", "GBNF"),
    ({"structural_tag": "{}"}, "structural_tag", "structures"),
    ({"structural_tag": {**TAGS, "triggers": ["<g="]}}, "structural_tag", "<g="),
]


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    output = tmp_path_factory.mktemp("server") / "output"
    with running_server(checkpoint, output, TP_SIZE="2", WORLD_SIZE="2", GENERATION_CONFIG="none") as running:
        yield running


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def post(http: httpx.Client, route: str, fields: dict[str, Any]) -> httpx.Response:
    common = {"max_tokens": 200, "seed": 5, **fields}
    if route == "/v1/chat/completions":
        return http.post(route, json={"messages": [{"role": "user", "content": "Go on."}], **common})
    if route == "/v1/completions":
        return http.post(route, json={"prompt": "Go on.", **common})
    config = {"max_new_tokens": common.pop("max_tokens"), "random_seed": common.pop("seed"), **common}
    return http.post(route, json={"prompt": "Go on.", "generate_config": config})


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    body = response.json()
    if "response" in body:
        return str(body["response"])
    choice = body["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


ROUTES = ("/v1/chat/completions", "/v1/completions", "/")


@pytest.mark.parametrize("route", slow_except(ROUTES, "/v1/chat/completions", "/"))
@pytest.mark.parametrize(
    ("fields", "is_right"), SPELLINGS, ids=lambda value: None if callable(value) else str(value)[:60]
)
def test_every_spelling_on_every_route(http: httpx.Client, route: str, fields: dict[str, Any], is_right: Any) -> None:
    text = text_of(post(http, route, fields))
    assert is_right(text), text


@pytest.mark.parametrize("fields", OBJECTS, ids=str)
def test_json_mode_begins_an_object(http: httpx.Client, fields: dict[str, Any]) -> None:
    """A random model ends no string, so what ends is tested with random logits (`test_schemas`)."""
    response = post(http, "/v1/completions", fields)
    assert response.status_code == 200, response.text
    assert re.match(r'\{\s*("|\})', response.json()["choices"][0]["text"])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_neutral_values_constrain_nothing(http: httpx.Client, route: str, fields: dict[str, Any]) -> None:
    expected = post(http, route, {"max_tokens": 20}).json()
    found = post(http, route, {**fields, "max_tokens": 20}).json()
    assert found.get("choices") == expected.get("choices")
    assert found.get("response") == expected.get("response")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("fields", "param", "message"), REFUSED, ids=lambda value: None if callable(value) else str(value)[:60]
)
def test_what_cannot_be_honoured_is_refused_by_name(
    http: httpx.Client, route: str, fields: dict[str, Any], param: str, message: str
) -> None:
    response = post(http, route, fields)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"].removeprefix("generate_config.") == param
    assert message in error["message"]


@pytest.mark.parametrize("field", ["response_format", "structural_tag"])
def test_structural_tags(http: httpx.Client, field: str) -> None:
    [opening, *_] = http.post("/tokenize", json={"prompt": "<"}).json()["token_ids"]
    fields = {field: TAGS, "logit_bias": {str(opening): 8}, "max_tokens": 400}
    response = post(http, "/v1/completions", fields)
    assert response.status_code == 200, response.text
    assert response.headers.get("x-ignored-fields", "") in ("", "structural_tag.type")


def test_constraints_work_with_n_penalties_and_logprobs(http: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "Go on."}],
        "n": 4,
        "guided_regex": PATTERN,
        "logprobs": True,
        "top_logprobs": 2,
        "presence_penalty": 1.5,
        "min_tokens": 3,
        "temperature": 1.5,
        "ignore_eos": True,
    }
    choices = http.post("/v1/chat/completions", json=body).json()["choices"]
    assert len({choice["message"]["content"] for choice in choices}) > 1
    for choice in choices:
        assert re.fullmatch(PATTERN, choice["message"]["content"])
        assert choice["logprobs"]["content"]


class Step(BaseModel):
    kind: Literal["add", "remove"]
    count: Annotated[int, Field(ge=0, le=99)]


class Plan(BaseModel):
    steps: Annotated[list[Step], Field(max_length=2)]
    is_final: bool


def test_the_openai_sdk_parses_into_a_model(server: ServerProcess) -> None:
    with openai_client(server.url) as client:
        for seed in range(2):
            completion = client.chat.completions.parse(
                model="any",
                messages=[{"role": "user", "content": "Plan."}],
                response_format=Plan,
                seed=seed,
                max_tokens=1500,
            )
            assert isinstance(completion.choices[0].message.parsed, Plan)
        with client.chat.completions.stream(
            model="any",
            messages=[{"role": "user", "content": "Plan."}],
            response_format=Plan,
            seed=9,
            max_tokens=1500,
        ) as stream:
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, Plan)
        response = client.responses.parse(
            model="any", input="Plan.", text_format=Plan, max_output_tokens=1500, temperature=1.0
        )
        assert isinstance(response.output_parsed, Plan)
