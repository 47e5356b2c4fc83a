"""Large requests wait in a bounded queue for a process, and none suffers from another one."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from rtp_llm.api import grammar_checker, preparation_process, preparer
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.preparer import THREAD_BYTES, Preparer
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.errors import RequestError
from rtp_llm.text.output_format import AnswerFormats
from rtp_llm.text.template import ChatTemplate
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput
from tests.api.raw_http import RawHttpConnection

LIMITS = PromptLimits(2048, "", 258, 1, 0, "")
LARGE = b"x" * THREAD_BYTES
LARGE_BODY = {"prompt": "a", "user": " " * THREAD_BYTES}
Script = Callable[[Preparer], Awaitable[Any]]


def pid(preparation: Preparation, raw: bytes, limits: PromptLimits) -> int:
    return os.getpid()


def die(preparation: Preparation, raw: bytes, limits: PromptLimits) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(preparation: Preparation, raw: bytes, limits: PromptLimits) -> None:
    time.sleep(600)


def fail(preparation: Preparation, raw: bytes, limits: PromptLimits) -> None:
    raise KeyError("a defect")


@pytest.fixture
def run(byte_model: ByteModel) -> Callable[[Script], Any]:
    """Returns a function that runs a coroutine function with a Preparer, which is closed after it."""

    def run_script(script: Script) -> Any:
        async def main() -> Any:
            template = ChatTemplate.select(byte_model.tokenizer, explicit=None)
            formats = AnswerFormats.select(template, byte_model.tokenizer, "", "")
            preparer = Preparer(byte_model.tokenizer, template, formats)
            try:
                return await script(preparer)
            finally:
                preparer.close()

        return asyncio.run(main())

    return run_script


@pytest.mark.slow
def test_a_body_that_kills_the_process_fails_alone(run: Callable[[Script], Any]) -> None:
    async def script(preparer: Preparer) -> list[Any]:
        works = [pid, pid, die, pid, fail, pid]
        return await asyncio.gather(*(preparer.prepare(w, LARGE, LIMITS) for w in works), return_exceptions=True)

    before, same, death, after, defect, last = run(script)
    assert before == same != after == last
    assert (death.status, death.is_final) == (500, True)
    assert "memory" in death.message
    assert "KeyError: 'a defect'" in str(defect), "with the traceback, for the log"


@pytest.mark.slow
def test_one_that_takes_too_long_is_ended(run: Callable[[Script], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(preparer: Preparer) -> list[Any]:
        before = await preparer.prepare(pid, LARGE, LIMITS)
        monkeypatch.setattr(preparation_process, "MAX_SECONDS", 0.0)
        with pytest.raises(RequestError) as raised:
            await preparer.prepare(hang, LARGE, LIMITS)
        monkeypatch.undo()
        return [before, raised.value.status, await preparer.prepare(pid, LARGE, LIMITS)]

    before, status, after = run(script)
    assert status == 504
    assert before != after


def test_the_queue_is_bounded_and_a_cancelled_request_leaves_it(
    run: Callable[[Script], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparer, "MAX_LARGE", 3)

    async def script(preparer: Preparer) -> list[Any]:
        tasks = [asyncio.ensure_future(preparer.prepare(w, LARGE, LIMITS)) for w in (pid, die, pid)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as raised:
            await preparer.prepare(pid, LARGE, LIMITS)
        assert raised.value.status == 429
        tasks[1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert preparer.num_large == 0
        return results

    first, cancelled, last = run(script)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert first == last


def test_a_stop_ends_all_that_wait(run: Callable[[Script], Any]) -> None:
    async def script(preparer: Preparer) -> list[Any]:
        tasks = [asyncio.ensure_future(preparer.prepare(w, LARGE, LIMITS)) for w in (pid, hang, pid)]
        await tasks[0]
        preparer.stop()
        results = await asyncio.gather(*tasks[1:], return_exceptions=True)
        preparer.close()
        for size in (len(LARGE), len(LARGE) // 2):
            results += await asyncio.gather(preparer.prepare(pid, LARGE[:size], LIMITS), return_exceptions=True)
        return results

    assert [error.status for error in run(script)] == [503] * 4


# In the server


class Paused:
    """Replaces `Preparer.prepare` by one that waits for `go`."""

    def __init__(self, api: ApiServer, monkeypatch: pytest.MonkeyPatch):
        self.num_waiting, self.num_cancelled, self.go = 0, 0, False
        original = api._service.preparer.prepare

        async def prepare(*arguments: Any) -> Any:
            self.num_waiting += 1
            try:
                while not self.go:
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
            return await original(*arguments)

        monkeypatch.setattr(api._service.preparer, "prepare", prepare)


def test_a_disconnect_cancels_the_preparation(start_api: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api = start_api()
    paused = Paused(api, monkeypatch)
    with RawHttpConnection(api.url).send("/v1/completions", json.dumps(LARGE_BODY).encode()):
        api.wait_until(lambda: paused.num_waiting == 1)
    api.wait_until(lambda: paused.num_cancelled == 1)


def test_the_time_of_the_preparation_counts(start_api: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """timeout_ms stands in the body, so it is known after the preparation only; MAX_RPC_TIMEOUT_MS before."""
    api = start_api(lambda submission: [])
    paused = Paused(api, monkeypatch)
    with RawHttpConnection(api.url) as connection:
        connection.send("/", json.dumps({"prompt": "a", "timeout_ms": 100}).encode())
        api.wait_until(lambda: paused.num_waiting == 1)
        time.sleep(0.1)
        paused.go = True
        assert connection.status() == 504
    limited = start_api(max_rpc_timeout_ms=100)
    Paused(limited, monkeypatch)
    response = limited.post("/v1/completions", LARGE_BODY)
    assert (response.status_code, "not validated and tokenized within 0.1 s" in response.text) == (504, True)


def test_a_request_that_is_prepared_takes_a_slot(start_api: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api = start_api(lambda submission: [ScriptedOutput([65], "length")], concurrency_limit=1, queue_limit=0)
    assert api.post("/v1/completions", LARGE_BODY).status_code == 200, "its own slot is free for it"
    monkeypatch.setattr(api._service.preparer, "num_large", 1)
    assert api.post("/v1/completions", {"prompt": "a"}).status_code == 429
    assert api._service.num_open == 1, "a drain waits for it"


def test_the_memory_of_all_bodies_is_bounded(start_api: StartApi) -> None:
    """A body counts while it is read, and no longer once its sequences run."""
    api = start_api(max_body_mb=1)
    with ExitStack() as stack:
        for _ in range(16):
            connection = stack.enter_context(RawHttpConnection(api.url))
            connection.send("/v1/completions", b" " * 1_000_000, content_length=1 << 20)
        api.wait_until(lambda: api._service.body_memory.used == 16_000_000)
        response = api.post("/v1/completions", {"prompt": "a", "user": " " * 900_000})
        assert (response.status_code, "16 x MAX_BODY_MB" in response.text) == (429, True)
    api.wait_until(lambda: api._service.body_memory.used == 0)
    with api.open_stream("/v1/completions", {"prompt": "a", "stream": True, "user": " " * 900_000}):
        api.engine.next_submission()
        assert api._service.body_memory.used == 0


# Grammars

SLOW = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.*{chr(98 + i)}.*"} for i in range(20)]}  # 20 s


def test_a_grammar_that_takes_long_to_check_is_refused_and_delays_nobody(
    byte_model: ByteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_checker, "CHECK_SECONDS", 1.0)

    def status(fields: dict[str, Any]) -> int:
        response = api.post("/v1/completions", {"prompt": "a", "max_tokens": 1} | fields)
        if response.status_code == 400:
            assert response.json()["error"]["param"] == "guided_json"
        return response.status_code

    with ApiServer(byte_model, lambda submission: [ScriptedOutput([], "length")]) as api, ThreadPoolExecutor() as pool:
        assert status({"guided_json": {"type": "string", "pattern": "a+"}}) == 200  # starts the process
        slow = pool.submit(status, {"guided_json": SLOW})
        assert status({"guided_json": {"type": "integer"}}) == 200
        assert not slow.done()
        assert slow.result() == 400
        started_at = time.monotonic()
        assert status({"guided_json": SLOW}) == 400
        assert time.monotonic() - started_at < 0.9  # the result is kept
        assert status({"guided_json": {"type": "string", "pattern": "b+"}}) == 200
        assert status({"guided_json": {"type": "string", "pattern": "b+("}}) == 400
