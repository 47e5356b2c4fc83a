"""The native endpoints, those of alibaba/rtp-llm, with all field names that its clients use (request_extractor.py)."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from rtp_llm.api.compact_json import compact_json
from rtp_llm.api.native import NativeResponse, NativeSequence
from rtp_llm.api.schema import GenerateConfig
from rtp_llm.api.service import SlotReservation
from rtp_llm.api.stream import PIECE_CHARACTERS
from rtp_llm.api.text_stream import OutputChunk, TextParams
from rtp_llm.contract.sampling_params import SamplingParams
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.api.servers import ServerProcess
from tests.api.sse import payloads

# The supported keys of upstream's aux_info and their types.
AUX_INFO = {
    **dict.fromkeys(("cost_time", "first_token_cost_time", "wait_time"), float),
    **dict.fromkeys(("iter_count", "prefix_len", "input_len", "output_len", "step_output_len"), int),
    **dict.fromkeys(("reuse_len", "local_reuse_len", "remote_reuse_len", "memory_reuse_len"), int),
    **dict.fromkeys(("cum_log_probs", "beam_responses", "softmax_probs"), list),
    "pd_sep": bool,
    "aux_string": str,
}


@pytest.fixture(scope="module")
def api(byte_model: ByteModel) -> Iterator[ApiServer]:
    """The API with an engine that returns the prompt in upper case, in two steps."""

    def uppercase_script(submission: Submission) -> list[ScriptedOutput]:
        text = byte_model.tokenizer.decode(submission.prompt, skip_special_tokens=True).upper()
        tokens = byte_model.tokens(text)
        return [ScriptedOutput(tokens[:1], cached_tokens=1), ScriptedOutput([*tokens[1:], byte_model.end], "stop")]

    with ApiServer(byte_model, uppercase_script, aux_string="from here") as api:
        yield api


def generate(api: ApiServer, body: Any, **headers: str) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with api.client() as client:
        response = client.post("/", content=raw, headers={h.replace("_", "-"): v for h, v in headers.items()})
    assert response.status_code == 200, response.text
    return response.json()


# Fields of the prompt


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "ab"}, "AB"),
        ({"text": "ab"}, "AB"),
        ({"prompt": "ab", "text": "cd"}, "AB"),
        ({"text": ["ab"]}, "AB"),
        ({"messages": [{"role": "user", "content": "ab"}]}, "USER:ABASSISTANT:"),
        ({"prompt": "ab", "urls": [], "images": None}, "AB"),
        ({"prompt": "ab", "source": "x", "private_request": True, "trace_id": "t", "chat_id": "c"}, "AB"),
        ({"prompt": "ab", "generate_config": {"unknown": 1}, "also_unknown": {"a": []}}, "AB"),
    ],
)
def test_prompt_fields(body: dict[str, Any], expected: str, api: ApiServer) -> None:
    result = generate(api, body)
    assert result.keys() == {"response", "finished", "aux_info"}
    assert (result["response"], result["finished"]) == (expected, True)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt_batch": ["ab", "cd"]},
        {"prompt_batch": ["ab", "cd"], "prompt": "x"},
        {"prompt": ["ab", "cd"]},  # of which upstream answers only the first
        {"text": ["ab", "cd"]},
    ],
)
def test_a_batch(body: dict[str, Any], api: ApiServer) -> None:
    result = generate(api, body)
    assert [item["response"] for item in result["response_batch"]] == ["AB", "CD"]
    assert all(item["finished"] for item in result["response_batch"])


def test_batch_infer(api: ApiServer) -> None:
    body = {"prompt_batch": ["ab", "cd"], "generate_config": {"return_output_ids": True}, "return_input_ids": True}
    result = api.post("/batch_infer", body).json()["response_batch"]
    assert [item["response"] for item in result] == ["AB", "CD"]
    assert result[1]["input_ids"] == [api.model.tokens("cd")]
    assert result[1]["output_ids"] == [[*api.model.tokens("CD"), api.model.end]]


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/x-www-form-urlencoded",
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/octet-stream",
        "nonsense",
        "application/json; charset=latin-1",
    ],
)
def test_any_content_type(content_type: str, api: ApiServer) -> None:
    """The body is parsed as JSON whatever its content type: alibaba/rtp-llm's README uses `curl -d`, which
    declares a form."""
    assert generate(api, {"prompt": "ab"}, content_type=content_type)["response"] == "AB"


def test_no_content_type(api: ApiServer) -> None:
    assert generate(api, b'{"prompt": "ab"}')["response"] == "AB"


def test_a_json_string_that_holds_the_object(api: ApiServer) -> None:
    assert generate(api, json.dumps(json.dumps({"prompt": "\u00e9"})).encode())["response"] == "\u00c9"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_encodings(encoding: str, api: ApiServer) -> None:
    assert generate(api, json.dumps({"prompt": "é🚀"}, ensure_ascii=False).encode(encoding))["response"] == "É🚀"


# Fields of the settings


@pytest.mark.parametrize(
    "body",
    [
        {"generate_config": {"max_new_tokens": 3, "top_k": 5}},
        {"generation_config": {"max_new_tokens": 3, "top_k": 5}},
        {"max_new_tokens": 3, "top_k": 5},
        {"generate_config": {"max_new_tokens": 9, "top_k": 9}, "max_new_tokens": 3, "top_k": 5},
        {"generate_config": {"gen_length": 3}, "top_k": [5, 6]},
        {"gen_length": 3, "generate_config": {"top_k": 5, "max_new_tokens": 9}},
        {"max_new_tokens": [3], "generate_config": {"top_k": 5, "top_p": None}},
    ],
    ids=str,
)
def test_settings_precedence(body: dict[str, Any], api: ApiServer) -> None:
    """Settings may be in generate_config, in generation_config, which overrides it, or at the top level, which
    overrides both.

    Also tests alibaba/rtp-llm's other names for settings, and lists with one value per prompt.
    """
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    generate(api, {"prompt": "ab", **body})
    params = api.engine.next_submission().params
    assert (params["max_tokens"], params["top_k"]) == (3, 5)


def test_all_settings_reach_the_engine(api: ApiServer) -> None:
    config = {
        "max_new_tokens": 7,
        "min_new_tokens": 2,
        "top_k": 4,
        "top_p": 0.5,
        "temperature": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "random_seed": 99,
        "stop_words_list": [[5], [66, 67]],
        "return_cum_log_probs": True,
    }
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    generate(api, {"prompt": "ab", "generate_config": config})
    expected = {
        "max_tokens": 7,
        "min_tokens": 2,
        "top_k": 4,
        "top_p": 0.5,
        "temperature": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 99,
        "stop_token_ids": [5, api.model.end],
        "logprobs": 0,
    }
    assert api.engine.next_submission().params.items() >= expected.items()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"do_sample": False, "temperature": 0.9}, {"temperature": 0.0}),
        ({"top_p": 0}, {"top_p": 1.0}),  # upstream: no limit
        ({"top_k": -3}, {"top_k": 0}),
        ({"ignore_eos": True}, {"stop_token_ids": []}),
        ({"max_new_tokens": 10**9}, {"max_tokens": 2046}),
    ],
)
def test_values_have_upstreams_meaning(config: dict[str, Any], expected: dict[str, Any], api: ApiServer) -> None:
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    generate(api, {"prompt": "ab", "generate_config": config})
    assert api.engine.next_submission().params.items() >= expected.items()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"stop_words_str": ["CD"]}, "AB"),
        ({"stop_words_str": ["CD"], "print_stop_words": True}, "ABCD"),
        ({"stop_words_list": "tokens of CD"}, "AB"),
    ],
)
def test_stop_words(config: dict[str, Any], expected: str, api: ApiServer) -> None:
    if isinstance(config.get("stop_words_list"), str):
        config = {"stop_words_list": [api.model.tokens("CD")]}
    assert generate(api, {"prompt": "abcde", "generate_config": config})["response"] == expected


# Responses


def test_aux_info(api: ApiServer) -> None:
    aux = generate(api, {"prompt": "abc"})["aux_info"]
    assert {key: type(value) for key, value in aux.items()} == AUX_INFO
    assert (aux["input_len"], aux["output_len"], aux["iter_count"], aux["step_output_len"]) == (3, 4, 2, 3)
    assert (aux["reuse_len"], aux["prefix_len"], aux["wait_time"]) == (1, 1, 1.0)
    assert aux["aux_string"] == "from here"
    assert 0 < aux["first_token_cost_time"] <= aux["cost_time"]
    assert "aux_info" not in generate(api, {"prompt": "abc", "aux_info": False})


def test_several_sequences(api: ApiServer) -> None:
    result = generate(api, {"prompt": "ab", "num_return_sequences": 2, "return_output_ids": True})
    assert result["response"] == ["AB", "AB"]
    assert [aux["output_len"] for aux in result["aux_info"]] == [3, 3]
    item = generate(api, {"prompt": "ab", "num_return_sequences": 1})
    assert (item["response"], len(item["aux_info"])) == (["AB"], 1)
    batch = generate(api, {"prompt_batch": ["ab", "cd"], "num_return_sequences": 2})
    assert [b["response"] for b in batch["response_batch"]] == [["AB", "AB"], ["CD", "CD"]]


# Streams


def stream(api: ApiServer, body: dict[str, Any]) -> tuple[bytes, list[Any]]:
    raw = api.stream("/", {"prompt": "abc", **body})
    return raw, payloads(raw)


@pytest.mark.parametrize(
    "body",
    [
        {"yield_generator": True},
        {"generate_config": {"yield_generator": True}},
        {"generate_config": {"is_streaming": True}},
        {"yield_generator": True, "stream": True},
    ],
    ids=str,
)
def test_upstreams_framing(body: dict[str, Any], api: ApiServer) -> None:
    """Events have the format of alibaba/rtp-llm: no space after `data:`, CRLF at the end, and the whole text so far.
    The last event is [done]."""
    raw, events = stream(api, body)
    assert [e if e == "[done]" else e["response"] for e in events] == ["A", "ABC", "[done]"]
    assert [e["finished"] for e in events[:-1]] == [False, True]
    assert raw.startswith(b'data:{"response"')
    assert raw.endswith(b"\r\n\r\ndata:[done]\r\n\r\n")
    assert raw.count(b"\r\n\r\n") == raw.count(b"\n") / 2 == 3


def test_framing_of_top_level_stream(api: ApiServer) -> None:
    """With a top-level `stream`, events have a space after `data:`, and there is no [done] at the end."""
    raw, events = stream(api, {"stream": True})
    assert [e["response"] for e in events] == ["A", "ABC"]
    assert raw.startswith(b'data: {"response"')
    assert raw.endswith(b"}\r\n\r\n")


@pytest.mark.parametrize("body", [{"yield_generator": True}, {"stream": True}], ids=str)
def test_increments(body: dict[str, Any], api: ApiServer) -> None:
    _, events = stream(api, {**body, "return_incremental": True})
    assert [e["response"] for e in events if e != "[done]"] == ["A", "BC"]


def test_increments_of_a_batch_join_to_the_texts(api: ApiServer) -> None:
    """With return_incremental, each text is sent once, in whatever order the sequences of a batch produce it."""
    body = {"prompt_batch": ["abc", "xyz", "123"], "yield_generator": True, "return_incremental": True}
    events = payloads(api.stream("/", body))[:-1]
    texts_by_event = [[item["response"] for item in event["response_batch"]] for event in events]
    joined = ["".join(texts) for texts in zip(*texts_by_event, strict=True)]
    assert joined == ["ABC", "XYZ", "123"]
    assert [o["finished"] for o in events[-1]["response_batch"]] == [True, True, True]


# The tokenizer's endpoints


@pytest.mark.parametrize("text", ["abc", "é🚀", " ", "a\n\tb", "<|end|>", ""])
def test_tokenize(text: str, api: ApiServer) -> None:
    ids = api.model.tokenizer.encode(text)
    response = api.post("/tokenize", {"prompt": text}).json()  # in alibaba/rtp-llm's words and in vLLM's
    assert response == {"token_ids": ids, "tokens": ids, "count": len(ids), "max_model_len": 2048}
    assert api.post("/detokenize", {"model": "any", "tokens": ids}).json() == {"prompt": text}
    encoded = api.post("/tokenizer/encode", {"prompt": text, "return_offsets_mapping": True}).json()
    assert (encoded["token_ids"], encoded["error"]) == (ids, "")
    assert len(encoded["tokens"]) == len(encoded["offset_mapping"]) == len(ids)
    assert "offset_mapping" not in api.post("/tokenizer/encode", {"prompt": text}).json()


def test_tokenize_a_chat(api: ApiServer) -> None:
    """/tokenize returns as many tokens as the chat endpoint counts for the same messages."""
    messages = [{"role": "user", "content": "Hi"}]
    ids = api.post("/tokenize", {"messages": messages}).json()["token_ids"]
    assert api.post("/v1/chat/completions", {"messages": messages}).json()["usage"]["prompt_tokens"] == len(ids)
    rendered = api.post("/chat/render", {"messages": messages}).json()
    assert rendered["input_ids"] == ids
    assert api.model.tokenizer.decode(ids, skip_special_tokens=False) == rendered["input_prompt"]


@pytest.mark.parametrize("path", ["/chat/render", "/v1/chat/render"])
def test_render(path: str, api: ApiServer) -> None:
    """/chat/render returns alibaba/rtp-llm's DebugInfo with the sampling parameters. It submits nothing to the
    engine."""
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    body = {"messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}], "stop": "X"}
    result = api.post(path, {**body, "top_k": 3, "max_tokens": 4}).json()
    assert result["input_prompt"] == "<|turn|>system:Be<|turn|>user:Hi<|turn|>assistant:"
    assert (result["max_seq_len"], result["eos_token_id"], result["input_urls"]) == (2048, api.model.end, [])
    assert (result["stop_words_list"], result["stop_word_ids_list"]) == (["X"], [[api.model.end]])
    assert (result["generate_config"]["top_k"], result["generate_config"]["max_tokens"]) == (3, 4)
    assert result["renderer_info"]["class_name"]
    plain = api.post(path, {**body, "add_generation_prompt": False}).json()
    assert plain["input_prompt"] == "<|turn|>system:Be<|turn|>user:Hi"
    assert api.engine.num_pending_submissions == 0
    for _ in range(400):  # more than there are slots: none may leak
        assert api.post(path, body).status_code == 200


# With a real engine


def test_the_readmes_request(server: ServerProcess, http: httpx.Client) -> None:
    """The README's request, `curl -XPOST http://localhost:8088 -d '{"prompt": …}'`, works; here it asks for a shorter
    output."""
    config = {"max_new_tokens": 12, "top_k": 1, "ignore_eos": True}
    body = {"prompt": "hello, what is your name", "generate_config": config}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    first = http.post("/", content=json.dumps(body).encode(), headers=form).json()
    assert first["finished"]
    assert first["aux_info"]["output_len"] == 12
    events = payloads(http.post("/", json={**body, "yield_generator": True}).content)
    assert events[-1] == "[done]"
    assert events[-2]["response"] == first["response"]
    texts = [event["response"] for event in events[:-1]]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_probabilities_are_those_of_the_openai_endpoint(http: httpx.Client) -> None:
    config = {
        "max_new_tokens": 6,
        "do_sample": False,
        "ignore_eos": True,
        "return_cum_log_probs": True,
        "return_softmax_probs": True,
        "return_output_ids": True,
    }
    native = http.post("/", json={"prompt": "Attention looks", "generate_config": config}).json()
    body = {"prompt": "Attention looks", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert native["response"] == choice["text"]
    values = choice["logprobs"]["token_logprobs"]
    assert native["aux_info"]["cum_log_probs"] == pytest.approx([sum(values)], abs=1e-3)
    assert len(native["aux_info"]["softmax_probs"]) == len(native["output_ids"][0]) == 6


def test_a_large_response_is_encoded_in_pieces(start_api: StartApi) -> None:
    """No piece takes the event loop for long."""
    api = start_api(lambda submission: [ScriptedOutput([65], "length")], concurrency_limit=64)
    config = {"return_input_ids": True, "return_output_ids": True, "aux_info": False}
    response = api.post("/batch_infer", {"prompt_batch": ["a" * 2000] * 64, "generate_config": config})
    assert "content-length" not in response.headers, "it is encoded while it is sent"
    group: dict[str, Any] = {"response": api.model.tokenizer.decode([65]), "finished": True, "output_ids": [[65]]}
    expected = {"response_batch": [group | {"input_ids": [api.model.tokens("a" * 2000)]}] * 64}
    assert response.json() == expected
    sequences = [
        NativeSequence(prompt, SamplingParams(max_tokens=1), GenerateConfig.model_validate(config), "")
        for prompt in [api.model.tokens("a" * 2000)] * 64
    ]
    for sequence in sequences:
        sequence.add(OutputChunk(group["response"], [65], finish_reason="length"))
    reservation = SlotReservation(api._service, 0)
    whole = NativeResponse([[s] for s in sequences], TextParams(), is_batch=True, reservation=reservation)
    pieces = list(whole.event("data:"))
    assert max(map(len, pieces)) < 2 * PIECE_CHARACTERS
    assert "".join(pieces) == f"data:{compact_json(expected)}\r\n\r\n"
