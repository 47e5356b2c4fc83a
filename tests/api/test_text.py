"""From tokens to text: half characters, stop strings across tokens, hidden tokens, and what is counted and logged
beside the text. A fake engine says the tokens, one byte each.
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
# Bytes of one to four per character, and two letters that make overlapping stop strings the rule.
TEXT = st.text(st.sampled_from("aab bé数🚀\n"), max_size=14)
STOPS = st.lists(st.text(st.sampled_from("abé🚀 "), min_size=1, max_size=3), max_size=3)


@pytest.fixture(scope="module")
def api(byte_model: ByteModel) -> Iterator[ApiServer]:
    """Says what `said` of the engine's script holds; each test puts its own there."""
    with ApiServer(byte_model) as started:
        yield started


def say(api: ApiServer, said: list[ScriptedOutput]) -> None:
    api.engine.script = lambda submission: said


def pieces(model: ByteModel, text: str | bytes, sizes: random.Random) -> list[ScriptedOutput]:
    """The text in steps of one to three tokens, wherever that cuts it."""
    tokens = model.tokens(text)
    said = []
    while tokens:
        count = sizes.randint(1, 3)
        said.append(ScriptedOutput(tokens[:count]))
        tokens = tokens[count:]
    return said


def chat_text(api: ApiServer, body: dict[str, Any]) -> tuple[str, str, int]:
    """Text, finish reason and completion tokens of a stream, and that the whole answer has the same."""
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


def cut(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """The specification: the earliest match, and of those the longest, ends the text."""
    matches = [(text.index(stop), -len(stop), stop) for stop in stops if stop in text]
    if not matches:
        return text, False
    start, _, stop = min(matches)
    return text[:start] + (stop if include else ""), True


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, stops=STOPS, include=st.booleans(), seed=st.integers(0, 99))
def test_a_text_in_any_pieces(
    api: ApiServer, byte_model: ByteModel, text: str, stops: list[str], include: bool, seed: int
) -> None:
    say(api, [*pieces(byte_model, text, random.Random(seed)), ScriptedOutput([byte_model.end], "stop")])
    body = {"stop": stops, "include_stop_str_in_output": include} if stops else {}
    shown, finish, tokens = chat_text(api, body)
    expected, stopped = cut(text, stops, include)
    assert (shown, finish) == (expected, "stop")
    if stopped:
        assert len(byte_model.tokens(shown)) <= tokens <= len(byte_model.tokens(text)) + 1
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
def test_bytes_that_are_no_text(raw: bytes, expected: str, api: ApiServer, byte_model: ByteModel) -> None:
    """A model may say anything; a stream shows U+FFFD, as soon as no later byte can change it."""
    say(api, [ScriptedOutput([token]) for token in byte_model.tokens(raw)] + [ScriptedOutput([], "length")])
    assert chat_text(api, {}) == (expected, "length", len(raw))


def test_a_held_beginning_of_a_stop_string_is_given_out_at_the_end(api: ApiServer, byte_model: ByteModel) -> None:
    say(api, [ScriptedOutput(byte_model.tokens("one ST")), ScriptedOutput(byte_model.tokens("O"), "length")])
    assert chat_text(api, {"stop": "STOP"}) == ("one STO", "length", 7)


def test_a_stop_string_that_ends_with_the_last_token_allowed(api: ApiServer, byte_model: ByteModel) -> None:
    """Both reasons hold; what the client asked for is the one to tell."""
    say(api, [ScriptedOutput(byte_model.tokens("one STO")), ScriptedOutput(byte_model.tokens("P"), "length")])
    assert chat_text(api, {"stop": "STOP"}) == ("one ", "stop", 8)


def test_a_stop_string_inside_a_character_does_not_match(api: ApiServer, byte_model: ByteModel) -> None:
    say(api, [ScriptedOutput([token]) for token in byte_model.tokens("éÃ")] + [ScriptedOutput([], "length")])
    assert chat_text(api, {"stop": "Ã"}) == ("é", "stop", 4)


def test_stop_strings_count_from_min_tokens_on(api: ApiServer, byte_model: ByteModel) -> None:
    say(api, [ScriptedOutput([token]) for token in byte_model.tokens("a.b.c")] + [ScriptedOutput([], "length")])
    assert chat_text(api, {"stop": "."}) == ("a", "stop", 2)
    assert chat_text(api, {"stop": ".", "min_tokens": 3, "max_tokens": 9}) == ("a.b", "stop", 4)


def test_special_tokens_are_hidden_unless_asked_for(api: ApiServer, byte_model: ByteModel) -> None:
    say(api, [ScriptedOutput([*byte_model.tokens("a"), byte_model.end, *byte_model.tokens("b")], "length")])
    assert chat_text(api, {}) == ("ab", "length", 3)
    assert chat_text(api, {"skip_special_tokens": False}) == (f"a{END}b", "length", 3)


def test_the_stop_token_is_shown_only_where_stop_strings_are(api: ApiServer, byte_model: ByteModel) -> None:
    """`stop_token_ids` may name a token with a text of its own."""
    full_stop = byte_model.tokens(".")
    say(api, [ScriptedOutput(byte_model.tokens("a")), ScriptedOutput(full_stop, "stop")])
    assert chat_text(api, {"stop_token_ids": full_stop}) == ("a", "stop", 2)
    assert chat_text(api, {"stop_token_ids": full_stop, "include_stop_str_in_output": True}) == ("a.", "stop", 2)


# What the engine is asked


def submitted(api: ApiServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a request becomes."""
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    answer = api.post(path, body)
    assert answer.status_code == 200, answer.text
    return api.engine.next_submission().params


def test_defaults(api: ApiServer, byte_model: ByteModel) -> None:
    """Those of OpenAI, but for upstream's temperature of a chat; and room for as much as fits where nothing is said."""
    say(api, [ScriptedOutput([], "length")])
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
        assert (params["logprobs"], params["prompt_logprobs"], params["min_tokens"]) == (None, False, 0)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1e-300}, {"temperature": 0.0}),  # would divide the logits out of the range of numbers
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
def test_what_a_chat_asks_of_the_engine(given: dict[str, Any], asked: dict[str, Any], api: ApiServer) -> None:
    say(api, [ScriptedOutput([], "length")])
    assert submitted(api, "/v1/chat/completions", {**CHAT, **given}).items() >= asked.items()


def test_choices_have_seeds_of_their_own(api: ApiServer) -> None:
    say(api, [ScriptedOutput([], "length")])
    while api.engine.num_pending_submissions:
        api.engine.next_submission()
    api.post("/v1/completions", {"prompt": ["a", "b"], "n": 2, "seed": 40})
    taken = [api.engine.next_submission() for _ in range(4)]
    seeds = sorted((api.model.tokenizer.decode(t.prompt), t.params["seed"]) for t in taken)
    assert seeds == [("a", 40), ("a", 41), ("b", 40), ("b", 41)]


def test_without_a_seed_every_request_has_another(api: ApiServer) -> None:
    say(api, [ScriptedOutput([], "length")])
    assert len({submitted(api, "/", {"prompt": "Hi"})["seed"] for _ in range(4)}) == 4


# Beside the text


def records(model: ByteModel, text: str) -> list[ScriptedOutput]:
    """One token an event, each a little less likely than the last."""
    tokens = model.tokens(text)
    record: list[Logprob] = [(-0.25 * (i + 1), 0, [(token, -0.25 * (i + 1))]) for i, token in enumerate(tokens)]
    return [ScriptedOutput([t], "length" if i == len(tokens) - 1 else None, [record[i]]) for i, t in enumerate(tokens)]


@pytest.mark.parametrize("stop", [None, "🚀!", "zzz"], ids=["no stop", "stop", "other stop"])
def test_chat_logprobs_tell_every_token(stop: str | None, api: ApiServer, byte_model: ByteModel) -> None:
    """Also of those whose text is held back or cut, in order, in stream and whole answer alike."""
    say(api, records(byte_model, "é🚀!x"))
    body = {**CHAT, "logprobs": True, "top_logprobs": 1, **({"stop": stop} if stop else {})}
    events = payloads(api.stream("/v1/chat/completions", {**body, **USAGE}))[:-1]
    entries = [e for event in events for c in event["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
    whole = api.post("/v1/chat/completions", body).json()
    assert whole["choices"][0]["logprobs"]["content"] == entries
    said = bytes(b for entry in entries for b in entry["bytes"])
    assert said == "é🚀!".encode() if stop == "🚀!" else "é🚀!x".encode()
    assert [e["logprob"] for e in entries] == [-0.25 * (i + 1) for i in range(len(entries))]
    assert len(entries) == whole["usage"]["completion_tokens"] == events[-1]["usage"]["completion_tokens"]
    for entry in entries:
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}


def test_completion_logprobs_point_into_the_text(api: ApiServer, byte_model: ByteModel) -> None:
    """`text_offset` is where a token's text begins, in characters; the parts of one character begin together."""
    say(api, records(byte_model, "aé🚀z"))
    answer = api.post("/v1/completions", {"prompt": "x", "logprobs": 1}).json()["choices"][0]
    table = answer["logprobs"]
    assert answer["text"] == "aé🚀z"
    assert table["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]
    assert table["token_logprobs"] == [-0.25 * (i + 1) for i in range(8)]
    for token, value, top in zip(table["tokens"], table["token_logprobs"], table["top_logprobs"], strict=True):
        assert top[token] == value
    events = payloads(api.stream("/v1/completions", {"prompt": "x", "logprobs": 1, "stream": True}))[:-1]
    streamed = [choice["logprobs"] for event in events for choice in event["choices"]]
    for key, values in table.items():
        assert [value for piece in streamed for value in piece[key]] == values


def test_a_likely_token_hides_no_other_of_the_same_text(api: ApiServer, byte_model: ByteModel) -> None:
    """Parts of characters all read U+FFFD; the value beside the chosen one must be its own."""
    chosen, other = byte_model.tokens(b"\xc3\xa9")
    say(api, [ScriptedOutput([chosen], "length", [(-0.5, 0, [(chosen, -0.5), (other, -7.0)])])])
    table = api.post("/v1/completions", {"prompt": "x", "logprobs": 2}).json()["choices"][0]["logprobs"]
    assert (table["token_logprobs"], table["top_logprobs"]) == ([-0.5], [{"\ufffd": -0.5}])


def test_an_impossible_token_is_no_invalid_json(api: ApiServer, byte_model: ByteModel) -> None:
    [token] = byte_model.tokens("a")
    say(api, [ScriptedOutput([token], "length", [(float("-inf"), 9, [(token, float("-inf"))])])])
    for body in ({**CHAT, "logprobs": True}, {**CHAT, "logprobs": True, "stream": True}):
        assert b'"logprob":-9999.0' in api.stream("/v1/chat/completions", body)
    assert b"-9999.0" in api.stream("/v1/completions", {"prompt": "x", "logprobs": 1})


def test_usage_adds_up(api: ApiServer, byte_model: ByteModel) -> None:
    """Each prompt counts once however many choices it has, and each choice's tokens count."""
    say(api, [ScriptedOutput(byte_model.tokens("abc"), cached_tokens=2), ScriptedOutput([byte_model.end], "stop")])
    answer = api.post("/v1/completions", {"prompt": ["12345", "123"], "n": 3}).json()
    assert len(answer["choices"]) == 6
    assert answer["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 6 * 4,
        "total_tokens": 8 + 6 * 4,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_long_prompts_are_encoded_beside_the_event_loop(start_api: StartApi, byte_model: ByteModel) -> None:
    """The same ids either way."""
    api = start_api(lambda submission: [ScriptedOutput(submission.prompt[-3:], "length")])
    for length in (10, 4095, 4096, 100_000):
        ids = api.post("/tokenize", {"prompt": "é" * length}).json()["token_ids"]
        assert ids == byte_model.tokens("é") * length
        encoded = api.post("/tokenizer/encode", {"prompt": "é" * length}).json()
        assert encoded["token_ids"] == ids
