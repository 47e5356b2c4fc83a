"""Endpoints of an embedding model: /v1/embeddings (OpenAI) and /similarity (alibaba/rtp-llm)."""

import asyncio
import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray

from rtp_llm.api.body import body_schema
from rtp_llm.api.pooling import final_outputs
from rtp_llm.api.pooling_preparation import EmbeddingPreparation, PackedPrompt
from rtp_llm.api.pooling_schema import EmbeddingRequest, SimilarityRequest
from rtp_llm.api.service import Service
from rtp_llm.api.stream import json_response
from rtp_llm.contract.engine_output import EngineOutput
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import execution_failed, invalid_params, unsupported
from rtp_llm.parallel.part_spec import EmbeddingInfo

Vector = NDArray[np.float32]
DENSE_PATHS = ("/v1/embeddings", "/v1/embeddings/dense", "/embeddings")
SIMILARITY_PATHS = ("/similarity", "/v1/similarity")
# Kinds of embeddings that upstream serves and that no supported checkpoint has the layers for.
UNSUPPORTED_PATHS = ("/v1/embeddings/sparse", "/v1/embeddings/colbert", "/v1/classifier")
POOLING = SamplingParams(max_tokens=1, pooling=True)
PATHS = (*DENSE_PATHS, *SIMILARITY_PATHS, *UNSUPPORTED_PATHS)
MIN_NORM = 1e-12  # as torch.nn.functional.normalize
VECTORS_BETWEEN_PAUSES = 16


def embeddings_router(service: Service, info: EmbeddingInfo) -> APIRouter:
    router = APIRouter()
    endpoints = EmbeddingEndpoints(service, info)
    for path in (*DENSE_PATHS, "/"):  # as upstream's embedding service
        router.add_api_route(path, endpoints.embeddings, methods=["POST"], openapi_extra=body_schema(EmbeddingRequest))
    for path in SIMILARITY_PATHS:
        router.add_api_route(path, endpoints.similarity, methods=["POST"], openapi_extra=body_schema(SimilarityRequest))
    for path in UNSUPPORTED_PATHS:
        router.add_api_route(path, endpoints.refuse, methods=["POST"], include_in_schema=False)
    return router


class EmbeddingEndpoints:
    """The HTTP endpoints of an embedding model: /v1/embeddings and /similarity."""

    def __init__(self, service: Service, info: EmbeddingInfo):
        self.service, self.info = service, info
        self._preparation = EmbeddingPreparation(info)

    async def embeddings(self, request: Request) -> Response:
        prepared = await self.service.prepare(self._preparation.embedding, request)
        body, prompts = prepared.body, prepared.prompts
        if (body.dimensions or 1) > self.info.size:
            message = f"dimensions={body.dimensions}: the model's embeddings have {self.info.size}; allowed: 1 to that"
            raise invalid_params(message, "dimensions")
        outputs = await final_outputs(request, self.service, prompts, POOLING, body.timeout_ms)
        data = []
        for index, output in enumerate(outputs):
            vector = self._vector(output, body.dimensions)
            content = _base64(vector) if body.encoding_format == "base64" else _floats(vector)
            data.append({"object": "embedding", "index": index, "embedding": content})
            if index % VECTORS_BETWEEN_PAUSES == 0:
                await asyncio.sleep(0)  # others run
        usage = _usage(prompts)
        return json_response({"object": "list", "data": data, "model": self.service.model_name, "usage": usage})

    async def similarity(self, request: Request) -> Response:
        prepared = await self.service.prepare(self._preparation.similarity, request)
        outputs = await final_outputs(request, self.service, prepared.prompts, POOLING, prepared.body.timeout_ms)
        similarity = await asyncio.to_thread(self._similarity, outputs, len(prepared.body.left))
        return json_response({"similarity": [_floats(row) for row in similarity]})

    async def refuse(self, request: Request) -> Response:
        raise unsupported(f"{request.url.path} is not supported; allowed: /v1/embeddings (the last token's state)")

    def _similarity(self, outputs: Sequence[EngineOutput], num_left: int) -> Vector:
        vectors = np.stack([_normalized(self._vector(output)) for output in outputs])
        return vectors[:num_left] @ vectors[num_left:].T

    def _vector(self, output: EngineOutput, dimensions: int | None = None) -> Vector:
        """Returns the embedding, or its first `dimensions`, as Matryoshka embeddings are cut (Kusupati et al. 2022).

        Raises RequestError 500 if it is not finite, which JSON cannot express.
        """
        vector = np.frombuffer(output.hidden_state, np.float32)[:dimensions]
        if not np.isfinite(vector).all():
            raise execution_failed("the model's hidden state contains NaN or infinity")
        return _normalized(vector) if self.info.normalize else vector


def _normalized(vector: Vector) -> Vector:
    norm = max(float(np.linalg.norm(vector.astype(np.float64))), MIN_NORM)
    return (vector / norm).astype(np.float32)


def _base64(vector: Vector) -> str:
    """Returns little-endian float32, as OpenAI's API."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _floats(vector: Vector) -> Iterator[float]:
    """Yields the shortest numbers that are the same float32: half as many digits as the same float64."""
    return (float(f"{value:.9g}") for value in vector.tolist())


def _usage(prompts: Sequence[PackedPrompt]) -> dict[str, Any]:
    num_tokens = sum(map(len, prompts))
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
