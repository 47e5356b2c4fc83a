"""Lets errors name the field at fault as the client has sent it."""

from collections.abc import Iterator
from contextlib import contextmanager

from rtp_llm.errors import RequestError


@contextmanager
def named_field(name: str) -> Iterator[None]:
    """Makes RequestErrors name the field whose text or token ids are at fault."""
    try:
        yield
    except RequestError as error:
        error.message, error.param = f"{name}: {error.message}", name
        raise


@contextmanager
def renamed_field(name: str, sent_name: str) -> Iterator[None]:
    """Makes RequestErrors name a field of OpenAI's chats as a client of another dialect has sent it."""
    try:
        yield
    except RequestError as error:
        if error.param == name:
            error.param, error.message = sent_name, error.message.replace(name, sent_name)
        raise
