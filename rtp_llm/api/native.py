"""Upstream's native endpoints: POST /, /batch_infer, /tokenize, /tokenizer/encode (alibaba/rtp-llm, frontend_app.py).

All take any content type: upstream's README posts with a bare `curl -d`.
"""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from rtp_llm.api.body import body_schema, json_body, validate
from rtp_llm.api.openai import render_chat
from rtp_llm.api.params import StopWords, native_sampling, sampling_params, text_params
from rtp_llm.api.schema import (
    BatchInferRequest,
    EncodeRequest,
    GenerateConfig,
    NativeRequest,
    TokenizeRequest,
)
from rtp_llm.api.service import OutputChunk, Service, SlotReservation, TextParams
from rtp_llm.api.stream import EventStream, cancel_on_disconnect, dumps, merge
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import RequestError, empty_prompt, invalid_format, long_prompt, unsupported

_ALIASES = {
    "gen_length": "max_new_tokens",
    **{f"output_{n}": f"return_{n}" for n in ("hidden_states", "logits", "input_ids")},
}


# Lists by nature: everywhere else a list has one value per prompt of a batch.
_LISTS = {"stop_words_str", "stop_words_list", "bad_words_list", "select_tokens_str", "select_tokens_id"}


@dataclass
class NativeSequence:
    """One sequence of one prompt, as far as it has come."""

    prompt: list[int]
    params: SamplingParams
    config: GenerateConfig
    aux_string: str
    started: float = field(default_factory=time.monotonic)
    first_token_ms: float = 0.0
    chunks: list[OutputChunk] = field(default_factory=list)
    num_shown: int = 0  # chunks whose text the client has

    def add(self, chunk: OutputChunk) -> None:
        if not self.chunks:
            self.first_token_ms = self._elapsed_ms()
        self.chunks.append(chunk)

    @property
    def finished(self) -> bool:
        return bool(self.chunks and self.chunks[-1].finish)

    def show(self) -> str:
        """The text so far, or with return_incremental what has come since the last call."""
        start = self.num_shown if self.config.return_incremental else 0
        self.num_shown = len(self.chunks)
        return "".join(c.text for c in self.chunks[start:])

    @property
    def tokens(self) -> list[int]:
        return [t for c in self.chunks for t in c.tokens]

    def _elapsed_ms(self) -> float:
        return round((time.monotonic() - self.started) * 1000, 3)

    def _logprobs(self) -> list[float]:
        return [record[0] for c in self.chunks for record in c.logprobs]

    def aux_info(self) -> dict[str, Any]:
        first = self.chunks[0] if self.chunks else OutputChunk("", [])
        reused = first.cached_tokens
        cumulative = [sum(self._logprobs())] if self.config.return_cum_log_probs else []
        return {
            "cost_time": self._elapsed_ms(),
            "iter_count": len(self.chunks),
            "prefix_len": reused,
            "input_len": len(self.prompt),
            "output_len": len(self.tokens),
            "step_output_len": len(self.chunks[-1].tokens) if self.chunks else 0,
            "first_token_cost_time": self.first_token_ms,
            "wait_time": round(first.queue_ms, 3),
            "pd_sep": False,
            "cum_log_probs": cumulative,
            "beam_responses": [],
            "softmax_probs": [math.exp(v) for v in self._logprobs()] if self.config.return_softmax_probs else [],
            "reuse_len": reused,
            "local_reuse_len": reused,
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
    """What one POST / answers: per prompt one answer, or several with num_return_sequences."""

    answers: list[list[NativeSequence]]
    text: TextParams
    batch: bool
    admission: SlotReservation

    @property
    def flat(self) -> list[NativeSequence]:
        return [a for group in self.answers for a in group]

    def start(self, service: Service) -> AsyncGenerator[tuple[int, OutputChunk]]:
        return merge([service.generate(a.prompt, a.params, self.text, self.admission) for a in self.flat])

    def to_json(self) -> dict[str, Any]:
        bodies = [_single(group) for group in self.answers]
        return {"response_batch": bodies} if self.batch else bodies[0]


def _single(group: Sequence[NativeSequence]) -> dict[str, Any]:
    first = group[0]
    several = first.config.num_return_sequences > 0
    body = {
        "response": [a.show() for a in group] if several else first.show(),
        "finished": all(a.finished for a in group),
        **first.extras(),
    }
    if first.config.aux_info:
        body["aux_info"] = [a.aux_info() for a in group] if several else first.aux_info()
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
    """The endpoints of one service."""

    def __init__(self, service: Service, stop_words: StopWords):
        self.service, self.stop_words = service, stop_words

    async def generate(
        self, request: Request, body: Annotated[NativeRequest, Depends(json_body(NativeRequest))]
    ) -> Response:
        config = _generate_config(body)
        yields = body.yield_generator or config.yield_generator
        streaming = yields or body.stream or config.is_streaming
        if config.return_incremental and not streaming:
            raise invalid_format("return_incremental needs yield_generator or stream", "return_incremental")
        prompts, batch = await self._prompts(body)
        reply = self._make_response(prompts, config, batch)
        if streaming:
            return EventStream(self._stream(reply, openai_framing=body.stream and not yields), reply.admission)
        await cancel_on_disconnect(request, self._collect(reply), reply.admission)
        return JSONResponse(reply.to_json())

    async def batch_infer(
        self, request: Request, body: Annotated[BatchInferRequest, Depends(json_body(BatchInferRequest))]
    ) -> Response:
        config = _generate_config(validate(NativeRequest, body.model_dump()))
        self.service.check_capacity(len(body.prompt_batch))
        prompts = [await self._encode(text, config) for text in body.prompt_batch]
        reply = self._make_response(prompts, config, batch=True)
        await cancel_on_disconnect(request, self._collect(reply), reply.admission)
        return JSONResponse(reply.to_json())

    async def tokenize(self, body: Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))]) -> dict[str, Any]:
        if body.messages:
            text = render_chat(self.service, body.messages, body.tools)
            return {"token_ids": await self.service.encode(text, add_special_tokens=False)}
        if body.prompt is None:
            raise RequestError(400, 509, "NO_PROMPT_ERROR", "send prompt or messages", param="prompt")
        return {"token_ids": await self.service.encode(body.prompt, body.add_special_tokens)}

    async def encode(self, body: Annotated[EncodeRequest, Depends(json_body(EncodeRequest))]) -> dict[str, Any]:
        await self.service.encode(body.prompt)
        ids, tokens, offsets = await asyncio.to_thread(self.service.tokenizer.encode_with_offsets, body.prompt)
        answer = {"token_ids": ids, "tokens": tokens, "error": ""}
        return answer | ({"offset_mapping": offsets} if body.return_offsets_mapping else {})

    async def _prompts(self, body: NativeRequest) -> tuple[list[list[int]], bool]:
        """Token ids of every prompt, and whether the answer is a batch. Raises RequestError 400."""
        config = _generate_config(body)
        if body.urls or body.images:
            raise unsupported("urls and images are not supported: this is a language model", "urls")
        if body.prompt_batch is not None:
            if not body.prompt_batch:
                raise empty_prompt("prompt_batch is empty: send at least one prompt")
            self.service.check_capacity(len(body.prompt_batch))
            return [await self._encode(text, config) for text in body.prompt_batch], True
        text = body.prompt if body.prompt is not None else body.text
        if text is None and body.messages:
            rendered = render_chat(self.service, body.messages)
            return [await self._encode(rendered, config, add_special_tokens=False)], False
        if text is None:
            raise RequestError(
                400, 509, "NO_PROMPT_ERROR", "no prompt: send prompt, text, prompt_batch or messages", param="prompt"
            )
        if isinstance(text, list):  # upstream answers the first of a list that is no prompt_batch
            text = text[0] if text else ""
        return [await self._encode(text, config)], False

    async def _encode(self, text: str, config: GenerateConfig, add_special_tokens: bool = True) -> list[int]:
        if not text:
            raise empty_prompt()
        prompt = await self.service.encode(text, add_special_tokens)
        self.service.check_prompt(prompt)
        return prompt

    def _make_response(self, prompts: list[list[int]], config: GenerateConfig, batch: bool) -> NativeResponse:
        body = native_sampling(config, self.service.tokenizer)
        copies = body.n or 1
        wants_probs = config.return_cum_log_probs or config.return_softmax_probs
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
                logprobs=0 if wants_probs else None,
            )
            aux = self.service.config.aux_string
            groups.append(
                [NativeSequence(prompt, replace(params, seed=params.seed + i), config, aux) for i in range(copies)]
            )
        text = text_params(body, self.stop_words, config.timeout_ms)
        admission = self.service.admit(copies * len(prompts))
        self.service.metrics.params_n.observe(copies)
        return NativeResponse(groups, text, batch, admission)

    async def _collect(self, reply: NativeResponse) -> None:
        answers = reply.flat
        async with aclosing(reply.start(self.service)) as chunks:
            async for index, chunk in chunks:
                answers[index].add(chunk)

    async def _stream(self, reply: NativeResponse, openai_framing: bool) -> AsyncGenerator[str]:
        """Whole response objects, one an event. Upstream's framing has no space after `data:` and ends with
        `[done]`; with a top-level `stream` it has the space and no end."""
        prefix = "data: " if openai_framing else "data:"
        answers = reply.flat
        try:
            async with aclosing(reply.start(self.service)) as chunks:
                async for index, chunk in chunks:
                    answers[index].add(chunk)
                    yield f"{prefix}{dumps(reply.to_json())}\r\n\r\n"
        except RequestError as error:
            yield f"{prefix}{dumps(error.body())}\r\n\r\n"
        if not openai_framing:
            yield "data:[done]\r\n\r\n"


def _generate_config(body: NativeRequest) -> GenerateConfig:
    """The nested object, under either name, with top-level fields laid over it. Raises RequestError 400."""
    fields = GenerateConfig.model_fields.keys()
    nested = (body.generate_config or {}) | (body.generation_config or {})
    top = body.model_extra or {}
    merged: dict[str, Any] = {}
    for name, value in itertools.chain(nested.items(), top.items()):
        name = _ALIASES.get(name, name)
        # Upstream takes a list where a batch shares the value; the first stands for all.
        scalar = not isinstance(value, list) or name in _LISTS
        if name in fields and value is not None:
            merged[name] = value if scalar or not value else value[0]
    return validate(GenerateConfig, merged)
