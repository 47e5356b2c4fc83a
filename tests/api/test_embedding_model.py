"""A served embedding checkpoint gives the embeddings of transformers: the normalized state of the last token."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from tests.api.pooling_checkpoints import QUERY_PROMPT, write_embedding
from tests.api.servers import ServerProcess, running_server
from tests.sdk_clients import openai_client

TEXTS = ["The matrices", "Who decides what happens next? Only rank 0.", "naïve 数据 🚀\n", "the " * 300]
Embed = Callable[[str], NDArray[np.float32]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two ranks, with steps that split long texts and hold several short ones. TASK_TYPE follows from modules.json."""
    directory = tmp_path_factory.mktemp("embedding")
    write_embedding(directory / "model")
    limits = {"MAX_BATCH_TOKENS_SIZE": "128", "CONCURRENCY_LIMIT": "8", "QUEUE_LIMIT": "4"}
    ranks = {"TP_SIZE": "2", "WORLD_SIZE": "2"}
    with running_server(directory / "model", directory / "output", **limits, **ranks) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai_client(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def embed(server: ServerProcess) -> Embed:
    """Returns the oracle: a function of one text."""
    path: Path = server.checkpoint
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def embed(text: str) -> NDArray[np.float32]:
        state = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, -1]
        vector: NDArray[np.float32] = torch.nn.functional.normalize(state, dim=0).numpy()
        return vector

    return embed


def check(actual: Any, expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(np.array(actual, np.float32), expected, rtol=0, atol=1e-5)


def test_the_sdk_gets_the_embeddings_of_transformers(client: openai.OpenAI, embed: Embed) -> None:
    """All texts at once, in the SDK's default format, then each again, from the prefix cache."""
    response = client.embeddings.create(model="any", input=TEXTS)
    for index, text in enumerate(TEXTS):
        assert response.data[index].index == index
        check(response.data[index].embedding, embed(text))
        check(client.embeddings.create(model="any", input=text, encoding_format="float").data[0].embedding, embed(text))
    assert response.usage.total_tokens == response.usage.prompt_tokens > 300


def test_float_and_base64_are_the_same_numbers(http: httpx.Client) -> None:
    body = {"input": TEXTS[1]}
    [floats], [packed] = (
        http.post("/v1/embeddings", json=body | {"encoding_format": encoding}).json()["data"]
        for encoding in ("float", "base64")
    )
    decoded = np.frombuffer(base64.b64decode(packed["embedding"]), "<f4")
    assert np.array(floats["embedding"], np.float32).tolist() == decoded.tolist()
    assert all(float(f"{x:.9g}") == x for x in floats["embedding"]), "no digits that float32 does not have"
    assert np.linalg.norm(decoded) == pytest.approx(1, abs=1e-6)


def test_token_ids_are_used_as_they_are(http: httpx.Client, server: ServerProcess, embed: Embed) -> None:
    """LangChain sends lists of token ids, which have the special tokens already, or not."""
    tokenizer = AutoTokenizer.from_pretrained(server.checkpoint)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    response = http.post("/v1/embeddings", json={"input": ids}).json()
    for item, text in zip(response["data"], TEXTS, strict=True):
        check(item["embedding"], embed(text))
    assert response["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
    [single] = http.post("/v1/embeddings", json={"input": ids[0]}).json()["data"]
    check(single["embedding"], embed(TEXTS[0]))


@pytest.mark.parametrize("dimensions", [1, 7, 64])
def test_dimensions_cut_and_normalize(client: openai.OpenAI, embed: Embed, dimensions: int) -> None:
    cut = embed(TEXTS[0])[:dimensions]
    embedding = client.embeddings.create(model="any", input=TEXTS[0], dimensions=dimensions).data[0].embedding
    check(embedding, cut / np.linalg.norm(cut))


def test_prompts_precede_the_texts(http: httpx.Client, embed: Embed) -> None:
    for options, prefix in (
        ({"prompt_name": "query"}, QUERY_PROMPT),
        ({"prompt": "passage: "}, "passage: "),
        ({"prompt_name": "document"}, ""),
        ({}, ""),
    ):
        [item] = http.post("/v1/embeddings", json={"input": [TEXTS[0]], **options}).json()["data"]
        check(item["embedding"], embed(prefix + TEXTS[0]))


def test_similarity(http: httpx.Client, embed: Embed) -> None:
    similarity = http.post("/similarity", json={"left": TEXTS[:2], "right": TEXTS}).json()["similarity"]
    vectors = np.stack([embed(text) for text in TEXTS])
    check(similarity, vectors[:2] @ vectors.T)


def test_many_inputs_share_the_slots(http: httpx.Client, embed: Embed) -> None:
    """There are 12 of them, so the request queues within itself."""
    texts = [f"{index} {TEXTS[1]}" for index in range(150)]
    data = http.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"}).json()["data"]
    assert [item["index"] for item in data] == list(range(150))
    for index in (0, 70, 149):
        check(np.frombuffer(base64.b64decode(data[index]["embedding"]), "<f4"), embed(texts[index]))


def test_other_routes_name_the_task(http: httpx.Client) -> None:
    message = {"role": "user", "content": "a"}
    for path, body in (
        ("/v1/chat/completions", {"messages": [message]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/batch_infer", {"prompt_batch": ["a"]}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    ):
        response = http.post(path, json=body)
        assert (response.status_code, "TASK_TYPE" in response.text) == (400, True), path
    assert http.post("/tokenize", json={"prompt": "a"}).status_code == 200
    assert http.get("/v1/models").status_code == http.get("/health").status_code == 200
    assert len(http.post("/", json={"input": "a"}).json()["data"]) == 1, "as upstream's embedding service"
