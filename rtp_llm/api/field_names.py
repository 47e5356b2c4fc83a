"""Context managers that make errors name the invalid field as the client sent it."""

from collections.abc import Iterator
from contextlib import contextmanager

from rtp_llm.errors import RequestError


@contextmanager
def named_field(name: str) -> Iterator[None]:
    """Context manager that adds `name`, the field of the invalid input, to each RequestError."""
    try:
        yield
    except RequestError as error:
        error.message, error.param = f"{name}: {error.message}", name
        raise


@contextmanager
def renamed_field(name: str, sent_name: str) -> Iterator[None]:
    """Context manager that replaces `name`, a field of OpenAI's chats, by `sent_name` in each RequestError."""
    try:
        yield
    except RequestError as error:
        if error.param == name:
            error.param, error.message = sent_name, error.message.replace(name, sent_name)
        raise
