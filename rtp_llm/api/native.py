"""Native endpoints, as in alibaba/rtp-llm (frontend_app.py): POST /, /batch_infer, /tokenize, /tokenizer/encode.

All accept any content type, since the README of alibaba/rtp-llm uses a plain `curl -d`.
"""

import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from rtp_llm.api.body import body_schema
from rtp_llm.api.params import StopWords, native_to_openai, sampling_params, text_params
from rtp_llm.api.preparation import Preparation, merged_config
from rtp_llm.api.schema import (
    BatchInferRequest,
    EncodeRequest,
    GenerateConfig,
    NativeRequest,
    TokenizeRequest,
)
from rtp_llm.api.service import OutputChunk, Service, SlotReservation, TextParams
from rtp_llm.api.stream import EventStream, cancel_on_disconnect, compact_json, merge
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import RequestError, invalid_format, long_prompt


@dataclass
class NativeSequence:
    """One of the sequences that are generated for a prompt, and its output so far."""

    prompt: list[int]
    params: SamplingParams
    config: GenerateConfig
    aux_string: str
    started_at: float = field(default_factory=time.monotonic)
    first_token_ms: float = 0.0
    chunks: list[OutputChunk] = field(default_factory=list)
    num_sent_chunks: int = 0  # chunks whose text has been sent

    def add(self, chunk: OutputChunk) -> None:
        if not self.chunks:
            self.first_token_ms = self._elapsed_ms()
        self.chunks.append(chunk)

    @property
    def finished(self) -> bool:
        return bool(self.chunks and self.chunks[-1].finish_reason)

    def response_text(self) -> str:
        """Returns the text so far, or with return_incremental the text since the last call."""
        start = self.num_sent_chunks if self.config.return_incremental else 0
        self.num_sent_chunks = len(self.chunks)
        return "".join(c.text for c in self.chunks[start:])

    @property
    def tokens(self) -> list[int]:
        return [t for c in self.chunks for t in c.tokens]

    def _elapsed_ms(self) -> float:
        return round((time.monotonic() - self.started_at) * 1000, 3)

    def _logprobs(self) -> list[float]:
        return [logprob[0] for c in self.chunks for logprob in c.logprobs]

    def aux_info(self) -> dict[str, Any]:
        first_chunk = self.chunks[0] if self.chunks else OutputChunk("", [])
        cached_tokens = first_chunk.cached_tokens
        cumulative = [sum(self._logprobs())] if self.config.return_cum_log_probs else []
        return {
            "cost_time": self._elapsed_ms(),
            "iter_count": len(self.chunks),
            "prefix_len": cached_tokens,
            "input_len": len(self.prompt),
            "output_len": len(self.tokens),
            "step_output_len": len(self.chunks[-1].tokens) if self.chunks else 0,
            "first_token_cost_time": self.first_token_ms,
            "wait_time": round(first_chunk.queue_ms, 3),
            "pd_sep": False,
            "cum_log_probs": cumulative,
            "beam_responses": [],
            "softmax_probs": [math.exp(v) for v in self._logprobs()] if self.config.return_softmax_probs else [],
            "reuse_len": cached_tokens,
            "local_reuse_len": cached_tokens,
            "remote_reuse_len": 0,
            "memory_reuse_len": 0,
            "aux_string": self.aux_string,
        }

    def extras(self) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self.config.return_output_ids:
            extras["output_ids"] = [self.tokens]
        if self.config.return_input_ids:
            extras["input_ids"] = [self.prompt]
        return extras


@dataclass
class NativeResponse:
    """The response to one request. `groups` holds the sequences of each prompt: one, or num_return_sequences."""

    groups: list[list[NativeSequence]]
    text_params: TextParams
    is_batch: bool
    reservation: SlotReservation

    @property
    def sequences(self) -> list[NativeSequence]:
        return [sequence for group in self.groups for sequence in group]

    def start(self, service: Service) -> AsyncGenerator[tuple[int, OutputChunk]]:
        return merge([service.generate(s.prompt, s.params, self.text_params, self.reservation) for s in self.sequences])

    def to_json(self) -> dict[str, Any]:
        bodies = [_group_json(group) for group in self.groups]
        return {"response_batch": bodies} if self.is_batch else bodies[0]


def _group_json(group: Sequence[NativeSequence]) -> dict[str, Any]:
    first = group[0]
    has_lists = first.config.num_return_sequences > 0
    body = {
        "response": [s.response_text() for s in group] if has_lists else first.response_text(),
        "finished": all(s.finished for s in group),
        **first.extras(),
    }
    if first.config.aux_info:
        body["aux_info"] = [s.aux_info() for s in group] if has_lists else first.aux_info()
    return body


def native_router(service: Service, stop_words: StopWords) -> APIRouter:
    router = APIRouter()
    endpoints = NativeEndpoints(service, stop_words)
    for path, endpoint, model in (
        ("/", endpoints.generate, NativeRequest),
        ("/batch_infer", endpoints.batch_infer, BatchInferRequest),
        ("/tokenize", endpoints.tokenize, TokenizeRequest),
        ("/tokenizer/encode", endpoints.encode, EncodeRequest),
    ):
        extra = body_schema(model, streams=model is NativeRequest)
        router.add_api_route(path, endpoint, methods=["POST"], openapi_extra=extra)
    return router


class NativeEndpoints:
    """The native endpoints of one served model."""

    def __init__(self, service: Service, stop_words: StopWords):
        self.service, self.stop_words = service, stop_words

    async def generate(self, request: Request) -> Response:
        prepared = await self.service.prepare(Preparation.native, request)
        body, config = prepared.body, merged_config(prepared.body)
        yield_generator = body.yield_generator or config.yield_generator
        is_stream = yield_generator or body.stream or config.is_streaming
        if config.return_incremental and not is_stream:
            raise invalid_format("return_incremental needs yield_generator or stream", "return_incremental")
        response = self._make_response(await prepared.prompts(), config, prepared.is_batch)
        if is_stream:
            events = self._stream(response, openai_framing=body.stream and not yield_generator)
            return EventStream(events, response.reservation, self.service.config.sse_ping_seconds)
        await cancel_on_disconnect(request, self._collect(response), response.reservation)
        return JSONResponse(response.to_json())

    async def batch_infer(self, request: Request) -> Response:
        prepared = await self.service.prepare(Preparation.batch_infer, request)
        config = merged_config(prepared.body)
        response = self._make_response(await prepared.prompts(), config, is_batch=True)
        await cancel_on_disconnect(request, self._collect(response), response.reservation)
        return JSONResponse(response.to_json())

    async def tokenize(self, request: Request) -> Response:
        return Response(await self.service.prepare(Preparation.tokenize, request), media_type="application/json")

    async def encode(self, request: Request) -> Response:
        return Response(await self.service.prepare(Preparation.encode, request), media_type="application/json")

    def _make_response(self, prompts: list[list[int]], config: GenerateConfig, is_batch: bool) -> NativeResponse:
        body = native_to_openai(config, self.service.tokenizer)
        n = body.n or 1
        needs_logprobs = config.return_cum_log_probs or config.return_softmax_probs
        groups = []
        for prompt in prompts:
            if config.max_new_tokens == 0:
                raise long_prompt("max_new_tokens is 0: nothing would be generated; allowed: 1 or more")
            params = sampling_params(
                body,
                self.service,
                self.stop_words,
                prompt,
                max_tokens=config.max_new_tokens,
                temperature=1.0,
                logprobs=0 if needs_logprobs else None,
            )
            aux_string = self.service.config.aux_string
            groups.append(
                [NativeSequence(prompt, replace(params, seed=params.seed + i), config, aux_string) for i in range(n)]
            )
        text = text_params(body, self.stop_words)
        reservation = self.service.admit(n * len(prompts))  # last: after an error the slots would stay reserved
        self.service.metrics.params_n.observe(n)
        return NativeResponse(groups, text, is_batch, reservation)

    async def _collect(self, response: NativeResponse) -> None:
        sequences = response.sequences
        async with aclosing(response.start(self.service)) as chunks:
            async for index, chunk in chunks:
                sequences[index].add(chunk)

    async def _stream(self, response: NativeResponse, openai_framing: bool) -> AsyncGenerator[str]:
        """Yields server-sent events, each with a whole response object.

        As in alibaba/rtp-llm, an event starts with `data:` without a space, and the last event is `[done]`. With
        `openai_framing`, an event starts with `data: `, and there is no `[done]`.
        """
        prefix = "data: " if openai_framing else "data:"
        sequences = response.sequences
        try:
            async with aclosing(response.start(self.service)) as chunks:
                async for index, chunk in chunks:
                    sequences[index].add(chunk)
                    yield f"{prefix}{compact_json(response.to_json())}\r\n\r\n"
        except RequestError as error:
            yield f"{prefix}{compact_json(error.body())}\r\n\r\n"
        if not openai_framing:
            yield "data:[done]\r\n\r\n"
