"""Context managers that make errors name the invalid field as the client sent it."""

from collections.abc import Iterator
from contextlib import contextmanager

from rtp_llm.errors import RequestError


@contextmanager
def named_field(name: str) -> Iterator[None]:
    """Context manager for code that validates the request field `name`: puts `name` before the message of a
    RequestError that the code raises, and sets it as the `param` of the error.
    """
    try:
        yield
    except RequestError as error:
        error.message, error.param = f"{name}: {error.message}", name
        raise


@contextmanager
def renamed_field(name: str, sent_name: str) -> Iterator[None]:
    """Context manager for requests that are translated to OpenAI's chat requests: in a RequestError about the chat
    request's field `name`, shows `sent_name` instead, the field of the original request.
    """
    try:
        yield
    except RequestError as error:
        if error.param == name:
            error.param, error.message = sent_name, error.message.replace(name, sent_name)
        raise
