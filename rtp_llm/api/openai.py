"""The OpenAI endpoints: /v1/chat/completions, /v1/completions, /v1/models (platform.openai.com/docs/api-reference)."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from rtp_llm.api.body import body_schema
from rtp_llm.api.chat import start_chat
from rtp_llm.api.compact_json import compact_json
from rtp_llm.api.formatters import ChatFormatter, ChoiceFormatter, CompletionFormatter, ResponseHeader, prompt_logprobs
from rtp_llm.api.generation import AnyChoice, Choice, GenerationRequest, make_generation
from rtp_llm.api.params import StopWords, sampling_params
from rtp_llm.api.preparation import Preparation
from rtp_llm.api.prepared import Prepared
from rtp_llm.api.schema import ChatRequest, CompletionRequest, OpenAIRequest
from rtp_llm.api.service import Service
from rtp_llm.api.stream import EventStream, json_response
from rtp_llm.errors import RequestError, invalid_params, model_not_found

COMPLETION_TEMPERATURE = 1.0
COMPLETION_MAX_TOKENS = 16  # OpenAI's default


def openai_router(service: Service, stop_words: StopWords) -> APIRouter:
    router = APIRouter()
    endpoints = OpenAIEndpoints(service, stop_words)
    for path in ("/v1/chat/completions", "/chat/completions"):
        extra = body_schema(ChatRequest, streams=True)
        router.add_api_route(path, endpoints.chat, methods=["POST"], openapi_extra=extra)
    extra = body_schema(CompletionRequest, streams=True)
    router.add_api_route("/v1/completions", endpoints.completions, methods=["POST"], openapi_extra=extra)
    router.add_api_route("/v1/models", endpoints.models, methods=["GET"])
    router.add_api_route("/v1/models/{name:path}", endpoints.model, methods=["GET"])  # org/name is one name
    for path in ("/chat/render", "/v1/chat/render"):
        router.add_api_route(path, endpoints.render, methods=["POST"], openapi_extra=body_schema(ChatRequest))
    return router


class OpenAIEndpoints:
    """The endpoints of OpenAI's chat and completion APIs for one served model."""

    def __init__(self, service: Service, stop_words: StopWords):
        self.service, self.stop_words = service, stop_words

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card(name) for name in self.service.model_names]}

    async def model(self, name: str) -> dict[str, Any]:
        if name not in self.service.model_names:
            raise model_not_found(name, self.service.model_names)
        return self._card(name)

    def _card(self, name: str) -> dict[str, Any]:
        engine = self.service.client.info
        return {
            "id": name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "rtp-llm",
            "root": self.service.model_name,
            "parent": None,
            "permission": [],
            "max_model_len": engine.max_seq_len if engine else None,
        }

    # Chat

    async def chat(self, request: Request) -> Response:
        prepared = await self.service.prepare(Preparation.chat, request)
        body, generation = prepared.body, await start_chat(prepared, self.service, self.stop_words)
        header = ResponseHeader(f"chatcmpl-{secrets.token_hex(12)}", "chat.completion", self.service.model_name)
        formatter = ChatFormatter(self.service.tokenizer, bool(body.logprobs))
        if body.stream:
            return EventStream(
                self._stream(formatter, header, generation, body),
                generation.reservation,
                self.service.config.sse_ping_seconds,
            )
        await generation.collect(request, self.service)
        choices = [formatter.full_choice(i, s) for i, s in enumerate(generation.sequences)]
        answer = header.response(choices, generation.usage())
        if body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(generation.sequences[0], self.service.tokenizer)
        return json_response(answer)

    async def render(self, request: Request) -> dict[str, Any]:
        """Returns the rendered prompt and the sampling parameters of a chat request, for debugging. Does not run it."""
        prepared = await self.service.prepare(Preparation.chat, request)
        generation = await start_chat(prepared, self.service, self.stop_words)
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
        await generation.collect(request, self.service)
        choices = [formatter.full_choice(i, s) for i, s in enumerate(generation.sequences)]
        if body.prompt_logprobs is not None:
            for choice, sequence in zip(choices, generation.sequences, strict=True):
                choice["prompt_logprobs"] = prompt_logprobs(sequence, self.service.tokenizer)
        return json_response(header.response(choices, generation.usage()))

    async def _completion_generation(self, prepared: Prepared[CompletionRequest]) -> GenerationRequest[Choice]:
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
                default_max_tokens=COMPLETION_MAX_TOKENS,
                temperature=COMPLETION_TEMPERATURE,
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs,
                grammar=prepared.grammar,
                bad_words=prepared.bad_words,
            )
            for prompt in prompts
        ]
        generation = make_generation(Choice, self.service, self.stop_words, body, prompts, params)
        generation.prompt_only = body.max_tokens == 0
        return generation

    # Both

    async def _stream(
        self,
        formatter: ChoiceFormatter[AnyChoice],
        header: ResponseHeader,
        generation: GenerationRequest[AnyChoice],
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
            async with aclosing(generation.run(self.service)) as chunks:
                async for index, chunk in chunks:
                    for choice in formatter.chunk_choices(index, generation.sequences[index], chunk):
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
