"""Native endpoints, as in alibaba/rtp-llm (frontend_app.py): POST /, /batch_infer, /tokenize, /tokenizer/encode; and
vLLM's /detokenize.

All accept any content type, since the README of alibaba/rtp-llm uses a plain `curl -d`.
"""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from rtp_llm.api import tokenization
from rtp_llm.api.body import body_schema
from rtp_llm.api.compact_json import compact_json
from rtp_llm.api.native_preparation import merged_config, prepare_batch, prepare_native
from rtp_llm.api.params import StopWords, native_to_openai, sampling_params, text_params
from rtp_llm.api.prepared import Prepared
from rtp_llm.api.schema import (
    BatchInferRequest,
    DetokenizeRequest,
    EncodeRequest,
    GenerateConfig,
    NativeRequest,
    TokenizeRequest,
)
from rtp_llm.api.service import Service, SlotReservation
from rtp_llm.api.stream import (
    EventStream,
    cancel_on_disconnect,
    coalesced,
    json_parts,
    json_response,
    merge,
)
from rtp_llm.api.text_stream import OutputChunk, TextParams
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import RequestError, invalid_format

MAX_NEW_TOKENS = 32000  # upstream's default
SMALL_TOKENS = 4096  # of prompts and outputs, up to which a response is encoded at once, in less than 10 ms
PING = b": ping\r\n\r\n"  # with the line ends of the other events


@dataclass
class NativeSequence:
    """One sequence (a prompt has num_return_sequences of them) and its output so far."""

    prompt: list[int]
    params: SamplingParams
    config: GenerateConfig
    aux_string: str
    started_at: float = field(default_factory=time.monotonic)
    first_token_ms: float = 0.0
    texts: list[str] = field(default_factory=list)  # of each chunk
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    first_chunk: OutputChunk | None = None
    last_chunk: OutputChunk | None = None
    num_sent_texts: int = 0

    def add(self, chunk: OutputChunk) -> None:
        if self.first_chunk is None:
            self.first_token_ms = self._elapsed_ms()
            self.first_chunk = chunk
        self.last_chunk = chunk
        self.texts.append(chunk.text)
        self.tokens += chunk.tokens
        self.logprobs += [logprob[0] for logprob in chunk.logprobs]

    @property
    def finished(self) -> bool:
        return bool(self.last_chunk and self.last_chunk.finish_reason)

    def response_text(self) -> str:
        """Returns the text so far; with return_incremental, only the text since the last call."""
        start = self.num_sent_texts if self.config.return_incremental else 0
        self.num_sent_texts = len(self.texts)
        return "".join(self.texts[start:])

    def _elapsed_ms(self) -> float:
        return round((time.monotonic() - self.started_at) * 1000, 3)

    def aux_info(self) -> dict[str, Any]:
        first_chunk = self.first_chunk or OutputChunk("", [])
        cached_tokens = first_chunk.cached_tokens
        cumulative = [sum(self.logprobs)] if self.config.return_cum_log_probs else []
        return {
            "cost_time": self._elapsed_ms(),
            "iter_count": len(self.texts),
            "prefix_len": cached_tokens,
            "input_len": len(self.prompt),
            "output_len": len(self.tokens),
            "step_output_len": len(self.last_chunk.tokens) if self.last_chunk else 0,
            "first_token_cost_time": self.first_token_ms,
            "wait_time": round(first_chunk.queue_ms, 3),
            "pd_sep": False,
            "cum_log_probs": cumulative,
            "beam_responses": [],
            "softmax_probs": [math.exp(v) for v in self.logprobs] if self.config.return_softmax_probs else [],
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
    """A response in alibaba/rtp-llm's own format.

    groups    for each prompt, the list of its num_return_sequences sequences
    is_batch  whether the response is {"response_batch": [an object per prompt]}; otherwise it is one such object
    """

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

    def event(self, prefix: str) -> Iterator[str]:
        """Yields one server-sent event: `prefix` ("data:" or "data: "), the whole response so far as JSON, and CRLF
        CRLF as in alibaba/rtp-llm. Yields a large event in several pieces.
        """
        is_large = sum(len(s.tokens) + len(s.prompt) for s in self.sequences) > SMALL_TOKENS
        parts = json_parts(self.to_json()) if is_large else (compact_json(self.to_json()),)
        yield from coalesced(itertools.chain((prefix,), parts, ("\r\n\r\n",)))


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
        ("/detokenize", endpoints.detokenize, DetokenizeRequest),
        ("/tokenizer/encode", endpoints.encode, EncodeRequest),
    ):
        extra = body_schema(model, streams=model is NativeRequest)
        router.add_api_route(path, endpoint, methods=["POST"], openapi_extra=extra)
    return router


class NativeEndpoints:
    """The endpoints with alibaba/rtp-llm's own request format (POST / and others) of one served model."""

    def __init__(self, service: Service, stop_words: StopWords):
        self.service, self.stop_words = service, stop_words

    async def generate(self, request: Request) -> Response:
        prepared = await self.service.prepare(prepare_native, request)
        body, config = prepared.body, merged_config(prepared.body)
        yield_generator = body.yield_generator or config.yield_generator
        is_stream = yield_generator or body.stream or config.is_streaming
        if config.return_incremental and not is_stream:
            message = "return_incremental is for streams only: set yield_generator or stream too, or leave it out"
            raise invalid_format(message, "return_incremental")
        response = await self._make_response(prepared, config)
        if is_stream:
            events = self._stream(response, openai_framing=body.stream and not yield_generator)
            return EventStream(events, response.reservation, self.service.config.sse_ping_seconds, PING)
        await cancel_on_disconnect(request, self._collect(response), response.reservation)
        return json_response(response.to_json())

    async def batch_infer(self, request: Request) -> Response:
        prepared = await self.service.prepare(prepare_batch, request)
        config = merged_config(prepared.body)
        response = await self._make_response(prepared, config)
        await cancel_on_disconnect(request, self._collect(response), response.reservation)
        return json_response(response.to_json())

    async def tokenize(self, request: Request) -> Response:
        return Response(await self.service.prepare(tokenization.tokenize, request), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        return Response(await self.service.prepare(tokenization.detokenize, request), media_type="application/json")

    async def encode(self, request: Request) -> Response:
        return Response(await self.service.prepare(tokenization.encode, request), media_type="application/json")

    async def _make_response(self, prepared: Prepared[NativeRequest], config: GenerateConfig) -> NativeResponse:
        prompts = await prepared.prompts()
        body = native_to_openai(config, self.service.tokenizer)
        n = body.n or 1
        needs_logprobs = config.return_cum_log_probs or config.return_softmax_probs
        groups = []
        for prompt in prompts:
            if config.max_new_tokens == 0:
                message = "max_new_tokens is 0: nothing would be generated; allowed: 1 or more"
                raise RequestError(400, 511, "LONG_PROMPT_ERROR", message, param="max_new_tokens")
            params = sampling_params(
                body,
                self.service,
                self.stop_words,
                prompt,
                max_tokens=config.max_new_tokens,
                default_max_tokens=MAX_NEW_TOKENS,
                temperature=1.0,
                logprobs=0 if needs_logprobs else None,
                grammar=prepared.grammar,
            )
            aux_string = self.service.config.aux_string
            groups.append(
                [NativeSequence(prompt, replace(params, seed=params.seed + i), config, aux_string) for i in range(n)]
            )
        text = text_params(body, self.stop_words)
        reservation = self.service.admit(n * len(prompts))  # last: after an error the slots would stay reserved
        self.service.metrics.params_n.observe(n)
        return NativeResponse(groups, text, prepared.is_batch, reservation)

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
                    for piece in response.event(prefix):
                        yield piece
                        if not piece.endswith("\r\n\r\n"):
                            await asyncio.sleep(0)  # others run
        except RequestError as error:
            yield f"{prefix}{compact_json(error.body())}\r\n\r\n"
        if not openai_framing:
            yield "data:[done]\r\n\r\n"
