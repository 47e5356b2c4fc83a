"""Schemas of requests to embedding and reranking models."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rtp_llm.api.schema import Count, Prompt, RequestBody

MAX_INPUTS = 2048  # of a request, as in OpenAI's API

Inputs = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]


class PoolingRequest(RequestBody):
    """Fields that all requests to embedding and reranking models share."""

    model: str | None = None
    timeout_ms: Annotated[int, Field(lt=2**31)] | None = None


class EmbeddingRequest(PoolingRequest):
    """Body of POST /v1/embeddings.

    input: a text, token ids, or a list of either.
    prompt: a text that precedes each input text. prompt_name: the name of such a text in the checkpoint.
    """

    input: Prompt  # as many as MAX_INPUTS
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None


class SimilarityRequest(PoolingRequest):
    """Body of POST /similarity: the cosine similarity of each text in `left` with each text in `right`."""

    left: Inputs
    right: Inputs
    return_response: bool = False


def _document_text(value: Any) -> Any:
    return value["text"] if isinstance(value, dict) and isinstance(value.get("text"), str) else value


Document = Annotated[str, BeforeValidator(_document_text)]  # a text, or {"text": …} as Cohere and Jina accept it


class RerankRequest(PoolingRequest):
    """Body of POST /v1/rerank (Jina, Cohere) and /v1/reranker (alibaba/rtp-llm, Voyage).

    top_n, top_k: number of results; 0: all. truncation: cut documents that are too long; otherwise they are an error.
    sorted: by relevance; otherwise in the order of the documents.
    """

    query: str = Field(min_length=1)
    documents: Annotated[list[Document], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    instruction: str | None = None
    top_n: Count | None = None
    top_k: Count | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    truncation: bool | None = None
    sorted: bool | None = None
    return_documents: bool | None = None
