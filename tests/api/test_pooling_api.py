"""Requests to embedding and reranking models, with a fake engine: fields, errors, slots and large answers."""

import base64
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtp_llm.api import embeddings as embeddings_api
from rtp_llm.api import rerank as rerank_api
from rtp_llm.api.pooling_schema import MAX_INPUTS
from rtp_llm.parallel.part_spec import EmbeddingInfo
from tests.api.api_server import ApiServer, routes
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import TIMEOUT_SECONDS, ScriptedOutput, Submission
from tests.api.pooling_checkpoints import RerankTokens
from tests.quick import slow_except

SIZE = 4
INFO = EmbeddingInfo(SIZE, prompts={"query": "q:", "doc": ""}, default_prompt="query")


def state(submission: Submission) -> list[ScriptedOutput]:
    """A state that shows the prompt: its length and its first tokens."""
    values = [float(len(submission.prompt)), *map(float, submission.prompt[: SIZE - 1])]
    values += [0.0] * (SIZE - len(values))
    return [ScriptedOutput([], "stop", hidden_state=np.array(values, np.float32).tobytes())]


def start(start_api: StartApi, script: Any = state, info: EmbeddingInfo = INFO, **settings: Any) -> ApiServer:
    return start_api(script, task_type="DENSE_EMBEDDING", embedding=info, **settings)


def embeddings(api: ApiServer, body: dict[str, Any]) -> list[list[float]]:
    response = api.post("/v1/embeddings", body)
    assert response.status_code == 200, response.text
    return [item["embedding"] for item in response.json()["data"]]


def prompt_tokens(api: ApiServer, body: dict[str, Any]) -> list[list[int]]:
    """Returns what the engine got."""
    embeddings(api, body)
    return [api.engine.next_submission().prompt for _ in range(api.engine.num_pending_submissions)]


def test_the_engine_pools_and_samples_nothing(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start(start_api)
    embeddings(api, {"input": "a"})
    submission = api.engine.next_submission()
    assert (submission.prompt, submission.params["pooling"]) == (byte_model.tokens("q:a"), True)


def test_embeddings_are_normalized_if_the_checkpoint_says_so(start_api: StartApi) -> None:
    ids = [[3, 4], [5]]
    normalized, plain = ([2.0, 3.0, 4.0, 0.0], [1.0, 5.0, 0.0, 0.0])
    api = start(start_api, info=EmbeddingInfo(SIZE, normalize=False))
    assert embeddings(api, {"input": ids}) == [normalized, plain]
    assert embeddings(start(start_api), {"input": ids, "dimensions": 2}) == [
        pytest.approx([2 / math.sqrt(13), 3 / math.sqrt(13)]),
        pytest.approx([1 / math.sqrt(26), 5 / math.sqrt(26)]),
    ]


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({}, "q:a"),
        ({"prompt_name": "doc"}, "a"),
        ({"prompt": "find: "}, "find: a"),
        ({"prompt": ""}, "a"),
        ({"encoding_format": None, "dimensions": None, "user": "u", "model": "x"}, "q:a"),
    ],
    ids=str,
)
def test_prompts(options: dict[str, Any], prompt: str, start_api: StartApi, byte_model: ByteModel) -> None:
    assert prompt_tokens(start(start_api), {"input": "a", **options}) == [byte_model.tokens(prompt)]


@pytest.mark.parametrize("size", [4, 2000, 100_000], ids="{} bytes".format)
def test_truncation_keeps_the_start(size: int, start_api: StartApi, byte_model: ByteModel) -> None:
    """Also of bodies that another process prepares."""
    text = "".join(chr(97 + index % 26) for index in range(size))
    api = start(start_api)
    for truncate, kept in ((3, 3), (-1, 2047), (5000, 2047)):
        body = {"input": text, "truncate_prompt_tokens": truncate, "prompt": ""}
        assert prompt_tokens(api, body) == [byte_model.tokens(text)[:kept]]
    ids = [7] * 3000
    assert prompt_tokens(api, {"input": [ids, [1]], "truncate_prompt_tokens": 9}) == [[7] * 9, [1]]


ERRORS: list[tuple[str, dict[str, Any], str | None, Sequence[str]]] = [
    ("/v1/embeddings", {}, "input", ("input",)),
    ("/v1/embeddings", {"input": []}, None, ("empty list",)),
    ("/v1/embeddings", {"input": ""}, "input", ("empty",)),
    ("/v1/embeddings", {"input": ["a", ""]}, "input[1]", ("empty",)),
    ("/v1/embeddings", {"input": [[1], []]}, "input[1]", ("empty",)),
    ("/v1/embeddings", {"input": [[1], [258]]}, "input[1]", ("258", "vocabulary")),
    ("/v1/embeddings", {"input": ["a", "a" * 2048]}, "input[1]", ("2047",)),
    ("/v1/embeddings", {"input": "a" * (1 << 20)}, "input", ("2047", "at least")),
    ("/v1/embeddings", {"input": ["a"] * (MAX_INPUTS + 1)}, "input", (str(MAX_INPUTS),)),
    ("/v1/embeddings", {"input": "a", "dimensions": SIZE + 1}, "dimensions", (str(SIZE),)),
    ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions", ("1",)),
    ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format", ("float", "base64")),
    ("/v1/embeddings", {"input": "a", "prompt_name": "x"}, "prompt_name", ("doc, query",)),
    ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", ("0",)),
    ("/v1/embeddings", {"input": "\ud800"}, "input", ("Unicode",)),
    ("/v1/embeddings/sparse", {"input": "a"}, None, ("/v1/embeddings",)),
    ("/similarity", {"left": ["a"], "right": ["b"], "return_response": True}, "return_response", ()),
    ("/similarity", {"left": ["a", ""], "right": ["b"]}, "left[1]", ("empty",)),
    ("/similarity", {"left": ["a"] * MAX_INPUTS, "right": ["b"]}, "right", (str(MAX_INPUTS),)),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), ERRORS, ids=lambda value: str(value)[:50])
def test_errors(path: str, body: dict[str, Any], param: str | None, words: Sequence[str], start_api: StartApi) -> None:
    api = start(start_api)
    with api.client() as client:
        response = client.post(path, content=json.dumps(body))
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert all(word in error["message"] for word in words), error
    if param is not None:
        assert error["param"] == param, error
    assert api.engine.num_pending_submissions == 0


def test_a_state_that_is_not_finite_is_an_error(start_api: StartApi) -> None:
    """JSON has no NaN: a client would fail to parse the answer."""
    nan = np.array([1, math.nan, 1, 1], np.float32).tobytes()
    api = start(start_api, lambda submission: [ScriptedOutput([], "stop", hidden_state=nan)])
    response = api.post("/v1/embeddings", {"input": ["a", "b"]})
    assert (response.status_code, "NaN" in response.text) == (500, True)
    api.errors.lines.clear()


def test_an_error_of_one_sequence_ends_the_request(start_api: StartApi) -> None:
    def script(submission: Submission) -> list[ScriptedOutput]:
        if submission.prompt[-1] == 2:
            return [ScriptedOutput([], "error", error="it failed")]
        return [] if submission.prompt[-1] == 3 else state(submission)

    api = start(start_api, script)
    response = api.post("/v1/embeddings", {"input": [[1], [3], [2], [1]]})
    assert (response.status_code, response.json()["message"]) == (500, "it failed")
    assert api.engine.next_abort()


@pytest.mark.parametrize(("concurrency_limit", "queue_limit"), slow_except([(3, 1), (2, 100)], (2, 100)))
def test_many_inputs_queue_within_their_request(concurrency_limit: int, queue_limit: int, start_api: StartApi) -> None:
    """Four at a time are in the engine: all slots that there are, or twice as many as run in a step. The request keeps
    its slots to the end, and every input is answered, in order.
    """
    api = start(start_api, None, concurrency_limit=concurrency_limit, queue_limit=queue_limit)
    inputs = [[1 + index % 200, 1 + index // 200] for index in range(MAX_INPUTS)]
    answers: list[Any] = []
    body = {"input": inputs, "encoding_format": "base64"}
    thread = threading.Thread(target=lambda: answers.append(embeddings(api, body)))
    thread.start()
    running = [api.engine.next_submission() for _ in range(4)]
    for index in range(MAX_INPUTS):
        assert api.engine.num_pending_submissions == 0
        if index in (2, 1000) and queue_limit == 1:
            assert api.post("/v1/embeddings", {"input": "a"}).status_code == 429
        oldest = running.pop(0)
        api.engine.send_outputs(oldest, *state(oldest))
        if index + 4 < MAX_INPUTS:
            running.append(api.engine.next_submission())
    thread.join(TIMEOUT_SECONDS)
    vectors = np.frombuffer(b"".join(map(base64.b64decode, answers[0])), "<f4").reshape(-1, SIZE)
    expected = np.array([[2, *ids, 0] for ids in inputs], np.float32)
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)


def test_without_a_free_slot_the_request_is_rejected(start_api: StartApi) -> None:
    api = start(start_api, None, concurrency_limit=1, queue_limit=0)
    with api.client() as client:
        thread = threading.Thread(target=client.post, args=("/v1/embeddings",), kwargs={"json": {"input": "a"}})
        thread.start()
        submission = api.engine.next_submission()
        response = api.post("/v1/embeddings", {"input": ["a", "b"]})
        assert (response.status_code, "Retry-After" in response.headers) == (429, True)
        api.engine.send_outputs(submission, *state(submission))
        thread.join(TIMEOUT_SECONDS)


def test_a_timeout_aborts_what_runs(start_api: StartApi) -> None:
    api = start(start_api, lambda submission: [])
    response = api.post("/v1/embeddings", {"input": ["a", "b"], "timeout_ms": 50})
    assert (response.status_code, "0.05 s" in response.text) == (504, True)
    assert {api.engine.next_abort() for _ in "ab"} == {api.engine.next_submission().id for _ in "ab"}


def test_a_disconnect_aborts_what_runs(start_api: StartApi) -> None:
    api = start(start_api, lambda submission: [])
    with api.client(timeout=0.5) as client, pytest.raises(Exception, match="timed out"):
        client.post("/v1/embeddings", json={"input": ["a", "b"]})
    assert {api.engine.next_abort() for _ in "ab"} == {api.engine.next_submission().id for _ in "ab"}


def test_the_lost_engine_returns_and_computes_the_rest(start_api: StartApi) -> None:
    api = start(start_api, None)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(embeddings(api, {"input": [[1], [2]]})))
    thread.start()
    first = api.engine.next_submission()
    api.engine.send_outputs(first, *state(first))
    api.engine.next_submission()
    api.engine.close()
    api.new_engine(state)
    thread.join(TIMEOUT_SECONDS)
    assert len(answers[0]) == 2


def test_metrics_and_usage_count_each_prompt(start_api: StartApi) -> None:
    api = start(start_api)
    response = api.post("/v1/embeddings", {"input": [[1, 2], [3]], "model": "x"}).json()
    assert response["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert (response["object"], response["model"]) == ("list", "fake")
    assert api.metric("rtp_llm_prompt_tokens_total", model_name="fake") == 3


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_the_event_loop_spends_little_on_a_large_answer(encoding: str, start_api: StartApi) -> None:
    """As in test_large_inputs: CPU time, five times what a probe may wait."""
    size = 4096
    vector = np.random.default_rng(0).normal(size=size).astype(np.float32).tobytes()
    script = lambda submission: [ScriptedOutput([], "stop", hidden_state=vector)]  # noqa: E731
    api = start(start_api, script, EmbeddingInfo(size), concurrency_limit=64)
    body = {"input": [[1]] * 512, "encoding_format": encoding}
    with api.event_loop_cpu() as seconds, api.client(timeout=5 * TIMEOUT_SECONDS) as client:
        raw = client.post("/v1/embeddings", json=body).content
    print(f"{encoding}: {len(raw) >> 10} KiB, at most {max(seconds) * 1000:.0f} ms")
    assert max(seconds) < 0.5


@pytest.mark.slow
def test_the_event_loop_spends_little_on_many_documents(tmp_path: Path) -> None:
    """Each prompt repeats the query, which is encoded once and not copied for each document."""

    def script(submission: Submission) -> list[ScriptedOutput]:
        yes, no = submission.params["logprob_token_ids"]
        return [ScriptedOutput([yes], "length", [(-0.1, 0, [(yes, -0.1), (no, -len(submission.prompt) / 1000)])])]

    documents = ["the " * (index % 900) for index in range(MAX_INPUTS)]
    with ApiServer(RerankTokens(tmp_path), script, task_type="RERANKER", concurrency_limit=64) as api:
        with api.event_loop_cpu() as seconds, api.client(timeout=5 * TIMEOUT_SECONDS) as client:
            body = client.post("/v1/rerank", json={"query": "who " * 500, "documents": documents}).json()
        scores = {result["index"]: result["relevance_score"] for result in body["results"]}
        assert scores[0] < scores[500] <= scores[1500] == scores[600]
        print(f"{len(documents)} documents: at most {max(seconds) * 1000:.0f} ms")
        assert max(seconds) < 0.5


@pytest.mark.parametrize("task", ["LANGUAGE_MODEL", "DENSE_EMBEDDING"])
def test_every_route_that_needs_another_task_says_so(task: str, start_api: StartApi) -> None:
    """A new POST route serves every task, or answers 400 that names TASK_TYPE, or belongs to this test's lists."""
    api = start_api(state, task_type=task, embedding=INFO)
    every_route = set(routes(api.app.routes))
    posted = {path for method, path in every_route if method == "POST" and "{" not in path}
    for_all = {"/tokenize", "/detokenize", "/tokenizer/encode", "/set_log_level"}
    for_all |= {path for path in posted if path != "/" and ("GET", path) in every_route}  # status
    pooling = {*embeddings_api.PATHS, *rerank_api.PATHS}
    assert posted >= pooling | {"/", "/v1/completions", "/v1/messages", "/v1/responses"}
    refused = {path for path in posted if "needs TASK_TYPE" in api.post(path, {}).text}
    is_text = task == "LANGUAGE_MODEL"
    assert refused == (pooling if is_text else posted - for_all - {"/", *embeddings_api.PATHS})
