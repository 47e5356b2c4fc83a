"""Requests whose prompts are encoded. They are small whatever the client sent, apart from the prompts."""

import array
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pydantic import BaseModel

from rtp_llm.api.schema import ChatRequest
from rtp_llm.text.output_format import OutputFormat

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Prepared(Generic[Model]):
    """A request whose prompts are encoded. `body` lacks the fields that they come from.

    text      the rendered chat, for /chat/render; empty for other requests
    is_batch  whether a native request has `prompt_batch`, or several prompts
    output_format  of the answers to a chat
    bad_words  the token ids of each
    grammar, constraint  what all of the answer's tokens must match, and the field that asks for it; empty: any text
    """

    body: Model
    packed_prompts: list[bytes]  # int32 ids: bytes are copied between processes at once, a list item by item
    text: str = ""
    is_batch: bool = False
    output_format: OutputFormat = field(default_factory=OutputFormat)
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""
    constraint: str = ""

    @classmethod
    def pack(cls, body: Model, prompts: Sequence[Sequence[int]], text: str = "") -> "Prepared[Model]":
        return cls(body, [array.array("i", prompt).tobytes() for prompt in prompts], text)

    async def prompts(self) -> list[list[int]]:
        """Returns the token ids of each prompt. Other tasks run between two prompts."""
        prompts = []
        for packed in self.packed_prompts:
            prompts.append(array.array("i", packed).tolist())
            await asyncio.sleep(0)
        return prompts


@dataclass(frozen=True)
class PreparedResponse:
    """A request to /v1/responses whose prompt is encoded.

    echo          JSON object: the fields of the request that the answer repeats
    conversation  JSON array of messages, for the response that continues this one; empty if it is not stored
    input_items   JSON array, for its clients; empty if it is not stored
    """

    chat: Prepared[ChatRequest]
    echo: str
    is_background: bool = False
    conversation: str = ""
    input_items: str = ""

    @property
    def body(self) -> ChatRequest:
        return self.chat.body
