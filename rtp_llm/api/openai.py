"""The OpenAI endpoints: /v1/chat/completions, /v1/completions, /v1/models (platform.openai.com/docs/api-reference)."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from rtp_llm.api.body import body_schema
from rtp_llm.api.formatters import ChatFormatter, CompletionFormatter, ResponseHeader, chat_logprobs
from rtp_llm.api.generation import Choice, GenerationRequest
from rtp_llm.api.params import StopWords, merge_extra_configs, sampling_params, text_params
from rtp_llm.api.preparation import Preparation, Prepared
from rtp_llm.api.schema import ChatRequest, CompletionRequest, OpenAIRequest
from rtp_llm.api.service import Service
from rtp_llm.api.stream import EventStream, cancel_on_disconnect, compact_json, json_response
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import RequestError, invalid_params

CHAT_TEMPERATURE = 0.7  # upstream's default; OpenAI's is 1
COMPLETION_TEMPERATURE = 1.0


def openai_router(service: Service, stop_words: StopWords) -> APIRouter:
    router = APIRouter()
    endpoints = OpenAIEndpoints(service, stop_words)
    for path in ("/v1/chat/completions", "/chat/completions"):
        extra = body_schema(ChatRequest, streams=True)
        router.add_api_route(path, endpoints.chat, methods=["POST"], openapi_extra=extra)
    extra = body_schema(CompletionRequest, streams=True)
    router.add_api_route("/v1/completions", endpoints.completions, methods=["POST"], openapi_extra=extra)
    router.add_api_route("/v1/models", endpoints.models, methods=["GET"])
    for path in ("/chat/render", "/v1/chat/render"):
        router.add_api_route(path, endpoints.render, methods=["POST"], openapi_extra=body_schema(ChatRequest))
    return router


class OpenAIEndpoints:
    """The OpenAI endpoints of one served model."""

    def __init__(self, service: Service, stop_words: StopWords):
        self.service, self.stop_words = service, stop_words

    async def models(self) -> dict[str, Any]:
        engine = self.service.client.info
        card = {
            "id": self.service.model_name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "rtp-llm",
            "root": self.service.model_name,
            "parent": None,
            "permission": [],
            "max_model_len": engine.max_seq_len if engine else None,
        }
        return {"object": "list", "data": [card]}

    # Chat

    async def chat(self, request: Request) -> Response:
        prepared = await self.service.prepare(Preparation.chat, request)
        body, generation = prepared.body, await self._chat_generation(prepared)
        header = ResponseHeader(f"chatcmpl-{secrets.token_hex(12)}", "chat.completion", self.service.model_name)
        if body.stream:
            formatter = ChatFormatter(self.service.tokenizer, bool(body.logprobs))
            return EventStream(
                self._stream(formatter, header, generation, body),
                generation.reservation,
                self.service.config.sse_ping_seconds,
            )
        await cancel_on_disconnect(request, _collect(generation, self.service), generation.reservation)
        choices = [self._chat_choice(i, s, bool(body.logprobs)) for i, s in enumerate(generation.sequences)]
        return json_response(header.response(choices, generation.usage()))

    async def render(self, request: Request) -> dict[str, Any]:
        """Returns the rendered prompt and the parameters of a chat request, for debugging."""
        prepared = await self.service.prepare(Preparation.chat, request)
        generation = await self._chat_generation(prepared)
        generation.reservation.release()
        return {
            "input_prompt": prepared.text,
            "input_ids": generation.prompts[0],
            "input_urls": [],
            "tokenizer_info": str(self.service.config.tokenizer_path or self.service.config.checkpoint_path),
            "max_seq_len": self.service.engine_info.max_seq_len,
            "eos_token_id": min(self.service.tokenizer.eos_ids, default=None),
            "stop_word_ids_list": [[i] for i in generation.sequences[0].params.stop_token_ids],
            "stop_words_list": list(generation.text_params.stop),
            "renderer_info": {"class_name": "ChatTemplate", "template": self.service.template.name},
            "generate_config": generation.sequences[0].params.to_json(),
        }

    async def _chat_generation(self, prepared: Prepared[ChatRequest]) -> GenerationRequest:
        body, prompts = prepared.body, await prepared.prompts()
        extra = body.extra_configs
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if extra and "max_new_tokens" in extra.model_fields_set:
            limit = extra.max_new_tokens
        if limit == 0:
            raise invalid_params("max_tokens is 0: nothing would be generated; allowed: 1 or more", "max_tokens")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        merged = merge_extra_configs(body, extra, self.service.tokenizer)
        params = sampling_params(
            merged,
            self.service,
            self.stop_words,
            prompts[0],
            max_tokens=limit,
            temperature=CHAT_TEMPERATURE,
            logprobs=logprobs,
        )
        return self._generation(merged, prompts, [params])

    def _chat_choice(self, index: int, sequence: Choice, logprobs: bool) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": sequence.text},
            "logprobs": {"content": chat_logprobs(sequence.chunks, self.service.tokenizer)} if logprobs else None,
            "finish_reason": sequence.finish_reason,
        }

    # Completions

    async def completions(self, request: Request) -> Response:
        prepared = await self.service.prepare(Preparation.completion, request)
        body, generation = prepared.body, await self._completion_generation(prepared)
        header = ResponseHeader(f"cmpl-{secrets.token_hex(12)}", "text_completion", self.service.model_name)
        formatter = CompletionFormatter(self.service.tokenizer, generation, body.logprobs is not None, bool(body.echo))
        if body.stream:
            return EventStream(
                self._stream(formatter, header, generation, body),
                generation.reservation,
                self.service.config.sse_ping_seconds,
            )
        await cancel_on_disconnect(request, _collect(generation, self.service), generation.reservation)
        choices = [formatter.full_choice(i, s) for i, s in enumerate(generation.sequences)]
        return json_response(header.response(choices, generation.usage()))

    async def _completion_generation(self, prepared: Prepared[CompletionRequest]) -> GenerationRequest:
        body, prompts = prepared.body, await prepared.prompts()
        if body.max_tokens == 0 and not body.echo:
            raise invalid_params("max_tokens=0 makes sense with echo=true only; allowed: 1 or more", "max_tokens")
        params = [
            sampling_params(
                body,
                self.service,
                self.stop_words,
                prompt,
                max_tokens=body.max_tokens,
                temperature=COMPLETION_TEMPERATURE,
                logprobs=body.logprobs,
                prompt_logprobs=bool(body.echo) and body.logprobs is not None,
            )
            for prompt in prompts
        ]
        generation = self._generation(body, prompts, params)
        generation.prompt_only = body.max_tokens == 0
        return generation

    # Both

    def _generation(
        self, body: OpenAIRequest, prompts: list[list[int]], params: list[SamplingParams]
    ) -> GenerationRequest:
        n = body.n or 1
        sequences = [
            Choice(prompt, replace(prompt_params, seed=prompt_params.seed + i))
            for prompt, prompt_params in zip(prompts, params, strict=True)
            for i in range(n)
        ]
        text = text_params(body, self.stop_words)
        reservation = self.service.admit(len(sequences))  # last: after an error the slots would stay reserved
        self.service.metrics.params_n.observe(n)
        return GenerationRequest(sequences, text, prompts, reservation)

    async def _stream(
        self,
        formatter: ChatFormatter | CompletionFormatter,
        header: ResponseHeader,
        generation: GenerationRequest,
        body: OpenAIRequest,
    ) -> AsyncGenerator[str]:
        options = body.stream_options
        with_usage = bool(options and options.include_usage)
        continuous_usage = with_usage and bool(options and options.continuous_usage_stats)

        def event(choice: dict[str, Any]) -> Iterator[str]:
            return header.stream_event([choice], generation.usage() if continuous_usage else None, with_usage)

        try:
            for index, sequence in enumerate(generation.sequences):
                for choice in formatter.initial_choices(index, sequence):
                    for piece in event(choice):
                        yield piece
            async with aclosing(generation.start(self.service)) as chunks:
                async for index, chunk in chunks:
                    sequence = generation.sequences[index]
                    sequence.chunks.append(chunk)
                    for choice in formatter.chunk_choices(index, sequence, chunk):
                        for piece in event(choice):
                            yield piece
                            if not piece.endswith("\n\n"):
                                await asyncio.sleep(0)  # others run
            if with_usage:
                for piece in header.stream_event([], generation.usage(), with_usage):
                    yield piece
        except RequestError as error:
            yield f"data: {compact_json(error.body())}\n\n"
        yield "data: [DONE]\n\n"


async def _collect(generation: GenerationRequest, service: Service) -> None:
    async with aclosing(generation.start(service)) as chunks:
        async for index, chunk in chunks:
            generation.sequences[index].chunks.append(chunk)
