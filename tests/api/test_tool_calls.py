"""Tool calls and reasoning of /v1/chat/completions, judged by the `openai` client; the engine is a script of tokens of
one byte each.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from rtp_llm.errors import ConfigError
from rtp_llm.text.output_format import AnswerFormats
from rtp_llm.text.template import ChatTemplate
from tests.api.api_server import ApiServer
from tests.api.byte_model import TEMPLATE, ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput
from tests.api.servers import ServerProcess
from tests.api.sse import payloads
from tests.api.test_messages import answering
from tests.sdk_clients import openai_client

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"messages": MESSAGES}
HERMES = (
    'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
CALLS = [("get_weather", '{"city": "Zürich"}'), ("now", "{}")]


@pytest.fixture
def api(start_api: StartApi) -> ApiServer:
    return start_api()


def answer(api: ApiServer, text: str, **body: Any) -> dict[str, Any]:
    """Returns the choice of an answer that is `text`. Asserts that a stream of it, in any steps, has the same."""
    api.engine.script = answering(api.model, text)
    response = api.post("/v1/chat/completions", {**CHAT, **body})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    for step in (1, 7, 1000):
        api.engine.script = answering(api.model, text, step=step)
        assert streamed_choice(api, body) == choice
    return choice


def streamed_choice(api: ApiServer, body: dict[str, Any]) -> dict[str, Any]:
    """Returns the whole choice that a stream amounts to."""
    events = payloads(api.stream("/v1/chat/completions", {**CHAT, **body, "stream": True}))
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: list[dict[str, Any]] = []
    for delta in (choice["delta"] for event in events[:-1] for choice in event["choices"]):
        for name in ("content", "reasoning", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for piece in delta.get("tool_calls", ()):
            if piece["index"] == len(calls):
                calls.append({"id": piece["id"], "type": piece["type"], "function": {**piece["function"]}})
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    if calls:
        message |= {"content": message["content"] or None, "tool_calls": calls}
    finish = events[-2]["choices"][0]["finish_reason"]
    return ChoiceWithoutIds(index=0, message=message, logprobs=None, finish_reason=finish)


class ChoiceWithoutIds(dict[str, Any]):
    """Equals a choice whose calls have other ids, since they are random."""

    def __eq__(self, other: object) -> bool:
        return without_ids(self) == without_ids(other)

    __hash__ = None  # type: ignore[assignment]


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_ids(item) for key, item in value.items() if key != "id"}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]


def test_calls_and_the_text_before_them(api: ApiServer) -> None:
    choice = answer(api, HERMES, tools=[WEATHER, NOW])
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == ("I look.", "tool_calls")
    assert calls_of(message) == CALLS
    ids = [call["id"] for call in message["tool_calls"]]
    assert all(call_id.startswith("call_") for call_id in ids)
    assert len(set(ids)) == 2


def test_content_is_null_if_there_is_none(api: ApiServer) -> None:
    assert answer(api, HERMES.removeprefix("I look."), tools=[WEATHER])["message"]["content"] is None


@pytest.mark.parametrize("body", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_tools_calls_are_text(api: ApiServer, body: dict[str, Any]) -> None:
    choice = answer(api, HERMES, **body)
    assert choice["message"] == {"role": "assistant", "content": HERMES}
    assert choice["finish_reason"] == "stop"


def test_an_answer_without_calls_has_no_tool_calls(api: ApiServer) -> None:
    choice = answer(api, "Sunny, <tool_call> or so.\n", tools=[WEATHER])
    assert choice["message"] == {"role": "assistant", "content": "Sunny, <tool_call> or so.\n"}
    assert choice["finish_reason"] == "stop"


def test_a_call_that_max_tokens_cuts_off_finishes_with_length(api: ApiServer) -> None:
    api.engine.script = answering(api.model, HERMES[: HERMES.index("ürich")], finish="length")
    choice = api.post("/v1/chat/completions", {**CHAT, "tools": [WEATHER]}).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert calls_of(choice["message"]) == [("get_weather", '{"city": "Z')]


def test_a_call_that_max_tokens_cuts_off_before_its_name_stays_text(api: ApiServer) -> None:
    """As in vLLM: without a name there is no call that could be told, and no text is lost."""
    text = HERMES[: HERMES.index("t_weather")]
    api.engine.script = answering(api.model, text, finish="length")
    choice = api.post("/v1/chat/completions", {**CHAT, "tools": [WEATHER]}).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"] == {"role": "assistant", "content": text}


def test_the_openai_client_accumulates_a_stream(api: ApiServer) -> None:
    api.engine.script = answering(api.model, HERMES, step=1)
    tools: list[Any] = [WEATHER, NOW]
    with (
        openai_client(api.url) as client,
        client.chat.completions.stream(model="m", messages=MESSAGES, tools=tools) as stream,
    ):
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        [choice] = stream.get_final_completion().choices
    assert len(deltas) > len('{"city": "Z"}')  # they come as they are written
    assert choice.message.content == "I look."
    assert [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()] == CALLS
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_complete(api: ApiServer, stream: bool) -> None:
    """Each token has its logprob, whichever part of the answer its text belongs to."""
    tokens = api.model.tokens(HERMES)
    outputs = [ScriptedOutput([token], None, [(-0.5, 1, [])]) for token in tokens[:-1]]
    outputs.append(ScriptedOutput(tokens[-1:], "stop", [(-0.5, 1, [])]))
    api.engine.script = lambda submission: outputs
    body = {**CHAT, "tools": [WEATHER], "logprobs": True}
    if stream:
        events = payloads(api.stream("/v1/chat/completions", {**body, "stream": True}))[:-1]
        choices = [choice for event in events for choice in event["choices"]]
    else:
        choices = api.post("/v1/chat/completions", body).json()["choices"]
    logprobs = [item for choice in choices if choice["logprobs"] for item in choice["logprobs"]["content"]]
    assert [item["bytes"] for item in logprobs] == [[byte] for byte in HERMES.encode()]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "no tools"),
        ({"tool_choice": "required", "tools": [{"type": "web_search"}]}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice", "'now'"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [NOW]},
            "tool_choice",
            "allowed: now",
        ),
        ({"tool_choice": {"type": "function"}, "tools": [NOW]}, "tool_choice", "function"),
        ({"tool_choice": {"type": "custom"}, "tools": [NOW]}, "tool_choice", "allowed"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": 1}, "tools": [NOW]}, "tool_choice", "allowed"),
        ({"tools": [{"type": "function"}]}, "tools.0", "function"),
        ({"tools": [NOW, {"type": "function", "function": {"name": ""}}]}, "tools.1.function.name", "allowed"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "allowed"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
            "tools.0.function.parameters",
            "schema",
        ),
    ],
)
def test_what_is_impossible_is_refused(api: ApiServer, body: dict[str, Any], param: str, message: str) -> None:
    response = api.post("/v1/chat/completions", {**CHAT, **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_tools_of_another_kind_are_left_out(tmp_path: Path) -> None:
    model = ByteModel(tmp_path, "{% for tool in tools %}{{ tool.type }} {% endfor %}" + TEMPLATE)
    with ApiServer(model, answering(model, "Hi")) as api:
        body = {**CHAT, "tools": [{"type": "web_search"}, NOW]}
        assert api.post("/chat/render", body).json()["input_prompt"].startswith("function <|turn|>user")


def test_a_large_request_is_prepared_in_another_process(api: ApiServer) -> None:
    tool = {"type": "function", "function": {**WEATHER["function"], "description": "x" * (100 << 10)}}
    assert calls_of(answer(api, HERMES, tools=[tool])["message"]) == CALLS


def test_markers_that_are_special_tokens(tmp_path: Path) -> None:
    """The parser sees them, content does not, unless the request asks for special tokens."""
    model = ByteModel(tmp_path, TEMPLATE + "{#- [TOOL_CALLS] -#}", ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"])
    with ApiServer(model) as api:
        text = 'I look.[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}'
        message = answer(api, text, tools=[NOW])["message"]
        assert message["content"] == "I look."
        assert calls_of(message) == [("now", "{}"), ("get_weather", '{"city": "Rome"}')]
        assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in message["tool_calls"])
        assert answer(api, "a[TOOL_CALLS] b[ARGS]", tools=[NOW])["message"]["content"] == "a b"
        assert answer(api, "a[TOOL_CALLS] b", tools=[NOW], skip_special_tokens=False)["message"]["content"] == (
            "a[TOOL_CALLS] b"
        )
        assert answer(api, text)["message"]["content"] == 'I look.now{}get_weather{"city": "Rome"}'


# Grammars


def submitted_grammar(api: ApiServer, **body: Any) -> str:
    """Returns the grammar that the engine gets."""
    api.engine.script = answering(api.model, "x")
    response = api.post("/v1/chat/completions", {**CHAT, **body})
    assert response.status_code == 200, response.text
    submission = api.engine.next_submission()
    while api.engine.num_pending_submissions:  # others came before
        submission = api.engine.next_submission()
    grammar: str = submission.params["grammar"]
    return grammar


def accepts(grammar: str, text: str) -> bool:
    """Returns whether a grammar matches a text as a whole."""
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.get_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NOW_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
BAD_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"town": 1}}\n</tool_call>'
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"function": {"name": "now"}}]}}


@pytest.mark.parametrize(
    ("body", "allowed", "refused"),
    [
        ({"tool_choice": "required"}, [CALL, f"{CALL}\n{NOW_CALL}"], ["Hi", BAD_CALL]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL], [f"{CALL}\n{NOW_CALL}"]),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, [NOW_CALL], [CALL, "Hi"]),
        ({"tool_choice": ALLOWED}, [NOW_CALL], [CALL, "Hi"]),
        ({"tools": [STRICT, NOW]}, ["Hi", CALL, f"Hi {CALL} {NOW_CALL}."], [f"Hi {BAD_CALL}"]),
        ({"parallel_tool_calls": False}, ["Hi", f"Hi {CALL}"], [f"{CALL}{NOW_CALL}"]),
        ({"response_format": SCHEMA}, ["12", CALL], ["Hi", BAD_CALL]),
        ({"response_format": SCHEMA, "tool_choice": "none"}, ["12"], [CALL]),
    ],
)
def test_what_must_be_called_is_a_grammar(
    api: ApiServer, body: dict[str, Any], allowed: list[str], refused: list[str]
) -> None:
    grammar = submitted_grammar(api, **{"tools": [WEATHER, NOW], **body})
    assert [accepts(grammar, text) for text in allowed] == [True] * len(allowed)
    assert [accepts(grammar, text) for text in refused] == [False] * len(refused)


@pytest.mark.parametrize("body", [{}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"tool_choice": "none"}])
def test_a_choice_of_the_model_needs_no_grammar(api: ApiServer, body: dict[str, Any]) -> None:
    assert submitted_grammar(api, tools=[WEATHER, NOW], **body) == ""


def test_a_strict_tool_that_cannot_be_enforced_is_refused(api: ApiServer) -> None:
    function = {"name": "f", "strict": True, "parameters": {"type": "object", "if": {"required": ["a"]}}}
    body = {**CHAT, "tools": [{"type": "function", "function": function}]}
    response = api.post("/v1/chat/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    assert '"if"' in response.json()["error"]["message"]
    function["strict"] = False
    assert submitted_grammar(api, **body, tool_choice="required")


def test_a_real_engine_makes_the_forced_calls(server: ServerProcess) -> None:
    """The model has random weights: whatever it says is a call of an existing function with valid arguments."""
    properties = {"city": {"enum": ["Rome", "Zürich"]}, "days": {"type": "integer"}}
    places: dict[str, Any] = {"type": "object", "properties": properties, "required": ["city"]}
    places["additionalProperties"] = False
    tools: list[Any] = [{"type": "function", "function": {"name": "get_weather", "parameters": places}}, NOW]
    with openai_client(server.url) as client:
        for seed in range(4):
            options: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "tools": tools, "seed": seed}
            options |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
            [choice] = client.chat.completions.create(**options).choices
            assert choice.finish_reason == "tool_calls"
            [call] = choice.message.tool_calls
            arguments = json.loads(call.function.arguments)
            assert call.function.name == "now" or arguments["city"] in ("Rome", "Zürich")
            with client.chat.completions.stream(**options) as stream:
                [streamed] = stream.get_final_completion().choices
            [streamed_call] = streamed.message.tool_calls or []
            assert streamed_call.function.arguments == call.function.arguments


# Reasoning

THINKS = "{{- '<think>\n' if enable_thinking is not defined or enable_thinking else '<think>\n\n</think>\n\n' -}}"


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """The template opens the reasoning, or closes it if the request wants none."""
    with ApiServer(ByteModel(tmp_path_factory.mktemp("thinker"), TEMPLATE + THINKS)) as api:
        yield api


def test_reasoning_has_two_names_of_its_own(thinker: ApiServer) -> None:
    message = answer(thinker, "A plan.\n</think>\n\nDone.")["message"]
    assert message == {
        "role": "assistant",
        "content": "Done.",
        "reasoning_content": "A plan.",
        "reasoning": "A plan.",
    }


@pytest.mark.parametrize(
    "off",
    [
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
    ],
)
def test_reasoning_is_switched_off_by_the_template(thinker: ApiServer, off: dict[str, Any]) -> None:
    message = answer(thinker, "A plan.\n</think>\n\nDone.", **off)["message"]
    assert message == {"role": "assistant", "content": "A plan.\n</think>\n\nDone."}


def test_reasoning_that_is_not_included_is_still_counted(thinker: ApiServer) -> None:
    body = {**CHAT, "include_reasoning": False}
    thinker.engine.script = answering(thinker.model, "A plan.\n</think>\n\nDone.", step=1)
    response = thinker.post("/v1/chat/completions", body).json()
    assert response["choices"][0]["message"] == {"role": "assistant", "content": "Done."}
    assert response["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("A plan.\n</think>")}


def test_a_grammar_begins_after_the_reasoning(thinker: ApiServer) -> None:
    grammar = submitted_grammar(thinker, tools=[NOW], tool_choice="required")
    assert accepts(grammar, f"A plan.\n</think>\n\n{NOW_CALL}")
    assert not accepts(grammar, NOW_CALL)
    grammar = submitted_grammar(thinker, tools=[NOW], tool_choice="required", enable_thinking=False)
    assert accepts(grammar, NOW_CALL)


@pytest.mark.parametrize(
    ("path", "fields", "budget"),
    [
        ("/v1/chat/completions", {}, None),
        ("/v1/chat/completions", {"thinking_budget": 5}, 5),
        ("/v1/chat/completions", {"thinking_token_budget": 0}, 0),
        ("/v1/chat/completions", {"thinking_budget": 5, "enable_thinking": False}, None),
        ("/v1/messages", {"max_tokens": 64, "thinking": {"type": "enabled", "budget_tokens": 5}}, 5),
    ],
)
def test_a_budget_of_reasoning(thinker: ApiServer, path: str, fields: dict[str, Any], budget: int | None) -> None:
    while thinker.engine.num_pending_submissions:
        thinker.engine.next_submission()
    thinker.engine.script = answering(thinker.model, "A plan.\n</think>\n\nDone.")
    assert thinker.post(path, {**CHAT, **fields}).status_code == 200
    params = thinker.engine.next_submission().params
    assert params["reasoning_budget"] == budget
    end = thinker.model.tokens("</think>") if budget is not None else []
    assert (params["reasoning_start"], params["reasoning_end"]) == ([], end)


def test_calls_after_reasoning(thinker: ApiServer) -> None:
    choice = answer(thinker, f"A plan.</think>\n\n{HERMES}", tools=[WEATHER])
    assert choice["message"]["reasoning"] == "A plan."
    assert choice["message"]["content"] == "I look."
    assert calls_of(choice["message"]) == CALLS


def test_reasoning_that_is_cut_off_leaves_no_content(thinker: ApiServer) -> None:
    thinker.engine.script = answering(thinker.model, "A plan", finish="length")
    choice = thinker.post("/v1/chat/completions", CHAT).json()["choices"][0]
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("A plan", "")


def test_a_setting_overrides_the_template(start_api: StartApi) -> None:
    api = start_api(tool_call_parser="pythonic", reasoning_parser="deepseek_r1")
    message = answer(api, "A plan.</think>[now()]", tools=[NOW])["message"]
    assert (message["reasoning"], calls_of(message)) == ("A plan.", [("now", "{}")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("json", ""),
            "TOOL_CALL_PARSER='json': not valid; allowed: mistral, qwen3_coder, pythonic, llama3_json, hermes, or",
        ),
        (("", "r1"), "REASONING_PARSER='r1': not valid; allowed: qwen3, deepseek_r1, mistral, none, or"),
    ],
)
def test_an_unknown_parser_is_a_configuration_error(
    byte_model: ByteModel, settings: tuple[str, str], message: str
) -> None:
    template = ChatTemplate.select(byte_model.tokenizer, explicit=None)
    with pytest.raises(ConfigError, match=message):
        AnswerFormats.select(template, byte_model.tokenizer, *settings)
