"""Fields of requests that no schema declares: refused, accepted or ignored. Neutral values of those that one does."""

import json
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionUserMessageParam
from pydantic import BaseModel, Field

from rtp_llm.api.app import BODY_MODELS
from rtp_llm.api.fields import HINTS, MAX_LOGGED_NAMES, MAX_NAMES, REFUSALS, FieldRecord, recording, set_fields
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.api.schema import ChatRequest, CompletionRequest, GenerateConfig
from rtp_llm.errors import RequestError
from rtp_llm.text.output_format import AnswerFormats
from rtp_llm.text.template import ChatTemplate
from rtp_llm.text.tokenizer import Tokenizer
from tests import random_model
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.sdk_clients import openai_client

CHAT, COMPLETION, NATIVE = "/v1/chat/completions", "/v1/completions", "/"
HI: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {CHAT: {"messages": HI}, COMPLETION: {"prompt": "a"}, NATIVE: {"prompt": "a"}}
MODELS: dict[str, type[BaseModel]] = {CHAT: ChatRequest, COMPLETION: CompletionRequest, NATIVE: GenerateConfig}

# A value of each field that must be honoured or refused: the names are spelled here again, from the clients' documents.
CONSTRAINTS: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "guided_choice": ["a", "b"],
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_grammar": "root ::= 'a'",
    "structured_outputs": {"regex": "a+"},
    "regex": "a+",
    "ebnf": "root ::= 'a'",
    "json_schema": {"type": "object"},
    "structural_tag": {"structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}], "triggers": ["<a"]},
    "bad_words": ["x"],
    "bad_words_list": [[1]],
    "allowed_token_ids": [1],
    "use_beam_search": True,
    "best_of": 3,
    "num_beams": 2,
    "truncate_prompt_tokens": 5,
    "chat_template": "{{ x }}",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "no_repeat_ngram_size": 2,
    "logits_processors": ["x"],
    "lora_path": "x",
}


@pytest.fixture(scope="module")
def api(byte_model: ByteModel) -> Iterator[ApiServer]:
    with ApiServer(byte_model, lambda submission: [ScriptedOutput([], "length")]) as api:
        yield api


def ignored(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    header = response.headers.get("x-ignored-fields", "")
    return sorted(header.split(", ")) if header else []


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_constraint_is_honoured_or_refused_by_name(path: str, name: str, api: ApiServer) -> None:
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    body = BODIES[path] | ({"prompt": "abcdefgh"} if "prompt" in BODIES[path] else {})
    response = api.post(path, body | {name: CONSTRAINTS[name]})
    if response.status_code == 200 and name in MODELS[path].model_fields:
        submission = api.engine.next_submission()
        values = [submission.params[n] for n in ("grammar", "bad_words", "allowed_token_ids")]
        assert any(values) or len(submission.prompt) == CONSTRAINTS["truncate_prompt_tokens"]
        return
    assert response.status_code == 400, f"{name} was ignored"
    assert response.json()["error"]["param"] == name
    assert name in response.json()["message"]


@pytest.mark.parametrize("path", BODIES)
def test_neutral_constraints_are_not_set(path: str, api: ApiServer) -> None:
    values: tuple[Any, ...] = (None, False, "", [], {})
    for neutral in values:
        names = [n for n in CONSTRAINTS if n not in MODELS[path].model_fields and REFUSALS[n].default is not True]
        assert ignored(api.post(path, BODIES[path] | dict.fromkeys(names, neutral))) == []
    defaults = {n: r.default for n, r in REFUSALS.items() if n not in MODELS[path].model_fields and r.default}
    for choose in (min, max):
        chosen = {n: choose(value) if isinstance(value, tuple) else value for n, value in defaults.items()}
        assert ignored(api.post(path, BODIES[path] | chosen)) == []


@pytest.mark.parametrize("path", BODIES)
def test_empty_constraints_of_any_type_are_not_set(path: str, api: ApiServer) -> None:
    nested = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
    names = [n for n in CONSTRAINTS if n in MODELS[path].model_fields]
    empty: tuple[Any, ...] = (False, "", [], {})
    for value in empty:
        body = BODIES[path] | dict.fromkeys(names, value) | {"max_tokens": 1, "max_new_tokens": 1}
        for constraints in (body, body | {"structured_outputs": dict.fromkeys(nested, value)}):
            while api.engine.num_pending_submissions:
                api.engine.next_submission()
            response = api.post(path, constraints)
            assert response.status_code == 200, response.text
            params = api.engine.next_submission().params
            assert not any(params[n] for n in ("grammar", "bad_words", "allowed_token_ids"))
    response = api.post(path, BODIES[path] | {"guided_regex": 1})
    assert response.json()["error"]["param"] == "guided_regex"


def test_tools_that_must_not_be_called_need_none(api: ApiServer) -> None:
    assert api.post(COMPLETION, BODIES[COMPLETION] | {"tool_choice": "none"}).status_code == 200
    assert api.post(COMPLETION, BODIES[COMPLETION] | {"tool_choice": "required"}).status_code == 400


def test_best_of_is_no_beam_search(api: ApiServer) -> None:
    for path in (CHAT, COMPLETION):
        message = api.post(path, BODIES[path] | {"best_of": 3}).json()["message"]
        assert "best_of" in message
        assert "beam" not in message


def test_tokenize_takes_a_prompt_or_messages(api: ApiServer) -> None:
    response = api.post("/tokenize", {"prompt": "a", "messages": HI})
    assert response.status_code == 400
    assert "prompt and messages" in response.json()["message"]


def test_false_is_not_neutral_where_the_default_is_true(api: ApiServer) -> None:
    assert api.post(COMPLETION, {"prompt": "a", "detokenize": True}).status_code == 200
    assert api.post(COMPLETION, {"prompt": "a", "detokenize": None}).status_code == 200
    response = api.post(COMPLETION, {"prompt": "a", "detokenize": False})
    assert response.json()["error"]["param"] == "detokenize"


@pytest.mark.parametrize("path", BODIES)
def test_a_nested_constraint(path: str, api: ApiServer) -> None:
    nested = {CHAT: "extra_configs", NATIVE: "generate_config"}.get(path)
    if nested is None:
        return
    response = api.post(path, BODIES[path] | {nested: {"no_repeat_ngram_size": 3}})
    assert response.status_code == 400
    assert response.json()["error"]["param"].endswith("no_repeat_ngram_size")


@pytest.mark.parametrize("path", BODIES)
def test_hints_are_accepted_in_silence(path: str, api: ApiServer) -> None:
    body = BODIES[path] | dict.fromkeys(HINTS - {"model"}, "x")
    body |= {"metadata": {"a": "b"}, "store": True, "prediction": {"type": "content", "content": "x"}}
    body |= {"thinking": {"type": "disabled"}, "reasoning_effort": "low"}
    assert ignored(api.post(path, body)) == []


@pytest.mark.parametrize("path", BODIES)
def test_other_fields_are_ignored_counted_and_named(
    path: str, api: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    name = f"made_up_{len(path)}"
    labels = {"model_name": "fake", "field": name}
    for count in (1, 2):
        assert ignored(api.post(path, BODIES[path] | {name: {"a": 1}, "include": ["x"]})) == ["include", name]
        assert api.metric("rtp_llm_ignored_request_fields_total", **labels) == count
    assert sum(name in r.getMessage() for r in caplog.records if r.name == "rtp_llm.api.fields") == 1


def test_ignored_fields_of_nested_objects(api: ApiServer) -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    tool_call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = {
        "messages": [
            {"role": "user", "content": [part], "id": 1},
            {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "id": 2, "annotations": []},
            {"role": "assistant", "content": "b", "tool_calls": [tool_call]},
            {"role": "tool", "content": "c", "tool_call_id": "c"},
        ],
        "stream_options": {"include_usage": True, "include_obfuscation": False, "a": 1},
        "extra_configs": {"top_k": 1, "b": 2},
    }
    expected = ["extra_configs.b", "messages.content.cache_control", "messages.id", "messages.tool_calls"]
    assert ignored(api.post(CHAT, body)) == [*expected, "stream_options.a"]


def test_every_route_names_ignored_fields(api: ApiServer) -> None:
    turn = {"role": "user", "content": "a", "x": 1}
    for path in (NATIVE, "/tokenize"):
        assert ignored(api.post(path, {"messages": [turn]})) == ["messages.x"]
    assert ignored(api.post("/v1/responses", {"input": "a", "x": 1, "text": {"verbosity": "low", "y": 1}})) == [
        *("text.y", "x")
    ]
    body = {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}
    assert ignored(api.post("/v1/messages", body)) == ["messages.content.x"]
    assert ignored(api.post("/tokenize", {"prompt": "a", "x": 1})) == ["x"]
    assert ignored(api.post("/tokenizer/encode", {"prompt": "a", "x": 1})) == ["x"]
    assert ignored(api.post("/chat/render", {"messages": HI, "x": 1})) == ["x"]
    assert ignored(api.post("/batch_infer", {"prompt_batch": ["a"], "x": 1, "generate_config": {"y": 1}})) == ["x", "y"]
    assert ignored(api.post("/set_log_level", {"log_level": "INFO", "x": 1})) == ["x"]
    with api.open_stream(CHAT, {"messages": HI, "stream": True, "x": 1}) as response:
        assert ignored(response) == ["x"]


def test_a_chat_request_can_be_tokenized(api: ApiServer) -> None:
    """What constrains an answer does not change the number of tokens of the prompt."""
    body = {"messages": HI, "temperature": 1, "response_format": {"type": "json_object"}}
    assert ignored(api.post("/tokenize", body)) == ["response_format", "temperature"]
    assert api.post("/tokenize", body | {"chat_template": "x"}).status_code == 400


def test_strict_fields(start_api: StartApi) -> None:
    api = start_api(lambda submission: [ScriptedOutput([], "length")], strict_fields=True)
    for path, body in BODIES.items():
        assert api.post(path, body | {"user": "x"}).status_code == 200
        response = api.post(path, body | {"made_up": 1, "other": 2})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "made_up"
        for substring in ("made_up", "other", "STRICT_FIELDS"):
            assert substring in response.json()["message"]
    assert api.post("/set_log_level", {"log_level": "INFO", "x": 1}).status_code == 400


def test_a_million_unknown_fields(api: ApiServer) -> None:
    """The header, the log and the metric stay short, whatever a client sends."""
    fields = ", ".join(f'"field{i}{"x" * 100 if i < 9 else ""}": {i}' for i in range(500_000))
    with api.client(timeout=60.0) as client:
        response = client.post(COMPLETION, content=f'{{"prompt": "a", {fields}}}'.encode())
    assert response.status_code == 200
    assert len(response.headers["x-ignored-fields"]) < 2000
    assert response.headers["x-ignored-fields"].endswith(", ...")


@pytest.mark.parametrize("depth", [100, 200, 400])
def test_deep_nesting_where_a_schema_contains_itself(depth: int, api: ApiServer) -> None:
    content = '[{"type": "tool_result", "tool_use_id": "a", "content": ' * depth + '"a"' + "}]" * depth
    with api.client() as client:
        body = f'{{"max_tokens": 1, "messages": [{{"role": "user", "content": {content}}}]}}'
        assert client.post("/v1/messages", content=body.encode()).status_code == 400


def test_names_are_bounded() -> None:
    found = FieldRecord()
    found.add("a.", (str(i) for i in range(1000)))
    assert len(found.names) == MAX_NAMES
    assert str(found).endswith("a.15, ...")
    found = FieldRecord()
    found.add("", ["x\r\ny: ä,", "x\r\ny: ä,"])
    assert str(found) == "x??y:???"


def test_labels_of_the_metric_are_bounded(api: ApiServer) -> None:
    for start in range(0, MAX_LOGGED_NAMES + 2 * MAX_NAMES, MAX_NAMES):
        fields = {f"junk{i}": 1 for i in range(start, start + MAX_NAMES)}
        assert api.post("/tokenize", {"prompt": "a", **fields}).status_code == 200
    assert api.metric("rtp_llm_ignored_request_fields_total", model_name="fake", field="other") >= MAX_NAMES
    series = [s for m in api.metrics.registry.collect() for s in m.samples if s.name.startswith("rtp_llm_ignored_req")]
    assert len(series) <= MAX_LOGGED_NAMES + 1


def test_fields_are_known_by_their_names_in_json() -> None:
    """Those of pydantic's aliases, which keep a field such as `schema` from hiding a method. Nested words are free."""

    class Format(BaseModel):
        schema_: dict[str, Any] | None = Field(None, alias="schema")
        content: "list[Format] | str | None" = None

    class Body(BaseModel):
        format: Format | None = None

    data = {"format": {"schema": {"const": None}, "content": [{"schema": None, "regex": "a"}], "schema_": 1}}
    with recording() as found:
        assert set_fields(Body, data) == {
            "format": {"schema": {"const": None}, "content": [{"regex": "a"}], "schema_": 1}
        }
    assert found.names == ["format.schema_", "format.content.regex"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
NAMES_OF_FIELDS = st.sampled_from([*REFUSALS, *HINTS, *(n for m in BODY_MODELS for n in m.model_fields), "x"])


@cache
def declared_objects(model: type[BaseModel]) -> set[str]:
    """Returns the names of fields that are objects with declared fields, whose nulls are not set either."""
    fields = model.model_json_schema()["properties"]
    return {name for name, field in fields.items() if len(set(re.findall(r"#/\$defs/\w+", json.dumps(field)))) == 1}


@settings(max_examples=150, deadline=None)
@example(ChatRequest, {"response_format": {"type": None}})
@example(ChatRequest, {"structured_outputs": {"json": None, "regex": None}})
@given(model=st.sampled_from(BODY_MODELS), data=st.dictionaries(NAMES_OF_FIELDS, JSON, max_size=6))
def test_the_rule_on_any_object(model: type[BaseModel], data: dict[str, Any]) -> None:
    """It refuses what it names, keeps the other values, and records the names that stand in no list."""
    error, values = None, {}
    with recording() as found:
        try:
            values = set_fields(model, data)
        except RequestError as refusal:
            error = refusal
    if error:
        assert (error.status, (error.param or "").split(".")[0] in data) == (400, True)
        return
    refusals = getattr(model, "refusals", REFUSALS)
    constraints = {name: refusals[name].default for name in model.model_fields if name in refusals}
    without_nulls = data | {
        name: {key: value for key, value in data[name].items() if value is not None}
        for name in declared_objects(model) & data.keys()
        if isinstance(data[name], dict)
    }
    is_set = {
        name
        for name, value in without_nulls.items()
        if value is not None
        and (name not in constraints or isinstance(value, (int, float)) or value)
        and (value is not False or constraints.get(name, True) is True)
    }
    assert values.keys() == is_set
    assert set_fields(model, values) == values
    known = {*model.model_fields, *HINTS, *getattr(model, "refusals", REFUSALS)}
    passes_on = model.model_config.get("extra") == "allow"
    assert {name for name in found.names if "." not in name} == (set() if passes_on else is_set - known)


def test_nothing_is_recorded_without_a_request() -> None:
    set_fields(ChatRequest, {"x": 1})
    with recording() as found:
        assert set_fields(ChatRequest, {"n": None, "messages": [{"content": None, "name": None}]}) == {
            "messages": [{"content": None}]
        }
    assert found.names == []


# Neutral values


def submitted(api: ApiServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    response = api.post(path, BODIES[path] | body)
    assert response.status_code == 200, response.text
    return api.engine.next_submission().params


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": -1, "max_new_tokens": -1},
        {"stop": "", "stop_words_str": []},
        {"stop": [""]},
        {"stop": []},
        {"tools": []},
        {"tool_choice": "auto"},
        {"logprobs": None, "top_logprobs": 0},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": None}, "aux_info": None, "add_generation_prompt": None},
        {"n": None, "temperature": None, "top_p": None, "stop": None, "max_tokens": None, "logit_bias": None},
        {"model": None, "user": None, "extra_configs": None, "generate_config": None},
    ],
    ids=str,
)
def test_values_that_mean_not_set(path: str, body: dict[str, Any], api: ApiServer) -> None:
    expected = submitted(api, path, {"seed": 5, "random_seed": 5})
    assert submitted(api, path, {"seed": 5, "random_seed": 5, **body}) == expected


@pytest.mark.parametrize(("path", "name"), [(CHAT, "seed"), (COMPLETION, "seed"), (NATIVE, "random_seed")])
def test_a_seed_of_minus_one_is_random(path: str, name: str, api: ApiServer) -> None:
    seeds = {submitted(api, path, {name: -1})["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert submitted(api, path, {name: -2})["seed"] == -2


def test_a_top_p_of_zero(api: ApiServer) -> None:
    for path in (CHAT, COMPLETION):
        assert submitted(api, path, {"top_p": 0})["temperature"] == 0.0
        assert submitted(api, path, {"top_p": 0.0, "temperature": 1.5})["temperature"] == 0.0
    native = submitted(api, NATIVE, {"top_p": 0})
    assert (native["temperature"], native["top_p"]) == (1.0, 1.0)
    chat = submitted(api, CHAT, {"extra_configs": {"top_p": 0}})
    assert (chat["temperature"], chat["top_p"]) == (0.7, 1.0)


# Error messages


@pytest.mark.parametrize(
    ("path", "body", "param", "substring"),
    [
        (COMPLETION, {"prompt": {}}, "prompt", "string or a valid list"),
        (COMPLETION, {"prompt": [[False]]}, "prompt[0][0]", "valid integer"),
        (COMPLETION, {"prompt": [[1], [2, True]]}, "prompt[1][1]", "valid integer"),
        (COMPLETION, {"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        (COMPLETION, {"prompt": ["a", [5]]}, "prompt[1]", "valid string"),
        (COMPLETION, {"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
        (COMPLETION, {"prompt": "a", "stop": 5}, "stop", "string or a valid list"),
        (COMPLETION, {"prompt": "a", "stop": ["a", 5]}, "stop[1]", "valid string"),
        (COMPLETION, {"prompt": "a", "stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        (COMPLETION, {"prompt": None}, "prompt", "Field required"),
        (COMPLETION, {"prompt": "x" * 3000}, "prompt", "maximum context length"),
        (CHAT, {"messages": HI * 1000}, "messages", "maximum context length"),
        (CHAT, {"messages": ""}, "messages", "valid list"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string or a valid list"),
        (CHAT, {"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type", "required"),
        (CHAT, {"messages": [{"role": "user"}, {}]}, "messages[1].role", "Field required"),
        (CHAT, {"messages": HI, "extra_configs": {"top_k": "x"}}, "extra_configs.top_k", "valid integer"),
        (CHAT, {"messages": HI, "logit_bias": {"5": "x"}}, "logit_bias.5", "valid number"),
        (NATIVE, {"prompt": {}}, "prompt", "string or a valid list"),
        (NATIVE, {"prompt": None, "text": []}, "text", "empty"),
        (NATIVE, {"prompt_batch": ["a", "x" * 3000]}, "prompt_batch", "maximum context length"),
        (NATIVE, {"prompt": None, "text": "x" * 3000}, "text", "maximum context length"),
        (NATIVE, {"prompt": None, "messages": HI * 1000}, "messages", "maximum context length"),
        (NATIVE, {"prompt": "a", "stop_words_list": [["a"]]}, "stop_words_list[0][0]", "valid integer"),
    ],
)
def test_an_error_names_the_field_as_sent(
    path: str, body: dict[str, Any], param: str, substring: str, api: ApiServer
) -> None:
    response = api.post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert substring in response.json()["message"]


# Words, tokens, and the length of prompts


def submission(api: ApiServer, path: str, **fields: Any) -> Submission:
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    response = api.post(path, BODIES[path] | fields)
    assert response.status_code == 200, response.text
    return api.engine.next_submission()


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_words_and_tokens_reach_the_engine(path: str, api: ApiServer, byte_model: ByteModel) -> None:
    sent = submission(api, path, bad_words=[" xy", "z", " "], allowed_token_ids=[5, 9])
    assert sent.params["bad_words"] == [byte_model.tokens(word) for word in ("xy", "z", " ")]
    assert sent.params["allowed_token_ids"] == [5, 9]
    for fields, param in (
        ({"allowed_token_ids": [1 << 20]}, "allowed_token_ids"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids[0]"),
        ({"bad_words": ["a", ""]}, "bad_words[1]"),
        ({"bad_words": ["a"] * 1025}, "bad_words"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ):
        response = api.post(path, BODIES[path] | fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("text", ["word", "two words"])
def test_a_word_is_excluded_within_a_text_too(text: str, tmp_path: Path) -> None:
    """Byte-level vocabularies have another token where a space comes before the word."""
    random_model.write(tmp_path / "model")
    tokenizer = Tokenizer.load(tmp_path / "model")
    template = ChatTemplate.select(tokenizer, explicit=None)
    preparation = Preparation(tokenizer, template, AnswerFormats.select(template, tokenizer, "", ""))
    raw = json.dumps({"prompt": "a", "bad_words": [text]}).encode()
    words = preparation.completion(raw, PromptLimits(99, "", 1 << 20, 1, 0, "")).bad_words
    for context in ("", "a ", "In the "):
        ids = tuple(tokenizer.encode(context + text, add_special_tokens=False))
        assert any(ids[-len(word) :] == word for word in words)


def test_the_end_of_a_long_prompt_is_read(api: ApiServer, byte_model: ByteModel) -> None:
    text = "".join(map(str, range(1000)))  # 2,890 tokens; the model reads 2,048
    ids = byte_model.tokens(text)
    for prompt in (text, ids):
        assert submission(api, COMPLETION, prompt=prompt, truncate_prompt_tokens=7).prompt == ids[-7:]
        kept = submission(api, COMPLETION, prompt=prompt, truncate_prompt_tokens=-1, max_tokens=48)
        assert kept.prompt == ids[-2000:]
        assert kept.params["max_tokens"] == 48
        assert submission(api, COMPLETION, prompt=prompt, truncate_prompt_tokens=-1).prompt == ids[-2047:]
        assert api.post(COMPLETION, {"prompt": prompt, "truncate_prompt_tokens": 0}).status_code == 400
    chat = [{"role": "user", "content": text}]
    whole = api.post("/tokenize", {"messages": chat}).json()["tokens"]
    for name in ("max_tokens", "max_completion_tokens"):
        fields = {"messages": chat, "truncate_prompt_tokens": -1, name: 100}
        assert submission(api, CHAT, **fields).prompt == whole[-1948:]
    assert submission(api, CHAT, truncate_prompt_tokens=2000).prompt == submission(api, CHAT).prompt
    response = api.post(CHAT, {"messages": chat, "truncate_prompt_tokens": -1, "max_tokens": 2048})
    assert response.json()["error"]["param"] == "max_tokens"


# With OpenAI's client


@pytest.fixture
def client(api: ApiServer) -> Iterator[openai.OpenAI]:
    with openai_client(api.url) as client:
        yield client


def test_the_sdk_shows_errors_and_ignored_fields(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="x", messages=HI, extra_body={"no_repeat_ngram_size": 2})
    assert caught.value.param == "no_repeat_ngram_size"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="x", prompt="x" * 3000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    for wording in ("prompt is too long", "This model's maximum context length is 2048"):  # LangChain's and litellm's
        assert wording in caught.value.message
    raw = client.chat.completions.with_raw_response.create(
        model="x", messages=HI, user="u", store=True, metadata={"a": "b"}, extra_body={"include": ["x"]}
    )
    assert raw.headers["x-ignored-fields"] == "include"
    response = client.chat.completions.create(model="x", messages=HI, extra_headers={"X-Request-Id": "trace-7"})
    assert response._request_id == "trace-7"
    assert json.loads(raw.text)["model"] == "fake"
