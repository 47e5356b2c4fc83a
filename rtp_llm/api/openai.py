"""The OpenAI endpoints: /v1/chat/completions, /v1/completions, /v1/models (platform.openai.com/docs/api-reference)."""

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from rtp_llm.api.body import body_schema, json_body
from rtp_llm.api.formatters import ChatFormatter, CompletionFormatter, ResponseHeader, chat_logprobs
from rtp_llm.api.generation import Choice, GenerationRequest
from rtp_llm.api.params import StopWords, merge_extra_configs, sampling_params, text_params
from rtp_llm.api.schema import ChatMessage, ChatRequest, CompletionRequest, OpenAIRequest
from rtp_llm.api.service import Service
from rtp_llm.api.stream import EventStream, cancel_on_disconnect, compact_json
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.errors import RequestError, empty_prompt, invalid_params, unsupported

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

    async def chat(self, request: Request, body: Annotated[ChatRequest, Depends(json_body(ChatRequest))]) -> Response:
        generation = await self._chat_generation(body)
        header = ResponseHeader(f"chatcmpl-{secrets.token_hex(12)}", "chat.completion", self.service.model_name)
        if body.stream:
            formatter = ChatFormatter(self.service.tokenizer, bool(body.logprobs))
            return EventStream(self._stream(formatter, header, generation, body), generation.reservation)
        await cancel_on_disconnect(request, _collect(generation, self.service), generation.reservation)
        choices = [self._chat_choice(i, s, bool(body.logprobs)) for i, s in enumerate(generation.sequences)]
        return JSONResponse(header.response(choices, generation.usage()))

    async def render(self, body: Annotated[ChatRequest, Depends(json_body(ChatRequest))]) -> dict[str, Any]:
        """Returns the rendered prompt and the parameters of a chat request, for debugging."""
        prompt = self._render(body)
        generation = await self._chat_generation(body)
        generation.reservation.release()
        return {
            "input_prompt": prompt,
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

    def _render(self, body: ChatRequest) -> str:
        kwargs = dict(body.chat_template_kwargs or {})
        if body.enable_thinking is not None:
            kwargs.setdefault("enable_thinking", body.enable_thinking)
        tools = None if body.tool_choice == "none" else body.tools
        return render_chat(self.service, body.messages, tools, body.add_generation_prompt, kwargs)

    async def _chat_generation(self, body: ChatRequest) -> GenerationRequest:
        if body.response_format and body.response_format.get("type", "text") != "text":
            raise unsupported("response_format: only {'type': 'text'} is supported", "response_format")
        prompt = await self.service.encode(self._render(body), add_special_tokens=False)
        self.service.check_prompt(prompt)
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
            prompt,
            max_tokens=limit,
            temperature=CHAT_TEMPERATURE,
            logprobs=logprobs,
        )
        return self._generation(merged, [prompt], [params], extra.timeout_ms if extra else 0)

    def _chat_choice(self, index: int, sequence: Choice, logprobs: bool) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": sequence.text},
            "logprobs": {"content": chat_logprobs(sequence.chunks, self.service.tokenizer)} if logprobs else None,
            "finish_reason": sequence.finish_reason,
        }

    # Completions

    async def completions(
        self, request: Request, body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))]
    ) -> Response:
        generation = await self._completion_generation(body)
        header = ResponseHeader(f"cmpl-{secrets.token_hex(12)}", "text_completion", self.service.model_name)
        formatter = CompletionFormatter(self.service.tokenizer, generation, body.logprobs is not None, bool(body.echo))
        if body.stream:
            return EventStream(self._stream(formatter, header, generation, body), generation.reservation)
        await cancel_on_disconnect(request, _collect(generation, self.service), generation.reservation)
        choices = [formatter.full_choice(i, s) for i, s in enumerate(generation.sequences)]
        return JSONResponse(header.response(choices, generation.usage()))

    async def _completion_generation(self, body: CompletionRequest) -> GenerationRequest:
        if body.suffix:
            raise unsupported("suffix is not supported: this model completes to the right only", "suffix")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise unsupported("best_of is not supported: leave it out, or make it equal to n", "best_of")
        prompts = await self._prompts(body)
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

    async def _prompts(self, body: CompletionRequest) -> list[list[int]]:
        prompt_field = body.prompt
        if isinstance(prompt_field, str):
            prompts = [await self.service.encode(prompt_field)]
        elif not prompt_field:
            raise empty_prompt("prompt is an empty list: send a text, texts, token ids or lists of token ids")
        else:
            prompts = []
            is_token_ids = isinstance(prompt_field[0], int)
            self.service.check_capacity(1 if is_token_ids else len(prompt_field) * (body.n or 1))
            if isinstance(prompt_field[0], int):
                prompts = [[int(t) for t in prompt_field]]
            else:
                for item in prompt_field:
                    prompts.append(await self.service.encode(item) if isinstance(item, str) else list(item))
        for prompt in prompts:
            self.service.check_prompt(prompt)
        return prompts

    # Both

    def _generation(
        self, body: OpenAIRequest, prompts: list[list[int]], params: list[SamplingParams], timeout_ms: int = 0
    ) -> GenerationRequest:
        n = body.n or 1
        sequences = [
            Choice(prompt, replace(prompt_params, seed=prompt_params.seed + i))
            for prompt, prompt_params in zip(prompts, params, strict=True)
            for i in range(n)
        ]
        text = text_params(body, self.stop_words, timeout_ms)
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

        def event(choice: dict[str, Any]) -> str:
            return header.stream_event([choice], generation.usage() if continuous_usage else None, with_usage)

        try:
            for index, sequence in enumerate(generation.sequences):
                for choice in formatter.initial_choices(index, sequence):
                    yield event(choice)
            async with aclosing(generation.start(self.service)) as chunks:
                async for index, chunk in chunks:
                    sequence = generation.sequences[index]
                    sequence.chunks.append(chunk)
                    for choice in formatter.chunk_choices(index, sequence, chunk):
                        yield event(choice)
            if with_usage:
                yield header.stream_event([], generation.usage(), with_usage)
        except RequestError as error:
            yield f"data: {compact_json(error.body())}\n\n"
        yield "data: [DONE]\n\n"


def render_chat(
    service: Service,
    messages: Sequence[ChatMessage],
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    kwargs: dict[str, Any] | None = None,
) -> str:
    """Returns the prompt that the chat template makes of the messages. Raises RequestError 400."""
    reserved = {"messages", "tools", "add_generation_prompt"} & (kwargs or {}).keys()
    if reserved:
        message = f"chat_template_kwargs: {min(reserved)!r} is reserved; use the request field of that name"
        raise invalid_params(message, "chat_template_kwargs")
    plain = [m.model_dump(exclude_unset=True) for m in messages]
    return service.render(plain, tools=tools or None, add_generation_prompt=add_generation_prompt, **(kwargs or {}))


async def _collect(generation: GenerationRequest, service: Service) -> None:
    async with aclosing(generation.start(service)) as chunks:
        async for index, chunk in chunks:
            generation.sequences[index].chunks.append(chunk)
