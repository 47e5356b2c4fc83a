"""The OpenAI endpoints: /v1/chat/completions, /v1/completions, /v1/models (platform.openai.com/docs/api-reference)."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from rtp_llm.api.body import body_schema, json_body
from rtp_llm.api.params import StopWords, overlay, sampling_params, text_params
from rtp_llm.api.schema import ChatMessage, ChatRequest, CompletionRequest, Sampling
from rtp_llm.api.service import Chunk, Service, TextParams
from rtp_llm.api.stream import dumps, merge, sse, unless_disconnected
from rtp_llm.engine.request import Logprob, SamplingParams
from rtp_llm.errors import RequestError, empty_prompt, invalid_params, unsupported
from rtp_llm.text.tokenizer import Tokenizer

CHAT_TEMPERATURE = 0.7  # upstream's default; OpenAI's is 1
COMPLETION_TEMPERATURE = 1.0
FLOOR = -9999.0  # stands for a logprob of minus infinity, which JSON cannot say


@dataclass
class Choice:
    """One choice being generated."""

    prompt: list[int]
    params: SamplingParams
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(c.text for c in self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(len(c.tokens) for c in self.chunks)

    @property
    def finish(self) -> str | None:
        return self.chunks[-1].finish if self.chunks else None


@dataclass
class Job:
    """All sequences of one request, in the order of their choices; `prompts` counts distinct prompts."""

    sequences: list[Choice]
    text: TextParams
    prompts: list[list[int]]

    def start(self, service: Service) -> AsyncIterator[tuple[int, Chunk]]:
        return merge([service.generate(s.prompt, s.params, self.text) for s in self.sequences])

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(p) for p in self.prompts)
        completion = sum(s.num_tokens for s in self.sequences)
        per_prompt = max(1, len(self.sequences) // len(self.prompts))
        cached = sum(c.cached_tokens for s in self.sequences[::per_prompt] for c in s.chunks[:1])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def openai_router(service: Service, stop_words: StopWords) -> APIRouter:
    router = APIRouter()
    endpoints = OpenAI(service, stop_words)
    for path in ("/v1/chat/completions", "/chat/completions"):
        router.add_api_route(path, endpoints.chat, methods=["POST"], openapi_extra=body_schema(ChatRequest))
    router.add_api_route(
        "/v1/completions", endpoints.completions, methods=["POST"], openapi_extra=body_schema(CompletionRequest)
    )
    router.add_api_route("/v1/models", endpoints.models, methods=["GET"])
    for path in ("/chat/render", "/v1/chat/render"):
        router.add_api_route(path, endpoints.render, methods=["POST"], openapi_extra=body_schema(ChatRequest))
    return router


class OpenAI:
    """The endpoints of one service."""

    def __init__(self, service: Service, stop_words: StopWords):
        self.service, self.stop_words = service, stop_words

    async def models(self) -> dict[str, Any]:
        engine = self.service.client.info
        card = {
            "id": self.service.name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "rtp-llm",
            "root": self.service.name,
            "parent": None,
            "permission": [],
            "max_model_len": engine.max_seq_len if engine else None,
        }
        return {"object": "list", "data": [card]}

    # Chat

    async def chat(self, request: Request, body: Annotated[ChatRequest, Depends(json_body(ChatRequest))]) -> Response:
        job = await self._chat_job(body)
        made = _Envelope(f"chatcmpl-{secrets.token_hex(12)}", "chat.completion", self.service.name)
        if body.stream:
            return sse(self._stream(_ChatFrames(self.service.tokenizer, bool(body.logprobs)), made, job, body))
        await unless_disconnected(request, _collect(job, self.service))
        choices = [self._chat_choice(i, s, bool(body.logprobs)) for i, s in enumerate(job.sequences)]
        return JSONResponse(made.full(choices, job.usage()))

    async def render(self, body: Annotated[ChatRequest, Depends(json_body(ChatRequest))]) -> dict[str, Any]:
        """What the model would be given, for debugging (upstream's DebugInfo)."""
        prompt = self._render(body)
        job = await self._chat_job(body)
        return {
            "input_prompt": prompt,
            "input_ids": job.prompts[0],
            "input_urls": [],
            "tokenizer_info": str(self.service.config.tokenizer_path or self.service.config.checkpoint_path),
            "max_seq_len": self.service.engine.max_seq_len,
            "eos_token_id": min(self.service.tokenizer.eos_ids, default=None),
            "stop_word_ids_list": [[i] for i in job.sequences[0].params.stop_token_ids],
            "stop_words_list": list(job.text.stop),
            "renderer_info": {"class_name": "ChatTemplate", "template": self.service.template.name},
            "generate_config": job.sequences[0].params.to_json(),
        }

    def _render(self, body: ChatRequest) -> str:
        kwargs = dict(body.chat_template_kwargs or {})
        if body.enable_thinking is not None:
            kwargs.setdefault("enable_thinking", body.enable_thinking)
        tools = None if body.tool_choice == "none" else body.tools
        return render_chat(self.service, body.messages, tools, body.add_generation_prompt, kwargs)

    async def _chat_job(self, body: ChatRequest) -> Job:
        if body.response_format and body.response_format.get("type", "text") != "text":
            raise unsupported("response_format: only {'type': 'text'} is supported", "response_format")
        prompt = await self.service.encode(self._render(body), add_special_tokens=False)
        self.service.check_prompt(prompt)
        extra = body.extra_configs
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if extra and "max_new_tokens" in extra.model_fields_set:
            limit = extra.max_new_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        merged = overlay(body, extra)
        params = sampling_params(
            merged,
            self.service,
            self.stop_words,
            prompt,
            max_tokens=limit,
            temperature=CHAT_TEMPERATURE,
            logprobs=logprobs,
        )
        return self._job(merged, [prompt], [params], extra.timeout_ms if extra else 0)

    def _chat_choice(self, index: int, sequence: Choice, logprobs: bool) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": sequence.text},
            "logprobs": {"content": _chat_logprobs(sequence.chunks, self.service.tokenizer)} if logprobs else None,
            "finish_reason": sequence.finish,
        }

    # Completions

    async def completions(
        self, request: Request, body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))]
    ) -> Response:
        job = await self._completion_job(body)
        made = _Envelope(f"cmpl-{secrets.token_hex(12)}", "text_completion", self.service.name)
        frames = _CompletionFrames(
            self.service.tokenizer, body.logprobs is not None, bool(body.echo), body.max_tokens == 0
        )
        if body.stream:
            return sse(self._stream(frames, made, job, body))
        await unless_disconnected(request, _collect(job, self.service))
        choices = [frames.full(i, s) for i, s in enumerate(job.sequences)]
        return JSONResponse(made.full(choices, job.usage()))

    async def _completion_job(self, body: CompletionRequest) -> Job:
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
        return self._job(body, prompts, params)

    async def _prompts(self, body: CompletionRequest) -> list[list[int]]:
        given = body.prompt
        if isinstance(given, str):
            prompts = [await self.service.encode(given)]
        elif not given:
            raise empty_prompt("prompt is an empty list: send a text, texts, token ids or lists of token ids")
        else:
            prompts = []
            if isinstance(given[0], int):
                prompts = [[int(t) for t in given]]
            else:
                for one in given:
                    prompts.append(await self.service.encode(one) if isinstance(one, str) else list(one))
        for prompt in prompts:
            self.service.check_prompt(prompt)
        return prompts

    # Both

    def _job(self, body: Sampling, prompts: list[list[int]], params: list[SamplingParams], timeout_ms: int = 0) -> Job:
        n = body.n or 1
        self.service.check_admission(n * len(prompts))
        self.service.metrics.params_n.observe(n)
        sequences = [
            Choice(prompt, replace(one, seed=one.seed + i))
            for prompt, one in zip(prompts, params, strict=True)
            for i in range(n)
        ]
        return Job(sequences, text_params(body, self.stop_words, timeout_ms), prompts)

    async def _stream(
        self, frames: "_ChatFrames | _CompletionFrames", made: "_Envelope", job: Job, body: Sampling
    ) -> AsyncIterator[str]:
        options = body.stream_options
        usage = bool(options and options.include_usage)
        each = usage and bool(options and options.continuous_usage_stats)
        try:
            for index, sequence in enumerate(job.sequences):
                for choice in frames.first(index, sequence):
                    yield made.event([choice], job.usage() if each else None, usage)
            async for index, chunk in job.start(self.service):
                sequence = job.sequences[index]
                sequence.chunks.append(chunk)
                for choice in frames.next(index, sequence, chunk):
                    yield made.event([choice], job.usage() if each else None, usage)
            if usage:
                yield made.event([], job.usage(), usage)
        except RequestError as error:
            yield f"data: {dumps(error_body(error))}\n\n"
        yield "data: [DONE]\n\n"


def render_chat(
    service: Service,
    messages: Sequence[ChatMessage],
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    kwargs: dict[str, Any] | None = None,
) -> str:
    """Messages through the chat template. Raises RequestError 400."""
    reserved = {"messages", "tools", "add_generation_prompt"} & (kwargs or {}).keys()
    if reserved:
        raise invalid_params(f"chat_template_kwargs: {min(reserved)!r} has a field of its own", "chat_template_kwargs")
    plain = [m.model_dump(exclude_unset=True) for m in messages]
    return service.render(plain, tools=tools or None, add_generation_prompt=add_generation_prompt, **(kwargs or {}))


def error_body(error: RequestError) -> dict[str, Any]:
    """Upstream's three fields, and OpenAI's object, which its clients show to their users."""
    kind = (
        "invalid_request_error" if error.status < 429 else "rate_limit_error" if error.status == 429 else "server_error"
    )
    return {
        "error_code": error.code,
        "error_code_str": f"{error.code}_{error.name}",
        "message": error.message,
        "error": {"message": error.message, "type": kind, "param": error.param, "code": error.name.lower()},
    }


async def _collect(job: Job, service: Service) -> None:
    async for index, chunk in job.start(service):
        job.sequences[index].chunks.append(chunk)


@dataclass(frozen=True)
class _Envelope:
    """What all objects of one answer have in common."""

    id: str
    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def full(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return self._head(self.kind) | {"choices": choices, "usage": usage}

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, with_usage: bool) -> str:
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        body = self._head(kind) | {"choices": choices} | ({"usage": usage} if with_usage else {})
        return f"data: {dumps(body)}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class _ChatFrames:
    """The choices of a chat stream's events."""

    def __init__(self, tokenizer: Tokenizer, logprobs: bool):
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def first(self, index: int, sequence: Choice) -> list[dict[str, Any]]:
        return [self._choice(index, {"role": "assistant", "content": ""}, None, None)]

    def next(self, index: int, sequence: Choice, chunk: Chunk) -> list[dict[str, Any]]:
        choices = []
        logprobs = {"content": _chat_logprobs([chunk], self.tokenizer)} if self.logprobs else None
        if chunk.text or (self.logprobs and chunk.tokens):
            choices.append(self._choice(index, {"content": chunk.text}, logprobs, None))
        if chunk.finish:
            choices.append(self._choice(index, {}, None, chunk.finish))
        return choices

    def _choice(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class _CompletionFrames:
    """The choices of a completion, whole or as a stream. `prompt_only`: echo with max_tokens=0."""

    def __init__(self, tokenizer: Tokenizer, logprobs: bool, echo: bool, prompt_only: bool):
        self.tokenizer, self.logprobs, self.echo, self.prompt_only = tokenizer, logprobs, echo, prompt_only
        self._offsets: dict[int, int] = {}

    def full(self, index: int, sequence: Choice) -> dict[str, Any]:
        table = _LogprobTable(self.tokenizer)
        text = ""
        if self.echo:
            text = self._prompt_text(sequence)
            table.add_prompt(sequence)
        if not self.prompt_only:
            text += sequence.text
            for chunk in sequence.chunks:
                table.add(chunk.tokens, chunk.logprobs)
        finish = "length" if self.prompt_only else sequence.finish
        return self._choice(index, text, table if self.logprobs else None, finish)

    def first(self, index: int, sequence: Choice) -> list[dict[str, Any]]:
        # With logprobs the prompt's come with the first token, and the prompt's text with them.
        if not self.echo or self.logprobs:
            return []
        return [self._choice(index, self._prompt_text(sequence), None, None)]

    def next(self, index: int, sequence: Choice, chunk: Chunk) -> list[dict[str, Any]]:
        table = _LogprobTable(self.tokenizer, self._offsets.get(index, 0))
        text, tokens = ("", 0) if self.prompt_only else (chunk.text, len(chunk.tokens))
        if self.echo and self.logprobs and len(sequence.chunks) == 1:
            text = self._prompt_text(sequence) + text
            table.add_prompt(sequence)
        if tokens:
            table.add(chunk.tokens, chunk.logprobs)
        self._offsets[index] = table.offset
        finish = "length" if self.prompt_only and chunk.finish else chunk.finish
        if not text and not finish and not (self.logprobs and table.tokens):
            return []
        return [self._choice(index, text, table if self.logprobs else None, finish)]

    def _prompt_text(self, sequence: Choice) -> str:
        return self.tokenizer.decode(sequence.prompt, skip_special_tokens=True)

    def _choice(self, index: int, text: str, table: "_LogprobTable | None", finish: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": table.to_json() if table else None,
            "finish_reason": finish,
        }


@dataclass
class _LogprobTable:
    """Completions' parallel lists; `offset` counts characters of the tokens so far."""

    tokenizer: Tokenizer
    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    tops: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add_prompt(self, sequence: Choice) -> None:
        """The first token has no logprob: nothing comes before it."""
        self._append(sequence.prompt[0], None)
        records = sequence.chunks[0].prompt_logprobs if sequence.chunks else []
        self.add(sequence.prompt[1:], records)

    def add(self, tokens: Sequence[int], records: Sequence[Logprob]) -> None:
        for token, record in zip(tokens, records, strict=False):
            self._append(token, record)

    def _append(self, token: int, record: Logprob | None) -> None:
        text = self.tokenizer.token_text(token)
        self.tokens.append(text)
        self.values.append(max(record[0], FLOOR) if record else None)
        tops = [(token, record[0]), *((int(t), v) for t, v in record[2])] if record else []
        self.tops.append({self.tokenizer.token_text(t): max(v, FLOOR) for t, v in tops} if record else None)
        self.offsets.append(self.offset)
        self.offset += len(text)

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.values,
            "top_logprobs": self.tops,
            "text_offset": self.offsets,
        }


def _chat_logprobs(chunks: Sequence[Chunk], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def entry(token: int, value: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token),
            "logprob": max(value, FLOOR),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    return [
        entry(token, record[0]) | {"top_logprobs": [entry(int(t), v) for t, v in record[2]]}
        for chunk in chunks
        for token, record in zip(chunk.tokens, chunk.logprobs, strict=False)
    ]
