"""Large inputs: they are refused before they cost anything, or prepared where they delay nobody else."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rtp_llm.api.preparer import THREAD_BYTES
from rtp_llm.text.tokenizer import CUT_TOKENS, PIECE_CHARACTERS, Tokenizer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import TIMEOUT_SECONDS, ScriptedOutput
from tests.quick import slow_except

DEMO = Path(__file__).parents[2] / "image/demo/model"
LARGE = "x" * (15 << 20)
REFUSED = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": LARGE}]},
    "/v1/completions": {"prompt": LARGE},
    "/": {"prompt": LARGE},
    "/batch_infer": {"prompt_batch": ["a", LARGE]},
    "/chat/render": {"messages": [{"role": "user", "content": LARGE}]},
    "/tokenize": {"prompt": LARGE},
    "/tokenizer/encode": {"prompt": LARGE},
}


def finish(submission: Any) -> list[ScriptedOutput]:
    return [ScriptedOutput(submission.prompt[-3:], "length")]


@pytest.mark.parametrize("path", slow_except(REFUSED, "/v1/chat/completions", "/", "/tokenize"))
def test_a_prompt_of_15_mb_is_refused(path: str, start_api: StartApi) -> None:
    response = start_api(finish).post(path, REFUSED[path])
    assert response.status_code == 400
    assert (response.json()["error_code"], "at least" in response.text) == (511, True)


@pytest.mark.slow
def test_the_api_process_returns_the_memory_of_large_prompts(http: httpx.Client) -> None:
    """Once it kept 2.8 GB after one of them."""

    def resident_bytes() -> float:
        name = r'process_resident_memory_bytes\{program="api".*\} (\S+)'
        (value,) = re.findall(name, http.get("/metrics").text)
        return float(value)

    before = resident_bytes()
    for path, body in REFUSED.items():
        assert http.post(path, json=body).status_code == 400
    assert resident_bytes() - before < 256 << 20


def test_a_large_body_gets_the_answer_of_a_small_one(start_api: StartApi) -> None:
    """A chat that goes to the other process, because of a field that the server ignores, gets the same prompt."""
    api = start_api(finish, max_body_mb=32)
    few = {"messages": [{"role": "user", "content": "é\n"}], "add_generation_prompt": True}
    ignored = {"x": [{"a": [1, None]}] * 100_000}
    assert len(json.dumps(ignored)) > 1 << 20
    small, large = api.post("/chat/render", few).json(), api.post("/chat/render", few | ignored).json()
    assert small["input_ids"] == large["input_ids"]
    assert large["input_prompt"] == "<|turn|>user:é\n<|turn|>assistant:"


def test_errors_of_a_large_body_are_those_of_a_small_one(start_api: StartApi) -> None:
    api = start_api(finish)
    for body in ({"prompt": 5}, {"prompt": "a", "n": 0}, {"prompt": "a", "best_of": 3}, {"prompt": [300]}):
        small = api.post("/v1/completions", body)
        large = api.post("/v1/completions", body | {"user": " " * THREAD_BYTES})
        assert (small.status_code, small.json()) == (large.status_code, large.json())


TOP_20 = [(token, -float(token)) for token in range(20)]


def echo(submission: Any) -> list[ScriptedOutput]:
    logprob = (-1.0, 3, TOP_20)
    prompt_logprobs = [logprob] * (len(submission.prompt) - 1)
    return [ScriptedOutput([65], "length", [logprob], prompt_logprobs)]


NATIVE = {
    "prompt_batch": ["a" * 2000] * 64,
    "generate_config": {"return_input_ids": True, "return_output_ids": True, "return_softmax_probs": True},
}
EXPENSIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("/v1/completions", {"prompt": LARGE}),
    "token ids": ("/v1/completions", {"prompt": [1] * 1_000_000}),
    "messages": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 60_000}),
    "ignored field": ("/v1/completions", {"prompt": "a", "x": [{"a": [1]}] * 300_000}),
    "log level": ("/set_log_level", {"log_level": "INFO", "x": [{"a": [1]}] * 300_000}),
    "encoded": ("/tokenizer/encode", {"prompt": "a" * 200_000, "return_offsets_mapping": True}),
    "logprobs": ("/v1/completions", {"prompt": [[65] * 2000] * 32, "echo": True, "logprobs": 20}),
    "streamed logprobs": (
        "/v1/completions",
        {"prompt": [[65] * 2000] * 32, "echo": True, "logprobs": 20, "stream": True},
    ),
    "native": ("/batch_infer", NATIVE),
    "native stream": ("/", NATIVE | {"stream": True}),
    "chat logprobs": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "n": 128, "logprobs": True, "top_logprobs": 20},
    ),
}


@pytest.mark.parametrize("name", slow_except(EXPENSIVE, "text", "encoded"))
def test_the_event_loop_spends_little_on_one_request(name: str, start_api: StartApi) -> None:
    """The bound is on CPU time, so a busy machine does not matter; it is five times what a probe may wait (100 ms)."""
    api = start_api(echo, max_body_mb=64, concurrency_limit=256)
    path, body = EXPENSIVE[name]
    with api.event_loop_cpu() as seconds, api.client(timeout=5 * TIMEOUT_SECONDS) as client:
        raw = client.post(path, json=body).content
    print(f"{name}: {len(raw) >> 10} KiB, at most {max(seconds) * 1000:.0f} ms")
    assert max(seconds) < 0.5


def test_stop_ids_are_bounded(start_api: StartApi) -> None:
    response = start_api(finish).post("/v1/completions", {"prompt": "a", "stop_token_ids": [1] * 5000})
    assert (response.status_code, "4096" in response.text) == (400, True)


@pytest.mark.parametrize("text", ["hello world ", "x", " ", "é", "\n", "日本語", "🙂"])
def test_the_bound_never_exceeds_the_tokens(text: str, byte_model: ByteModel) -> None:
    for tokenizer in (byte_model.tokenizer, Tokenizer.load(DEMO)):
        long_text = text * (3 * PIECE_CHARACTERS // len(text))
        num_tokens = len(tokenizer.encode(long_text, add_special_tokens=False))
        bound = tokenizer.min_tokens(long_text, 1 << 40)
        assert num_tokens - 4 * CUT_TOKENS - num_tokens // 10 <= bound <= num_tokens


def test_a_refused_text_is_not_encoded_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(DEMO)
    encoded: list[int] = []
    encode = tokenizer.encode

    def counted(text: str, add_special_tokens: bool = True) -> list[int]:
        encoded.append(len(text))
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", counted)
    assert tokenizer.min_tokens("hello world " * 10**6, 2047) > 2047
    assert sum(encoded) <= PIECE_CHARACTERS


def test_the_death_of_the_idle_process_is_not_noticed(start_api: StartApi) -> None:
    """It may be killed for lack of memory: the next request gets a new process."""
    api = start_api(finish)
    large = {"prompt": "a", "user": " " * THREAD_BYTES}
    assert api.post("/v1/completions", large).status_code == 200
    (child,) = [c for c in psutil.Process().children() if "spawn_main" in " ".join(c.cmdline())]
    child.kill()
    child.wait()
    statuses = [api.post("/v1/completions", large).status_code for _ in range(2)]
    assert statuses == [200, 200]
