"""The load generator against a server whose tokens come at known times."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rtp_llm.bench.http_client import Endpoint
from rtp_llm.bench.load import send
from rtp_llm.bench.record import Record
from rtp_llm.bench.workload import Request, Traffic
from tests.bench.fake_server import FakeServer

STEP = 0.02  # seconds per token; a busy machine delays, but nothing comes early


@contextmanager
def listening(server: FakeServer) -> Iterator[str]:
    """Runs the server in a thread and yields its URL."""
    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(server.listen())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(listener.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


def requests(count: int, output_tokens: int = 5) -> list[Request]:
    return [Request([number, 7], output_tokens) for number in range(count)]


def ignore(record: Record) -> None:
    pass


def overlapping(records: list[Record]) -> int:
    """Returns the largest number of requests that ran at a time."""
    edges = sorted([(r.start, 1) for r in records] + [(r.events[-1], -1) for r in records])
    running, most = 0, 0
    for _, change in edges:
        running += change
        most = max(most, running)
    return most


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_closed_loop_times_every_token_and_keeps_to_its_concurrency(line_end: str) -> None:
    server = FakeServer(STEP, line_end)
    ended: list[Record] = []
    with listening(server) as url:
        records = send(Endpoint(url, "fake"), Traffic(requests(7), 3), ended.append)
    assert ended == records
    assert [r.error for r in records] == [""] * 7
    for record in records:
        assert (record.input_tokens, record.output_tokens, len(record.events)) == (2, 5, 5)
        assert record.ttft >= STEP
        assert record.e2e >= 5 * STEP
        assert all(gap >= 0.5 * STEP for gap in record.gaps)  # the event with the finish_reason is no token
    assert overlapping(records) == 3
    assert server.num_connections == 3  # each is used again
    assert sorted(body["prompt"][0] for body in server.bodies) == list(range(7))
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in server.bodies)


def test_open_loop_sends_at_the_arrivals_however_slow_the_server_is() -> None:
    arrivals = [0.0, 0.03, 0.06, 0.09]
    with listening(FakeServer(0.05)) as url:
        records = send(Endpoint(url, "fake"), Traffic(requests(4), 100, arrivals), ignore)
    assert sorted(record.start for record in records) == pytest.approx(arrivals)
    assert overlapping(records) == 4


def test_a_full_client_counts_the_wait_as_latency() -> None:
    with listening(FakeServer(STEP)) as url:
        records = send(Endpoint(url, "fake"), Traffic(requests(2), 1, [0.0, 0.0]), ignore)
    assert records[1].start == pytest.approx(0.0, abs=1e-9)
    assert records[1].ttft >= 6 * STEP


def test_events_that_arrive_in_pieces_are_whole() -> None:
    with listening(FakeServer(piece_bytes=7)) as url:
        [record] = send(Endpoint(url, "fake"), Traffic(requests(1), 1), ignore)
    assert (len(record.events), record.output_tokens, record.error) == (5, 5, "")


def test_failures_are_records_and_the_others_go_on() -> None:
    with listening(FakeServer(break_after=3)) as url:
        traffic = Traffic([*requests(2), *requests(2, output_tokens=2)], 2)
        records = send(Endpoint(url, "fake"), traffic, ignore)
    assert sorted(record.error for record in records)[:2] == ["", ""]
    assert [r.error for r in records if r.error] == [
        "the server closed the connection before the end of its answer"
    ] * 2


def test_a_request_that_meets_a_closing_connection_is_sent_again() -> None:
    server = FakeServer(answers_per_connection=2)
    with listening(server) as url:
        records = send(Endpoint(url, "fake"), Traffic(requests(5), 1), ignore)
    assert [record.error for record in records] == [""] * 5
    assert [body["prompt"][0] for body in server.bodies] == [0, 1, 2, 3, 4]
    assert server.num_connections == 3


def test_a_server_that_never_answers_is_an_error() -> None:
    with listening(FakeServer(answers_per_connection=0)) as url:
        [record] = send(Endpoint(url, "fake"), Traffic(requests(1), 1), ignore)
    assert record.error == "the server closed the connection before the end of its answer"


@pytest.mark.parametrize(
    ("server", "error"),
    [
        (FakeServer(status=429), 'HTTP 429: {"error":{"message":"no"}}'),
        (FakeServer(missing_tokens=1), "the server sent 4 tokens instead of 5"),
        (FakeServer(has_usage=False), "the stream has no event with token counts"),
        (FakeServer(last_event='{"choices":'), 'an event of the stream is not part of a completion: data: {"choices":'),
        (FakeServer(last_event='{"choices":3}'), "an event of the stream is not part of a completion"),
        (FakeServer(last_event='{"usage":[1]}'), "an event of the stream is not part of a completion"),
        (FakeServer(last_event='{"usage":{"total":1}}'), "the stream has no event with token counts"),
    ],
)
def test_an_answer_that_is_not_as_asked_is_an_error(server: FakeServer, error: str) -> None:
    with listening(server) as url:
        records = send(Endpoint(url, "fake"), Traffic(requests(2), 1), ignore)
    assert len(records) == 2
    assert all(record.error.startswith(error) for record in records), records


def test_a_silent_server_is_an_error_after_the_timeout() -> None:
    with listening(FakeServer(60.0)) as url:
        [record] = send(Endpoint(url, "fake", timeout=0.2), Traffic(requests(1), 1), ignore)
    assert record.error == "no whole answer within 0.2 s"


def test_no_server_is_an_error() -> None:
    [record] = send(Endpoint("http://127.0.0.1:1", "fake"), Traffic(requests(1), 1), ignore)
    assert record.error.startswith("no connection")


def test_text_prompts_have_a_word_per_token_and_the_key_is_sent() -> None:
    server = FakeServer()
    with listening(server) as url:
        endpoint = Endpoint(url + "/prefix/v1/", "fake", api_key="secret", as_text=True)
        [record] = send(endpoint, Traffic([Request([0, 1, 700, 1], 2)], 1), ignore)
    assert not record.error
    words = server.bodies[0]["prompt"].split()
    assert (len(words), len(set(words))) == (4, 3)
    assert words[1] == words[3]
    assert server.heads[0].startswith("POST /prefix/v1/completions HTTP/1.1")
    assert "Authorization: Bearer secret" in server.heads[0]
