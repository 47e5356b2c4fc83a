"""A silent event stream sends comments, so that proxies do not close it."""

from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput

BODY = {"prompt": "a", "stream": True}


def test_a_silent_stream_sends_comments(start_api: StartApi) -> None:
    api = start_api(sse_ping_seconds=0.05)
    with api.open_stream("/v1/completions", BODY) as response:
        chunks = response.iter_bytes()
        assert next(chunks) == b": ping\n\n", "while the request is queued"
        submission = api.engine.next_submission()
        api.engine.send_outputs(submission, ScriptedOutput([1]))
        events = next(chunks)
        while events.endswith(b": ping\n\n"):
            events = next(chunks)
        assert events.startswith(b"data: ")
        assert next(chunks) == b": ping\n\n", "while it is computed"
        api.engine.send_outputs(submission, ScriptedOutput([2], "length"))
        assert b"".join(chunks).endswith(b"data: [DONE]\n\n")


def test_zero_turns_comments_off(start_api: StartApi) -> None:
    api = start_api(lambda submission: [ScriptedOutput([1], "length")], sse_ping_seconds=0)
    assert b"ping" not in api.stream("/v1/completions", BODY)


def test_comments_of_the_native_api_end_as_its_events_do(start_api: StartApi) -> None:
    """Its clients split at CRLF CRLF."""
    api = start_api(sse_ping_seconds=0.05)
    with api.open_stream("/", {"prompt": "a", "yield_generator": True}) as response:
        chunks = response.iter_bytes()
        assert next(chunks) == b": ping\r\n\r\n"
        api.engine.send_outputs(api.engine.next_submission(), ScriptedOutput([1], "length"))
        assert b"".join(chunks).endswith(b"data:[done]\r\n\r\n")
