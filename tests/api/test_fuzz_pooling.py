"""Fuzzes the routes of embedding and reranking models, as test_fuzz_bodies and test_fuzz_schema those for text."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from rtp_llm.api.pooling_schema import EmbeddingRequest, RerankRequest, SimilarityRequest
from rtp_llm.parallel.part_spec import EmbeddingInfo
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.api.pooling_checkpoints import RerankTokens
from tests.api.test_fuzz_bodies import BOUNDED, FACTOR, VALUES, assert_valid_response
from tests.api.test_fuzz_schema import check_operation
from tests.quick import slow_except

STATE = np.array([3, 4], np.float32).tobytes()
INFO = EmbeddingInfo(2, prompts={"a": "a"})
ENDPOINTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "/v1/embeddings": ({"input": "Hi"}, tuple(EmbeddingRequest.model_fields)),
    "/similarity": ({"left": ["Hi"], "right": ["Ho"]}, tuple(SimilarityRequest.model_fields)),
    "/v1/rerank": ({"query": "Hi", "documents": ["Ho", {"text": "Hu"}]}, tuple(RerankRequest.model_fields)),
    "/v1/reranker": ({"query": "Hi", "documents": ["Ho"]}, tuple(RerankRequest.model_fields)),
}


def answer(submission: Submission) -> list[ScriptedOutput]:
    assert submission.prompt, "no request may reach the engine without tokens"
    if submission.params["pooling"]:
        return [ScriptedOutput([], "stop", hidden_state=STATE)]
    yes, no = submission.params["logprob_token_ids"]
    return [ScriptedOutput([yes], "length", [(-0.1, 0, [(yes, -0.1), (no, -2.0)])])]


@pytest.fixture(scope="module")
def apis(byte_model: ByteModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ApiServer]]:
    """An embedding server and a reranking server."""
    model = RerankTokens(tmp_path_factory.mktemp("reranker"))
    with (
        ApiServer(byte_model, answer, task_type="DENSE_EMBEDDING", embedding=INFO) as embedding,
        ApiServer(model, answer, task_type="RERANKER") as reranker,
    ):
        yield [embedding, reranker]


@pytest.fixture
def api(path: str, apis: list[ApiServer]) -> ApiServer:
    return apis["rerank" in path]


@pytest.fixture
def client(api: ApiServer) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client


@pytest.mark.parametrize("path", ENDPOINTS)
def test_wrong_values_in_known_fields(path: str, client: httpx.Client) -> None:
    base, names = ENDPOINTS[path]
    assert client.post(path, json=base).status_code == 200

    @settings(BOUNDED, max_examples=FACTOR * 60)
    @given(changes=st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    def send(changes: dict[str, Any]) -> None:
        raw = json.dumps({**base, **changes}).replace("Infinity", "1e999").encode()
        assert_valid_response(client.post(path, content=raw))

    send()


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_known_field_with_every_kind_of_value(path: str, client: httpx.Client) -> None:
    base, names = ENDPOINTS[path]
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        10**400,
        1.5,
        "",
        "\ud800",
        [],
        [None],
        [""],
        {},
        {"text": 1},
        [[1]],
        [[]],
        [{}],
    ]
    for name in names:
        for value in values:
            response = client.post(path, content=json.dumps({**base, name: value}).encode())
            assert_valid_response(response)
            if value is None and name not in base:
                assert response.status_code == 200, (name, "null is not set")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("path", slow_except(ENDPOINTS, "/similarity", "/v1/rerank"))
def test_bodies_by_the_document(path: str, mode: GenerationMode, api: ApiServer) -> None:
    document = schemathesis.openapi.from_dict(api.get("/openapi.json").json(), config=schemathesis.Config())
    document.config.update(base_url=api.url)
    check_operation(document, f"POST {path}", mode, 20)
