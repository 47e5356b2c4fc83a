"""POST /v1/messages and /v1/messages/count_tokens."""

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from rtp_llm.api.anthropic.errors import error_body
from rtp_llm.api.anthropic.message import Event, MessageBuilder
from rtp_llm.api.anthropic.preparation import count_tokens, prepare_message
from rtp_llm.api.anthropic.schema import CountTokensRequest, MessagesRequest
from rtp_llm.api.body import body_schema
from rtp_llm.api.chat import ChatChoice, start_chat
from rtp_llm.api.compact_json import compact_json
from rtp_llm.api.generation import GenerationRequest
from rtp_llm.api.params import StopWords
from rtp_llm.api.service import Service
from rtp_llm.api.stream import EventStream, json_response
from rtp_llm.errors import RequestError

TEMPERATURE = 1.0  # Anthropic's default
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def anthropic_router(service: Service, stop_words: StopWords) -> APIRouter:
    router = APIRouter()
    endpoints = MessagesEndpoints(service, stop_words)
    extra = body_schema(MessagesRequest, streams=True)
    router.add_api_route("/v1/messages", endpoints.create, methods=["POST"], openapi_extra=extra)
    extra = body_schema(CountTokensRequest)
    router.add_api_route("/v1/messages/count_tokens", endpoints.count_tokens, methods=["POST"], openapi_extra=extra)
    return router


class MessagesEndpoints:
    """The endpoints of Anthropic's Messages API for one served model."""

    def __init__(self, service: Service, stop_words: StopWords):
        self.service, self.stop_words = service, stop_words

    async def create(self, request: Request) -> Response:
        prepared = await self.service.prepare(prepare_message, request)
        generation = await start_chat(prepared, self.service, self.stop_words, TEMPERATURE)
        builder = MessageBuilder(self.service.model_name, generation.sequences[0])
        if prepared.body.stream:
            events = self._stream(builder, generation)
            return EventStream(events, generation.reservation, self.service.config.sse_ping_seconds, PING)
        await generation.collect(request, self.service)
        for delta in generation.sequences[0].answer.deltas:
            _drain(builder.add(delta))
        _drain(builder.finish())
        return json_response(builder.message())

    async def count_tokens(self, request: Request) -> Response:
        return Response(await self.service.prepare(count_tokens, request), media_type="application/json")

    async def _stream(self, builder: MessageBuilder, generation: GenerationRequest[ChatChoice]) -> AsyncGenerator[str]:
        [choice] = generation.sequences
        is_started = False
        try:
            async with aclosing(generation.run(self.service)) as chunks:
                async for _ in chunks:
                    if not is_started:
                        yield _frames(builder.start())
                        is_started = True
                    for delta in choice.new_deltas:
                        yield _frames(builder.add(delta))
            yield _frames(builder.finish())
        except RequestError as error:
            yield _frames([error_body(error)])


def _frames(events: Iterable[Event]) -> str:
    return "".join(f"event: {event['type']}\ndata: {compact_json(event)}\n\n" for event in events)


def _drain(events: Iterator[Any]) -> None:
    for _ in events:
        pass
