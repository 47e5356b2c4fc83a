"""A server of /v1/completions that streams tokens at a fixed pace, to test a client and to measure what it costs.

python -m tests.bench.fake_server PORT SECONDS_PER_TOKEN
"""

import asyncio
import json
import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeServer:
    """Answers each request with `max_tokens` events, one every `seconds_per_token`.

    line_end        of the events
    piece_bytes     size of the pieces in which events are sent; 0: whole
    break_after     number of events after which a connection is closed; 0: never
    missing_tokens  that an answer is too short
    answers_per_connection  the next request on the connection closes it; -1: never
    status          of every answer
    """

    seconds_per_token: float = 0.0
    line_end: str = "\n"
    piece_bytes: int = 0
    break_after: int = 0
    missing_tokens: int = 0
    answers_per_connection: int = -1
    has_usage: bool = True
    last_event: str = ""  # an event after all others
    status: int = 200
    num_connections: int = 0
    heads: list[str] = field(default_factory=list)  # of the requests so far
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def listen(self, port: int = 0) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        num_answers = 0
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if head.startswith("GET"):
                    _write_models(writer)
                    continue
                if num_answers == self.answers_per_connection:
                    return
                num_answers += 1
                self.heads.append(head)
                self.bodies.append(json.loads(body))
                await self._answer(writer, self.bodies[-1]["max_tokens"] - self.missing_tokens)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, num_tokens: int) -> None:
        head = f"HTTP/1.1 {self.status} X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        if self.status != 200:
            await self._chunk(writer, '{"error":{"message":"no"}}')
            writer.write(b"0\r\n\r\n")
            return
        for number in range(num_tokens):
            if self.seconds_per_token:
                await asyncio.sleep(self.seconds_per_token)
            if number + 1 == self.break_after:
                writer.transport.abort()
                raise ConnectionResetError
            await self._event(writer, [_choice(f" word{number}", None)], None)
        await self._event(writer, [_choice("", "length")], None)
        if self.has_usage:
            await self._event(writer, [], {"prompt_tokens": 1, "completion_tokens": num_tokens})
        if self.last_event:
            await self._chunk(writer, f"data: {self.last_event}{self.line_end * 2}")
        await self._chunk(writer, f"data: [DONE]{self.line_end * 2}")
        writer.write(b"0\r\n\r\n")

    async def _event(self, writer: asyncio.StreamWriter, choices: list[Any], usage: dict[str, int] | None) -> None:
        event = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "fake"}
        content = json.dumps(event | {"choices": choices, "usage": usage}, separators=(",", ":"))
        await self._chunk(writer, f"data: {content}{self.line_end * 2}")

    async def _chunk(self, writer: asyncio.StreamWriter, text: str) -> None:
        data = text.encode()
        frame = b"%x\r\n%s\r\n" % (len(data), data)
        size = self.piece_bytes or len(frame)
        for start in range(0, len(frame), size):
            writer.write(frame[start : start + size])
            if self.piece_bytes:
                await asyncio.sleep(0.001)


def _choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _write_models(writer: asyncio.StreamWriter) -> None:
    content = b'{"object":"list","data":[{"id":"fake","object":"model"}]}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
    writer.write(head + content)


async def _main(port: int, seconds_per_token: float) -> None:
    server = await FakeServer(seconds_per_token).listen(port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), float(sys.argv[2])))
