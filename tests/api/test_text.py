"""Tokens to text: incomplete characters, stop strings across tokens, special tokens, sampling parameters, logprobs and
usage. A fake engine sends the tokens, one byte each.
"""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtp_llm.contract.engine_output import Logprob
from tests.api.api_server import ApiServer
from tests.api.byte_model import END, ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput
from tests.api.sse import payloads

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
# Characters of one to four bytes, and few letters, so that most stop strings overlap.
TEXT = st.text(st.sampled_from("aab bé数🚀\n"), max_size=14)
STOPS = st.lists(st.text(st.sampled_from("abé🚀 "), min_size=1, max_size=3), max_size=3)


@pytest.fixture(scope="module")
def api(byte_model: ByteModel) -> Iterator[ApiServer]:
    """The API without a script; each test calls `set_script`."""
    with ApiServer(byte_model) as api:
        yield api


def set_script(api: ApiServer, outputs: list[ScriptedOutput]) -> None:
    api.engine.script = lambda submission: outputs


def random_steps(model: ByteModel, text: str | bytes, sizes: random.Random) -> list[ScriptedOutput]:
    """Splits the text into outputs of one to three tokens."""
    tokens = model.tokens(text)
    outputs = []
    while tokens:
        count = sizes.randint(1, 3)
        outputs.append(ScriptedOutput(tokens[:count]))
        tokens = tokens[count:]
    return outputs


def chat_text(api: ApiServer, body: dict[str, Any]) -> tuple[str, str, int]:
    """Returns text, finish reason and number of completion tokens of a streamed chat. Asserts that the same request
    without streaming has the same."""
    events = payloads(api.stream("/v1/chat/completions", {**CHAT, **body, **USAGE}))
    assert events[-1] == "[DONE]"
    choices = [c for e in events[:-2] for c in e["choices"]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    text = "".join(c["delta"].get("content", "") for c in choices)
    finish, tokens = choices[-1]["finish_reason"], events[-2]["usage"]["completion_tokens"]
    whole = api.post("/v1/chat/completions", {**CHAT, **body}).json()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert whole["choices"][0]["finish_reason"] == finish
    assert whole["usage"]["completion_tokens"] == tokens
    return text, finish, tokens


def truncate_at_stop(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Returns (text up to the stop string that must end it, whether there is one): the expected result of streaming.

    The earliest match ends the text. If several start there, the longest does.
    """
    matches = [(text.index(stop), -len(stop), stop) for stop in stops if stop in text]
    if not matches:
        return text, False
    start, _, stop = min(matches)
    return text[:start] + (stop if include else ""), True


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, stops=STOPS, include=st.booleans(), seed=st.integers(0, 99))
def test_text_does_not_depend_on_the_steps(
    api: ApiServer, byte_model: ByteModel, text: str, stops: list[str], include: bool, seed: int
) -> None:
    set_script(api, [*random_steps(byte_model, text, random.Random(seed)), ScriptedOutput([byte_model.end], "stop")])
    body = {"stop": stops, "include_stop_str_in_output": include} if stops else {}
    text_received, finish, tokens = chat_text(api, body)
    expected, has_stop = truncate_at_stop(text, stops, include)
    assert (text_received, finish) == (expected, "stop")
    if has_stop:
        assert len(byte_model.tokens(text_received)) <= tokens <= len(byte_model.tokens(text)) + 1
    else:
        assert tokens == len(byte_model.tokens(text)) + 1  # the end-of-sequence token is one of them


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"a\xf0\x9f\x9a", "a\ufffd"),
        (b"\xff\xfea", "\ufffd\ufffda"),
        (b"\xc3(", "\ufffd("),
        (b"\x80", "\ufffd"),
        (b"\xed\xa0\x80x", "\ufffd\ufffd\ufffdx"),
        (b"a\x00b\x85\xe2\x80\xa8c", "a\x00b\ufffd\u2028c"),
        (b"", ""),
    ],
)
def test_bytes_that_are_not_utf8(raw: bytes, expected: str, api: ApiServer, byte_model: ByteModel) -> None:
    """A stream shows U+FFFD as soon as later bytes cannot change it."""
    set_script(api, [ScriptedOutput([token]) for token in byte_model.tokens(raw)] + [ScriptedOutput([], "length")])
    assert chat_text(api, {}) == (expected, "length", len(raw))


def test_a_partial_stop_string_is_sent_at_the_end(api: ApiServer, byte_model: ByteModel) -> None:
    set_script(api, [ScriptedOutput(byte_model.tokens("one ST")), ScriptedOutput(byte_model.tokens("O"), "length")])
    assert chat_text(api, {"stop": "STOP"}) == ("one STO", "length", 7)


def test_a_stop_string_that_ends_with_the_last_token_allowed(api: ApiServer, byte_model: ByteModel) -> None:
    """If a stop string ends with the last token allowed, both finish reasons apply; "stop" has priority."""
    set_script(api, [ScriptedOutput(byte_model.tokens("one STO")), ScriptedOutput(byte_model.tokens("P"), "length")])
    assert chat_text(api, {"stop": "STOP"}) == ("one ", "stop", 8)


@pytest.mark.parametrize("sizes", [[1] * 8, [8], [3, 5], [5, 3]], ids=str)
def test_tokens_after_a_stop_string_do_not_count(sizes: list[int], api: ApiServer, byte_model: ByteModel) -> None:
    """A step that verifies draft tokens gives several tokens at once."""
    tokens = byte_model.tokens("one.more")
    logprobs: list[Logprob] = [(-float(i), 0, []) for i in range(8)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    set_script(
        api,
        [
            ScriptedOutput(tokens[start : start + size], logprobs=logprobs[start : start + size])
            for start, size in zip(starts, sizes, strict=True)
        ],
    )
    assert chat_text(api, {"stop": "."}) == ("one", "stop", 4)
    answer = api.post("/v1/chat/completions", {**CHAT, "stop": ".", "logprobs": True}).json()
    assert [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]] == [0, -1, -2, -3]


def test_a_stop_string_inside_a_character_does_not_match(api: ApiServer, byte_model: ByteModel) -> None:
    set_script(api, [ScriptedOutput([token]) for token in byte_model.tokens("éÃ")] + [ScriptedOutput([], "length")])
    assert chat_text(api, {"stop": "Ã"}) == ("é", "stop", 4)


def test_stop_strings_are_ignored_before_min_tokens(api: ApiServer, byte_model: ByteModel) -> None:
    set_script(api, [ScriptedOutput([token]) for token in byte_model.tokens("a.b.c")] + [ScriptedOutput([], "length")])
    assert chat_text(api, {"stop": "."}) == ("a", "stop", 2)
    assert chat_text(api, {"stop": ".", "min_tokens": 3, "max_tokens": 9}) == ("a.b", "stop", 4)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 2, 2], [6], [1, 5], [4, 2]], ids=str)
@pytest.mark.parametrize(
    ("stop", "min_tokens", "expected"),
    [
        ("bc", 2, ("a", 3)),  # begins with token 2, ends with token 3
        ("bc", 3, ("a", 3)),
        ("bc", 4, ("abcdef", 6)),
        ("def", 6, ("abc", 6)),
    ],
)
def test_a_stop_string_may_begin_before_min_tokens(
    sizes: list[int], stop: str, min_tokens: int, expected: tuple[str, int], api: ApiServer, byte_model: ByteModel
) -> None:
    """min_tokens counts the tokens of the stop string, however many tokens arrive at once."""
    tokens = byte_model.tokens("abcdef")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    steps = [ScriptedOutput(tokens[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    set_script(api, [*steps, ScriptedOutput([], "length")])
    text, finish, num_tokens = chat_text(api, {"stop": stop, "min_tokens": min_tokens, "max_tokens": 9})
    assert (text, finish) == (expected[0], "length" if expected[0] == "abcdef" else "stop")
    assert num_tokens == expected[1]


def test_special_tokens_are_skipped_by_default(api: ApiServer, byte_model: ByteModel) -> None:
    set_script(api, [ScriptedOutput([*byte_model.tokens("a"), byte_model.end, *byte_model.tokens("b")], "length")])
    assert chat_text(api, {}) == ("ab", "length", 3)
    assert chat_text(api, {"skip_special_tokens": False}) == (f"a{END}b", "length", 3)


def test_the_stop_token_is_included_like_stop_strings(api: ApiServer, byte_model: ByteModel) -> None:
    """A stop token that has text is cut off like a stop string, or included with include_stop_str_in_output."""
    full_stop = byte_model.tokens(".")
    set_script(api, [ScriptedOutput(byte_model.tokens("a")), ScriptedOutput(full_stop, "stop")])
    assert chat_text(api, {"stop_token_ids": full_stop}) == ("a", "stop", 2)
    assert chat_text(api, {"stop_token_ids": full_stop, "include_stop_str_in_output": True}) == ("a.", "stop", 2)


# Sampling parameters


def submitted(api: ApiServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Returns the sampling parameters that the API submits for a request."""
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    response = api.post(path, body)
    assert response.status_code == 200, response.text
    return api.engine.next_submission().params


def test_defaults(api: ApiServer, byte_model: ByteModel) -> None:
    """Defaults are OpenAI's, except that chat has alibaba/rtp-llm's temperature and max_tokens up to MAX_SEQ_LEN."""
    set_script(api, [ScriptedOutput([], "length")])
    chat = submitted(api, "/v1/chat/completions", CHAT)
    assert (chat["temperature"], chat["max_tokens"]) == (0.7, 2048 - len(byte_model.tokens("user:Hiassistant:")) - 2)
    completion = submitted(api, "/v1/completions", {"prompt": "Hi"})
    assert (completion["temperature"], completion["max_tokens"]) == (1.0, 16)
    native = submitted(api, "/", {"prompt": "Hi"})
    assert (native["temperature"], native["max_tokens"]) == (1.0, 2046)
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
    for params in (chat, completion, native):
        assert params.items() >= neutral.items()
        assert params["stop_token_ids"] == [byte_model.end]
        assert (params["logprobs"], params["prompt_logprobs"], params["min_tokens"]) == (None, None, 0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1e-300}, {"temperature": 0.0}),  # division by it would overflow
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": None, "temperature": None, "n": None, "stop": None}, {"top_p": 1.0, "temperature": 0.7}),
        ({"max_tokens": 5, "max_completion_tokens": 3}, {"max_tokens": 3}),
        ({"max_tokens": 10**6}, {"max_tokens": 2029}),
        ({"seed": -5, "logit_bias": {"7": -100}}, {"seed": -5, "logit_bias": {"7": -100}}),
        ({"ignore_eos": True, "stop_token_ids": [5, 4, 5]}, {"stop_token_ids": [4, 5]}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({"extra_configs": {"top_k": 7, "max_new_tokens": 9}}, {"top_k": 7, "max_tokens": 9, "temperature": 0.7}),
        ({"extra_configs": {"do_sample": False}, "temperature": 1.5}, {"temperature": 0.0}),
        ({"extra_configs": {"do_sample": True}, "temperature": 0.2}, {"temperature": 0.2}),
        ({"extra_configs": {"temperature": 0.3}, "temperature": 0.2}, {"temperature": 0.3}),
        ({"extra_configs": {"random_seed": 11}, "seed": 12}, {"seed": 11}),
        ({"extra_configs": {"stop_words_list": [[5], [65, 66]]}}, {"stop_token_ids": [5, 256]}),
    ],
)
def test_sampling_params_of_a_chat(fields: dict[str, Any], expected: dict[str, Any], api: ApiServer) -> None:
    set_script(api, [ScriptedOutput([], "length")])
    assert submitted(api, "/v1/chat/completions", {**CHAT, **fields}).items() >= expected.items()


def test_choices_have_different_seeds(api: ApiServer) -> None:
    set_script(api, [ScriptedOutput([], "length")])
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    api.post("/v1/completions", {"prompt": ["a", "b"], "n": 2, "seed": 40})
    submissions = [api.engine.next_submission() for _ in range(4)]
    seeds = sorted((api.model.tokenizer.decode(s.prompt), s.params["seed"]) for s in submissions)
    assert seeds == [("a", 40), ("a", 41), ("b", 40), ("b", 41)]


def test_requests_without_a_seed_get_different_seeds(api: ApiServer) -> None:
    set_script(api, [ScriptedOutput([], "length")])
    assert len({submitted(api, "/", {"prompt": "Hi"})["seed"] for _ in range(4)}) == 4


# Logprobs and usage


def with_logprobs(model: ByteModel, text: str) -> list[ScriptedOutput]:
    """Returns one output per token, with decreasing logprobs."""
    tokens = model.tokens(text)
    logprobs: list[Logprob] = [(-0.25 * (i + 1), 0, [(token, -0.25 * (i + 1))]) for i, token in enumerate(tokens)]
    return [
        ScriptedOutput([t], "length" if i == len(tokens) - 1 else None, [logprobs[i]]) for i, t in enumerate(tokens)
    ]


@pytest.mark.parametrize("stop", [None, "🚀!", "zzz"], ids=["no stop", "stop", "other stop"])
def test_chat_logprobs_have_every_token(stop: str | None, api: ApiServer, byte_model: ByteModel) -> None:
    """Streams and whole responses have the logprobs of all tokens, also of those with buffered or truncated text."""
    set_script(api, with_logprobs(byte_model, "é🚀!x"))
    body = {**CHAT, "logprobs": True, "top_logprobs": 1, **({"stop": stop} if stop else {})}
    events = payloads(api.stream("/v1/chat/completions", {**body, **USAGE}))[:-1]
    entries = [e for event in events for c in event["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
    whole = api.post("/v1/chat/completions", body).json()
    assert whole["choices"][0]["logprobs"]["content"] == entries
    generated_bytes = bytes(b for entry in entries for b in entry["bytes"])
    assert generated_bytes == "é🚀!".encode() if stop == "🚀!" else "é🚀!x".encode()
    assert [e["logprob"] for e in entries] == [-0.25 * (i + 1) for i in range(len(entries))]
    assert len(entries) == whole["usage"]["completion_tokens"] == events[-1]["usage"]["completion_tokens"]
    for entry in entries:
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}


def test_completion_logprobs_have_text_offsets(api: ApiServer, byte_model: ByteModel) -> None:
    """`text_offset` is the start of a token's text in characters; the tokens of one character have the same."""
    set_script(api, with_logprobs(byte_model, "aé🚀z"))
    response = api.post("/v1/completions", {"prompt": "x", "logprobs": 1}).json()["choices"][0]
    logprobs = response["logprobs"]
    assert response["text"] == "aé🚀z"
    assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]
    assert logprobs["token_logprobs"] == [-0.25 * (i + 1) for i in range(8)]
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == value
    events = payloads(api.stream("/v1/completions", {"prompt": "x", "logprobs": 1, "stream": True}))[:-1]
    streamed = [choice["logprobs"] for event in events for choice in event["choices"]]
    for key, values in logprobs.items():
        assert [value for chunk in streamed for value in chunk[key]] == values


def test_top_logprobs_of_tokens_with_the_same_text(api: ApiServer, byte_model: ByteModel) -> None:
    """Top logprobs are keyed by text, and all incomplete characters have the text U+FFFD. The value at U+FFFD must be
    that of the chosen token."""
    chosen, unlikely = byte_model.tokens(b"\xc3\xa9")
    set_script(api, [ScriptedOutput([chosen], "length", [(-0.5, 0, [(chosen, -0.5), (unlikely, -7.0)])])])
    logprobs = api.post("/v1/completions", {"prompt": "x", "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert (logprobs["token_logprobs"], logprobs["top_logprobs"]) == ([-0.5], [{"\ufffd": -0.5}])


def test_a_logprob_of_minus_infinity_is_valid_json(api: ApiServer, byte_model: ByteModel) -> None:
    [token] = byte_model.tokens("a")
    set_script(api, [ScriptedOutput([token], "length", [(float("-inf"), 9, [(token, float("-inf"))])])])
    for body in ({**CHAT, "logprobs": True}, {**CHAT, "logprobs": True, "stream": True}):
        assert b'"logprob":-9999.0' in api.stream("/v1/chat/completions", body)
    assert b"-9999.0" in api.stream("/v1/completions", {"prompt": "x", "logprobs": 1})


def test_usage_adds_up(api: ApiServer, byte_model: ByteModel) -> None:
    """Each prompt counts once for all its choices; the tokens of every choice count."""
    set_script(
        api, [ScriptedOutput(byte_model.tokens("abc"), cached_tokens=2), ScriptedOutput([byte_model.end], "stop")]
    )
    response = api.post("/v1/completions", {"prompt": ["12345", "123"], "n": 3}).json()
    assert len(response["choices"]) == 6
    assert response["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 6 * 4,
        "total_tokens": 8 + 6 * 4,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_long_prompts_are_encoded_in_a_thread(start_api: StartApi, byte_model: ByteModel) -> None:
    """Long prompts, which are encoded in a thread, and short ones get the same ids for the same text."""
    api = start_api(lambda submission: [ScriptedOutput(submission.prompt[-3:], "length")])
    for length in (10, 4095, 4096, 100_000):
        ids = api.post("/tokenize", {"prompt": "é" * length}).json()["token_ids"]
        assert ids == byte_model.tokens("é") * length
        encoded = api.post("/tokenizer/encode", {"prompt": "é" * length}).json()
        assert encoded["token_ids"] == ids
