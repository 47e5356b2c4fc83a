"""The `openai` client against a server with a real engine.

`logit_bias` makes the output known: +100 selects a token. Other tests compare responses with each other.
"""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from openai.types.completion import Completion

from rtp_llm.text.tokenizer import Tokenizer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput
from tests.api.servers import ServerProcess
from tests.sdk_clients import openai_client

TOLERANCE = 1e-3  # the order of additions depends on the batch

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Who decides what happens next?"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai_client(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(server: ServerProcess) -> Tokenizer:
    return Tokenizer.load(server.checkpoint)


@pytest.fixture(scope="module")
def the_token(tokenizer: Tokenizer) -> int:
    """The token " the"."""
    [token] = tokenizer.encode(" the")
    return token


def chat(client: openai.OpenAI, **options: Any) -> ChatCompletion:
    completion = client.chat.completions.create(**{"model": "demo", "messages": HI, "max_tokens": 12, **options})
    assert isinstance(completion, ChatCompletion)
    return completion


def complete(client: openai.OpenAI, **options: Any) -> Completion:
    completion = client.completions.create(**{"model": "demo", "prompt": "The matrices", "max_tokens": 12, **options})
    assert isinstance(completion, Completion)
    return completion


# Chat


def test_a_chat(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    response = chat(client, extra_body={"ignore_eos": True})
    assert response.id.startswith("chatcmpl-")
    assert (response.object, response.model) == ("chat.completion", "demo")
    [choice] = response.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content
    assert response.usage
    rendered = f"<|im_start|>user\n{HI[0]['content']}<|im_end|>\n<|im_start|>assistant\n"  # type: ignore[typeddict-item]
    assert response.usage.prompt_tokens == len(tokenizer.encode(rendered, add_special_tokens=False))
    assert response.usage.completion_tokens == 12
    assert response.usage.total_tokens == response.usage.prompt_tokens + 12
    assert chat(client).id != response.id


def test_both_chat_paths(http: httpx.Client) -> None:
    body = {"messages": HI, "max_tokens": 8, "temperature": 0}
    texts = [
        http.post(path, json=body).json()["choices"][0]["message"]["content"]
        for path in ("/v1/chat/completions", "/chat/completions")
    ]
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.3, "seed": 5}], ids=["greedy", "sampled"])
def test_a_chat_stream_equals_the_whole_response(options: dict[str, Any], client: openai.OpenAI) -> None:
    options = {**options, "max_tokens": 40, "n": 2, "logprobs": True, "top_logprobs": 2}
    chat(client, max_tokens=1)  # fills the prefix cache, so that both find the same number of cached tokens
    whole = chat(client, **options)
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=HI, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert {c.id for c in chunks} == {chunks[0].id}
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    for choice in whole.choices:
        choices = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert (choices[0].delta.role, choices[0].delta.content) == ("assistant", "")
        assert [c.delta.role for c in choices[1:]] == [None] * (len(choices) - 1)
        assert "".join(c.delta.content or "" for c in choices) == choice.message.content
        assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1].finish_reason == choice.finish_reason
        logprobs = [entry for c in choices if c.logprobs for entry in c.logprobs.content or []]
        assert choice.logprobs
        assert choice.logprobs.content
        assert [entry.bytes for entry in logprobs] == [entry.bytes for entry in choice.logprobs.content]
        expected = [entry.logprob for entry in choice.logprobs.content]
        assert [entry.logprob for entry in logprobs] == pytest.approx(expected, abs=TOLERANCE)


def test_end_of_sequence_stops(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    for end in tokenizer.eos_ids:
        response = chat(client, logit_bias={str(end): 100}, logprobs=True)
        assert response.choices[0].finish_reason == "stop"
        assert response.choices[0].message.content == ""
        assert response.usage
        assert response.usage.completion_tokens == 1
    ignoring_eos = chat(client, logit_bias={str(end): 100}, extra_body={"ignore_eos": True})
    assert (ignoring_eos.choices[0].finish_reason, ignoring_eos.choices[0].message.content) == ("length", "")
    with_min_tokens = chat(client, logit_bias={str(end): 100}, extra_body={"min_tokens": 5})
    assert with_min_tokens.usage
    assert with_min_tokens.usage.completion_tokens == 6
    assert with_min_tokens.choices[0].message.content


def test_limits_and_stop_strings(client: openai.OpenAI, the_token: int) -> None:
    bias = {str(the_token): 100}
    assert chat(client, logit_bias=bias, max_tokens=3).choices[0].message.content == " the the the"
    assert chat(client, logit_bias=bias, max_completion_tokens=2).choices[0].message.content == " the the"
    for stop, text in (("he the", " t"), (["nothing", " the the the"], ""), (["x", "e"], " th")):
        response = chat(client, logit_bias=bias, stop=stop)
        assert (response.choices[0].message.content, response.choices[0].finish_reason) == (text, "stop")
    by_id = chat(client, logit_bias=bias, extra_body={"stop_token_ids": [the_token]})
    assert (by_id.choices[0].message.content, by_id.choices[0].finish_reason) == ("", "stop")
    unmatched = chat(client, logit_bias=bias, max_tokens=3, stop=["the  the"])
    assert (unmatched.choices[0].message.content, unmatched.choices[0].finish_reason) == (" the the the", "length")


def test_seeds(client: openai.OpenAI) -> None:
    """The same seed generates the same text, alone or in a batch; another seed or none generates another text."""
    options = {"temperature": 1.0, "max_tokens": 24}
    first = [c.message.content for c in chat(client, seed=7, n=4, **options).choices]
    assert len(set(first)) == 4
    assert [c.message.content for c in chat(client, seed=7, n=4, **options).choices] == first
    texts_alone = [chat(client, seed=7 + i, **options).choices[0].message.content for i in range(4)]
    assert texts_alone == first
    assert len({chat(client, **options).choices[0].message.content for _ in range(3)}) == 3


def test_logprobs(client: openai.OpenAI) -> None:
    response = chat(client, temperature=0, logprobs=True, top_logprobs=5, extra_body={"ignore_eos": True})
    logprobs = response.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert len(logprobs.content) == 12
    for entry in logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 5
        assert sum(math.exp(value) for value in values) <= 1 + 1e-6
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, values[0])  # greedy
        assert bytes(entry.bytes or []).decode(errors="replace") == entry.token
    token_bytes = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert response.choices[0].message.content
    assert token_bytes.decode(errors="replace").startswith(response.choices[0].message.content.rstrip("\ufffd"))
    assert chat(client).choices[0].logprobs is None


def test_messages_in_all_formats(client: openai.OpenAI) -> None:
    """Content parts are joined, and fields that the template does not use have no effect."""
    plain = chat(client, temperature=0)
    content_parts: list[Any] = [
        {"type": "text", "text": "Who decides "},
        {"type": "text", "text": "what happens next?"},
    ]
    assert chat(client, temperature=0, messages=[{"role": "user", "content": content_parts}]).usage == plain.usage
    named_message = [{"role": "user", "name": "me", "content": HI[0]["content"]}]  # type: ignore[typeddict-item]
    assert chat(client, temperature=0, messages=named_message, user="x").usage == plain.usage
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    assert chat(client, messages=turns).choices[0].message.role == "assistant"


# Completions


def test_prompts_in_all_formats(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    texts = ["The matrices", "Only rank 0"]
    ids = [tokenizer.encode(text) for text in texts]
    options = {"temperature": 0, "extra_body": {"ignore_eos": True}}
    texts_alone = [complete(client, prompt=text, **options).choices[0].text for text in texts]
    assert complete(client, prompt=ids[0], **options).choices[0].text == texts_alone[0]
    for prompt in (texts, ids):
        response = complete(client, prompt=prompt, **options)
        assert [c.text for c in response.choices] == texts_alone
        assert [c.index for c in response.choices] == [0, 1]
        assert response.usage
        assert response.usage.prompt_tokens == sum(map(len, ids))
        assert response.usage.completion_tokens == 24
    single = complete(client, prompt=[texts[1]], **options)
    assert (single.choices[0].text, single.object, single.choices[0].finish_reason) == (
        texts_alone[1],
        "text_completion",
        "length",
    )
    assert single.id.startswith("cmpl-")


def test_choices_are_ordered_by_prompt(client: openai.OpenAI) -> None:
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 16}
    both = complete(client, prompt=["The matrices", "Only rank 0"], n=2, **options)
    responses_by_prompt = [complete(client, prompt=p, n=2, **options) for p in ("The matrices", "Only rank 0")]
    assert [c.text for c in both.choices] == [c.text for response in responses_by_prompt for c in response.choices]
    assert [c.index for c in both.choices] == [0, 1, 2, 3]


def test_echo_and_logprobs(client: openai.OpenAI, tokenizer: Tokenizer, the_token: int) -> None:
    prompt = "The matrices"
    ids = tokenizer.encode(prompt)
    response = complete(client, echo=True, logprobs=3, logit_bias={str(the_token): 100}, max_tokens=2)
    choice = response.choices[0]
    assert choice.text == "The matrices the the"
    table = choice.logprobs
    assert table
    assert table.tokens
    assert table.token_logprobs
    assert table.top_logprobs
    assert table.tokens == [*(tokenizer.token_text(i) for i in ids), " the", " the"]
    assert table.token_logprobs[0] is None
    assert table.top_logprobs[0] is None
    assert all(value <= 0 for value in table.token_logprobs[1:])
    assert table.text_offset == [len("".join(table.tokens[:i])) for i in range(len(table.tokens))]
    for token, value, tops in list(zip(table.tokens, table.token_logprobs, table.top_logprobs, strict=True))[1:]:
        assert tops[token] == value
        assert 3 <= len(tops) <= 4
    only_echo = complete(client, echo=True, max_tokens=3, logit_bias={str(the_token): 100}).choices[0]
    assert (only_echo.text, only_echo.logprobs) == ("The matrices the the the", None)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_echo_without_generated_tokens(stream: bool, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """echo with max_tokens=0 returns the logprobs of the prompt only, as evaluation harnesses need them."""
    options: dict[str, Any] = {"echo": True, "max_tokens": 0, "logprobs": 1}
    ids = tokenizer.encode("The matrices")
    full = complete(client, echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
    assert full
    if stream:
        chunks = list(
            client.completions.create(
                model="demo", prompt="The matrices", stream=True, stream_options={"include_usage": True}, **options
            )
        )
        [choice] = [c for chunk in chunks for c in chunk.choices]
        usage = chunks[-1].usage
    else:
        response = complete(client, **options)
        [choice], usage = response.choices, response.usage
    assert (choice.text, choice.finish_reason) == ("The matrices", "length")
    assert choice.logprobs
    assert choice.logprobs.token_logprobs
    assert full.token_logprobs
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(full.token_logprobs[1 : len(ids)], abs=TOLERANCE)
    assert usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 0)


def test_a_completion_stream_equals_the_whole_response(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "echo": True, "logprobs": 2}
    whole = complete(client, prompt=["The matrices", "Only"], **options)
    stream = client.completions.create(model="demo", prompt=["The matrices", "Only"], stream=True, **options)
    chunks = list(stream)
    for choice in whole.choices:
        choices = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in choices) == choice.text
        assert choices[-1].finish_reason == choice.finish_reason
        assert choice.logprobs
        assert choice.logprobs.token_logprobs
        for key in ("tokens", "text_offset"):
            streamed = [v for c in choices if c.logprobs for v in getattr(c.logprobs, key)]
            assert streamed == getattr(choice.logprobs, key)
        values = [v for c in choices if c.logprobs for v in c.logprobs.token_logprobs or []]
        assert values[0] is choice.logprobs.token_logprobs[0] is None
        assert values[1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=TOLERANCE)


# Errors as exceptions


def test_invalid_requests_are_exceptions(client: openai.OpenAI) -> None:
    invalid_options: list[dict[str, Any]] = [
        {"messages": []},
        {"temperature": -1},
        {"messages": [{"role": "user", "content": "x " * 5000}]},
        {"logit_bias": {"99999": 1}},
        {"extra_body": {"top_k": "many"}},
        {"max_tokens": 0},
    ]
    for options in invalid_options:
        with pytest.raises(openai.BadRequestError) as error_info:
            chat(client, **options)
        body = error_info.value.body
        assert isinstance(body, dict)
        assert error_info.value.type == "invalid_request_error"
        assert error_info.value.code == body["code"]
        assert body["message"] in str(error_info.value)
        with pytest.raises(openai.BadRequestError):
            chat(client, **options, stream=True)
    with pytest.raises(openai.BadRequestError, match="suffix"):
        complete(client, suffix="x")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing/of/this/name")


def test_server_errors_are_exceptions(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api(lambda s: [ScriptedOutput(byte_model.tokens("so far"))], concurrency_limit=1, queue_limit=0)
    with openai_client(api.url) as client:
        with client.chat.completions.create(model="demo", messages=HI, stream=True) as stream:
            next(stream)
            with pytest.raises(openai.RateLimitError, match="CONCURRENCY_LIMIT"):
                chat(client)
        api.wait_until(lambda: api.post("/v1/completions", {"prompt": ""}).status_code != 429)
        with pytest.raises(openai.BadRequestError, match="CONCURRENCY_LIMIT"):
            chat(client, n=2)
        api.engine.script = lambda s: [
            ScriptedOutput(byte_model.tokens("so far")),
            ScriptedOutput([], "error", error="the engine fell over"),
        ]
        with pytest.raises(openai.InternalServerError, match="the engine fell over"):
            chat(client)
        stream = client.chat.completions.create(model="demo", messages=HI, stream=True)
        next(stream)
        assert next(stream).choices[0].delta.content == "so far"
        with pytest.raises(openai.APIError, match="the engine fell over"):
            next(stream)


# Other methods of the client


LINE_BREAKS = "a\u0085b\u2028c\u2029d"


def test_line_breaks_of_unicode_do_not_split_events(start_api: StartApi, byte_model: ByteModel) -> None:
    """The SDK's line reader also ends lines at U+0085, U+2028 and U+2029, so no event may hold one as it is."""
    api = start_api(lambda s: [ScriptedOutput(byte_model.tokens(LINE_BREAKS), "length")])
    with openai_client(api.url) as client:
        completion = client.completions.create(model="demo", prompt=LINE_BREAKS, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in completion) == LINE_BREAKS * 2
        chat_stream = client.chat.completions.create(model="demo", messages=HI, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chat_stream) == LINE_BREAKS
    raw = api.stream("/", {"prompt": LINE_BREAKS, "stream": True}).decode()
    assert LINE_BREAKS in raw.encode().decode("raw_unicode_escape")
    assert not set("\u0085\u2028\u2029") & set(raw)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


def test_leaving_a_stream_early(client: openai.OpenAI, http: httpx.Client) -> None:
    stream = client.chat.completions.create(model="demo", messages=HI, stream=True, max_tokens=1500)
    for _ in range(3):
        next(stream)
    stream.close()
    assert chat(client, max_tokens=2).usage


def test_concurrent_requests_get_the_same_text_as_alone(server: ServerProcess) -> None:
    """Sends 24 requests with different seeds and lengths at once, then one after another."""

    async def ask_all() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=60,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as client:
            texts_together = await asyncio.gather(*(_ask(client, i) for i in range(24)))
            return list(texts_together), [await _ask(client, i) for i in range(24)]

    texts_together, texts_alone = asyncio.run(ask_all())
    assert texts_together == texts_alone
    assert len(set(texts_alone)) == 24


async def _ask(client: openai.AsyncOpenAI, number: int) -> str:
    """Sends request `number`; even numbers use a stream."""
    options: dict[str, Any] = {"model": "demo", "max_tokens": 16 + number, "seed": number, "temperature": 0.8}
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": f"Number {number}"}]
    if number % 2:
        response = await client.chat.completions.create(messages=messages, **options)
        return str(response.choices[0].message.content)
    stream = await client.chat.completions.create(messages=messages, stream=True, **options)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
