"""The load generator: sends HTTP requests at a fixed concurrency (closed loop) or at given times (open loop)."""

import asyncio
import time
from collections.abc import Callable

import uvloop

from rtp_llm.bench.http_client import AnswerError, Connection, Endpoint, StaleConnectionError
from rtp_llm.bench.record import Record
from rtp_llm.bench.workload import Request, Traffic

OnEnd = Callable[[Record], None]


def send(endpoint: Endpoint, traffic: Traffic, on_end: OnEnd) -> list[Record]:
    """Sends all requests and returns their records in the order in which the requests ended, failed ones included.

    Calls `on_end` with the record of each request when it ends.
    """
    return uvloop.run(_Load(endpoint, on_end).send(traffic))


class _Load:
    def __init__(self, endpoint: Endpoint, on_end: OnEnd):
        self._endpoint, self._on_end = endpoint, on_end
        self._idle: list[Connection] = []
        self._records: list[Record] = []

    async def send(self, traffic: Traffic) -> list[Record]:
        messages = [self._endpoint.completion(request) for request in traffic.requests]
        slots = asyncio.Semaphore(traffic.concurrency)
        self._origin = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number, (request, message) in enumerate(zip(traffic.requests, messages, strict=True)):
                due = self._origin + traffic.arrivals[number] if traffic.arrivals else 0.0
                await asyncio.sleep(due - time.perf_counter())
                await slots.acquire()
                # In an open loop, the time until the request can be sent is part of its latency.
                task = tasks.create_task(self._send_one(request, message, due or time.perf_counter()))
                task.add_done_callback(lambda _: slots.release())
        for connection in self._idle:
            connection.close()
        return self._records

    async def _send_one(self, request: Request, message: bytes, start: float) -> None:
        """Sends one request and keeps its record, also of a failure."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._endpoint.timeout):
                connection = self._take_idle() or await Connection.connect(self._endpoint.address)
                try:
                    answer = await connection.stream(message)
                except StaleConnectionError:
                    connection = await Connection.connect(self._endpoint.address)
                    answer = await connection.stream(message)
            record = answer.record(request, self._origin, start)
        except (AnswerError, TimeoutError) as error:
            reason = str(error) or f"no whole answer within {self._endpoint.timeout:g} s"
            record = Record(len(request.prompt), start - self._origin, error=reason)
            if connection and isinstance(error, TimeoutError):
                connection.close()
        if connection and connection.is_open:
            self._idle.append(connection)
        self._records.append(record)
        self._on_end(record)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        return None
