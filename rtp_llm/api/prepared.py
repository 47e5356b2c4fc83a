"""Validated requests with the token ids of their prompts.

They no longer contain the texts of the body, so that only the token ids can be large.
"""

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
    """A validated request with the token ids of its prompts, ready for the engine. `body` no longer has the prompts
    themselves.

    text      the rendered chat, for /chat/render; empty for other requests
    is_batch  a native request (of alibaba/rtp-llm's API) has `prompt_batch` or several prompts, so its response is
              {"response_batch": [an object per prompt]}
    output_format  format of the response to a chat
    bad_words  token ids of each forbidden word
    grammar, constraint  grammar for the whole output, and the field that requests it; empty: any text
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
        """Returns the token ids of each prompt. Unpacks one prompt at a time, so that the event loop is not blocked."""
        prompts = []
        for packed in self.packed_prompts:
            prompts.append(array.array("i", packed).tolist())
            await asyncio.sleep(0)
        return prompts


@dataclass(frozen=True)
class PreparedResponse:
    """A validated request to /v1/responses, with the token ids of its prompt.

    echo          JSON object: the fields of the request that the response repeats
    conversation  JSON array of the messages up to this request, which a later response can continue; empty if the
                  response is not to be stored
    input_items   JSON array of the input, for clients that retrieve it; empty if the response is not to be stored
    """

    chat: Prepared[ChatRequest]
    echo: str
    is_background: bool = False
    conversation: str = ""
    input_items: str = ""

    @property
    def body(self) -> ChatRequest:
        return self.chat.body
