"""Endpoints of a reranking model: /v1/rerank (Jina, Cohere, vLLM) and /v1/reranker (alibaba/rtp-llm).

The relevance of a document is the probability of "yes" as the next token, compared with "no". Rank 0 returns the
logprobs of these two tokens from the step that computes the prompt. That costs one row of logits, a thousandth of a
prompt of 400 tokens. Computing it from the hidden state would cost less, but the API process has no weights, and the
output head may be quantized.
"""

import math
import secrets
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from rtp_llm.api.body import body_schema, parse_body
from rtp_llm.api.field_names import named_field
from rtp_llm.api.pooling import final_outputs
from rtp_llm.api.pooling_preparation import PackedPrompt, PreparedInputs, pack
from rtp_llm.api.pooling_schema import RerankRequest
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.prompt_limits import PromptLimits
from rtp_llm.api.service import Service
from rtp_llm.api.stream import json_response
from rtp_llm.contract.engine_output import EngineOutput
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.text.rerank_format import DEFAULT_INSTRUCTION, RerankFormat
from rtp_llm.text.truncation import encode_start

UPSTREAM_PATH = "/v1/reranker"
PATHS = ("/v1/rerank", "/rerank", "/v2/rerank", UPSTREAM_PATH)
MAX_EXPONENT = 700.0  # of math.exp


def rerank_router(service: Service, rerank_format: RerankFormat) -> APIRouter:
    router = APIRouter()
    endpoints = RerankEndpoints(service, rerank_format)
    for path in PATHS:
        router.add_api_route(path, endpoints.rerank, methods=["POST"], openapi_extra=body_schema(RerankRequest))
    return router


class RerankEndpoints:
    """The endpoints of one reranking model."""

    def __init__(self, service: Service, rerank_format: RerankFormat):
        self.service, self._preparation = service, RerankPreparation(rerank_format)
        self._params = SamplingParams(
            max_tokens=1, temperature=0, logprobs=0, logprob_token_ids=(rerank_format.yes, rerank_format.no)
        )

    async def rerank(self, request: Request) -> Response:
        prepared = await self.service.prepare(self._preparation.rerank, request)
        body, prompts = prepared.body, prepared.prompts
        outputs = await final_outputs(request, self.service, prompts, self._params, body.timeout_ms)
        scores = [_relevance(output) for output in outputs]
        order = list(range(len(scores)))
        if body.sorted is not False:
            order.sort(key=lambda index: -scores[index])
        is_upstream = request.url.path == UPSTREAM_PATH
        results = []
        for index in order[: body.top_n or body.top_k or None]:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if body.documents:
                text = body.documents[index]
                result["document"] = text if is_upstream else {"text": text}
            results.append(result)
        num_tokens = sum(map(len, prompts))
        if is_upstream:
            return json_response({"results": results, "total_tokens": num_tokens})
        return json_response(
            {
                "id": f"rerank-{secrets.token_hex(12)}",
                "model": self.service.model_name,
                "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
                "results": results,
            }
        )


@dataclass(frozen=True)
class RerankPreparation:
    """Turns a rerank request into prompts (token ids) for a reranking model, one per pair of query and document."""

    format: RerankFormat

    def rerank(self, preparation: Preparation, raw: bytes, limits: PromptLimits) -> PreparedInputs[RerankRequest]:
        """Validates and tokenizes a rerank request. Returns one prompt per document; all begin with the same tokens
        (the query). The result's `body`, the request, keeps the documents only if the response must repeat them.
        """
        body = parse_body(RerankRequest, raw)
        limits.check_engine()
        end = pack(self.format.end)
        with named_field("query"):
            text = self.format.question(body.query, body.instruction or DEFAULT_INSTRUCTION)
            start = [*self.format.start, *encode_start(preparation.encoder.encode_text, text, limits.max_seq_len)]
            room = limits.max_seq_len - 1 - len(start) - len(self.format.end)
            limits.check_length(limits.max_seq_len - room, prefix="at least ")  # a document needs a token, too
        prompts, head = [], pack(start)
        for index, document in enumerate(body.documents):
            with named_field(f"documents[{index}]"):
                ids = encode_start(
                    preparation.encoder.encode_text, f" {document}", min(room + 1, body.max_tokens_per_doc or room + 1)
                )
                if body.truncation is False:
                    limits.check_length(len(start) + len(ids) + len(self.format.end), prefix="at least ")
                prompts.append(PackedPrompt(head, pack(ids[:room]), end))
        documents = [] if body.return_documents is False else body.documents
        return PreparedInputs(body.model_copy(update={"query": "", "documents": documents}), prompts)


def _relevance(output: EngineOutput) -> float:
    """Returns the probability of the first token of `logprob_token_ids` if only these two were possible."""
    (_, yes), (_, no) = output.logprobs[0][2]
    return 1 / (1 + math.exp(min(no - yes, MAX_EXPONENT)))
