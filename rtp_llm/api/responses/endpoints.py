"""The routes under /v1/responses."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from rtp_llm.api.body import body_schema
from rtp_llm.api.chat import ChatChoice, start_chat
from rtp_llm.api.formatters import chat_logprobs
from rtp_llm.api.generation import GenerationRequest
from rtp_llm.api.params import StopWords
from rtp_llm.api.prepared import PreparedResponse
from rtp_llm.api.responses.preparation import prepare_response, previous_response_id
from rtp_llm.api.responses.response import ResponseBuilder
from rtp_llm.api.responses.schema import ResponsesRequest
from rtp_llm.api.responses.store import ResponseStore, StoredResponse
from rtp_llm.api.service import Service
from rtp_llm.api.stream import EventStream
from rtp_llm.api.text_stream import OutputChunk
from rtp_llm.errors import RequestError, invalid_params

TEMPERATURE = 1.0  # OpenAI's default


def responses_router(service: Service, stop_words: StopWords) -> APIRouter:
    router = APIRouter()
    endpoints = ResponsesEndpoints(service, stop_words)
    extra = body_schema(ResponsesRequest, streams=True)
    router.add_api_route("/v1/responses", endpoints.create, methods=["POST"], openapi_extra=extra)
    path = "/v1/responses/{response_id}"
    router.add_api_route(path, endpoints.retrieve, methods=["GET"])
    router.add_api_route(path, endpoints.delete, methods=["DELETE"])
    router.add_api_route(f"{path}/cancel", endpoints.cancel, methods=["POST"])
    router.add_api_route(f"{path}/input_items", endpoints.input_items, methods=["GET"])
    return router


class ResponsesEndpoints:
    """The endpoints of OpenAI's Responses API for one served model."""

    def __init__(self, service: Service, stop_words: StopWords):
        self.service, self.stop_words = service, stop_words
        self.store = ResponseStore(service.config.responses_store_mb << 20)

    async def create(self, request: Request) -> Response:
        prepared = await self._prepare(request)
        generation = await start_chat(prepared.chat, self.service, self.stop_words, TEMPERATURE)
        [choice] = generation.sequences
        is_stored = bool(prepared.conversation)
        builder = ResponseBuilder(self.service.model_name, choice, prepared.echo, is_stored=is_stored)
        stored = None
        if is_stored:
            stored = StoredResponse(_owner(request), builder, prepared.conversation, prepared.input_items)
        if prepared.is_background:
            assert stored
            stored.run(self._in_background(builder, generation))
            self.store.add(stored)
            return self._follow(stored, 0) if prepared.chat.body.stream else _json_response(stored.to_json())
        if prepared.chat.body.stream:
            events = self._stream(builder, generation, stored)
            return EventStream(events, generation.reservation, self.service.config.sse_ping_seconds)
        await generation.collect(request, self.service)
        for _ in builder.add(choice.answer.deltas, self._logprobs(choice, choice.chunks)):
            pass
        for _ in builder.finish():
            pass
        body = builder.to_json()
        self._store(stored)
        return _json_response(body)

    async def retrieve(
        self, request: Request, response_id: str, stream: bool = False, starting_after: int = -1
    ) -> Response:
        """Returns a stored response; with `stream`, streams its events with a `sequence_number` above `starting_after`,
        including those to come. Only background responses have stored events; for others raises RequestError 400.
        """
        stored = self.store.get(response_id, _owner(request))
        if not stream:
            return _json_response(stored.to_json())
        if not stored.frames:
            raise invalid_params("stream: only a response with background: true can be streamed again", "stream")
        return self._follow(stored, starting_after + 1)

    async def delete(self, request: Request, response_id: str) -> dict[str, Any]:
        await self.store.delete(response_id, _owner(request))
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel(self, request: Request, response_id: str) -> Response:
        stored = self.store.get(response_id, _owner(request))
        await stored.cancel()
        return _json_response(stored.to_json())

    async def input_items(self, request: Request, response_id: str) -> Response:
        items = self.store.get(response_id, _owner(request)).input_items
        return Response(f'{{"object":"list","data":{items},"has_more":false}}', media_type="application/json")

    async def _prepare(self, request: Request) -> PreparedResponse:
        """Prepares a request. If it may continue a stored response, first parses its body for the id."""
        async with self.service.read_body(request) as raw:
            history = ""
            if b"previous_response_id" in raw:
                previous = await self.service.prepare_body(previous_response_id, request, raw)
                history = self._history(previous, _owner(request))
            work = partial(prepare_response, stores=self.store.is_enabled, history=history)
            return await self.service.prepare_body(work, request, raw, len(history))

    def _history(self, response_id: str | None, owner: str) -> str:
        if response_id is None:
            return ""
        self.store.require("previous_response_id")
        return self.store.get(response_id, owner).conversation()

    def _store(self, stored: StoredResponse | None) -> None:
        if stored:
            stored.settle()
            self.store.add(stored)

    async def _in_background(
        self, builder: ResponseBuilder, generation: GenerationRequest[ChatChoice]
    ) -> AsyncGenerator[str]:
        try:
            async with aclosing(self._stream(builder, generation)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            generation.reservation.release()
            self.store.make_room()

    def _follow(self, stored: StoredResponse, start: int) -> EventStream:
        return EventStream(stored.follow(start), None, self.service.config.sse_ping_seconds)

    async def _stream(
        self,
        builder: ResponseBuilder,
        generation: GenerationRequest[ChatChoice],
        stored: StoredResponse | None = None,
    ) -> AsyncGenerator[str]:
        """Yields the events. Stores the response before its last event, after which the client may refer to its id."""
        [choice] = generation.sequences
        for frame in builder.start():
            yield frame
        try:
            async with aclosing(generation.run(self.service)) as chunks:
                async for _, chunk in chunks:
                    for frame in builder.add(choice.new_deltas, self._logprobs(choice, [chunk])):
                        yield frame
            last_frames = list(builder.finish())
            self._store(stored)
            for frame in last_frames:
                yield frame
        except RequestError as error:
            for frame in builder.fail(error.body()["error"]["code"], error.message):
                yield frame

    def _logprobs(self, choice: ChatChoice, chunks: list[OutputChunk]) -> list[dict[str, object]]:
        return list(chat_logprobs(chunks, self.service.tokenizer)) if choice.params.logprobs is not None else []


def _owner(request: Request) -> str:
    """Returns the name of the request's API key; empty if no keys are configured."""
    name: str = request.state.key_name
    return name


def _json_response(body: str) -> Response:
    return Response(body, media_type="application/json")
