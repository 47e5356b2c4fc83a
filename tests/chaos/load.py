"""The load: a fixed set of streams and batches, sent again and again by a number of clients until told to stop."""

import random
import threading
import time
from dataclasses import dataclass
from typing import Any

from tests.chaos.client import Endpoint, Request, Response

SUBJECTS = ("a matrix", "the cache", "a token", "the network", "a rank", "the clock", "a full disk", "the scheduler")
LINES = 64  # of a long prompt


def requests() -> list[Request]:
    """Returns the requests of the load: greedy and seeded streams, chats, long prompts, and batches."""
    found: list[Request] = []
    for number, subject in enumerate(SUBJECTS):
        prompt = f"Write about {subject}. "
        greedy: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
        seeded: dict[str, Any] = {"temperature": 1.0, "seed": number, "ignore_eos": True}
        found += [
            _completion(f"greedy{number}", prompt, max_tokens=64, stream=True, **greedy),
            _completion(f"seeded{number}", prompt, max_tokens=80, stream=True, **seeded),
            _completion(f"long{number}", prompt * LINES, max_tokens=24, stream=True, **greedy),
            _completion(f"batch{number}", [prompt, f"{prompt}In short: "], max_tokens=40, **seeded),
            Request(
                f"chat{number}",
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": prompt}], "max_tokens": 48, "stream": True, **seeded},
            ),
        ]
    return found


def _completion(name: str, prompt: str | list[str], **options: Any) -> Request:
    return Request(name, "/v1/completions", {"prompt": prompt, **options})


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    request: Request
    response: Response

    def is_open_at(self, moment: float) -> bool:
        """Returns True if the request was sent and not yet answered at this time."""
        return self.response.sent_at <= moment and (self.response.is_open or self.response.ended_at > moment)


class Load:
    """Clients that each send one request after the other. `entries` is the ledger, in the order of sending."""

    def __init__(self, endpoint: Endpoint, rng: random.Random, num_clients: int):
        self.entries: list[Entry] = []
        self._endpoint, self._lock, self._stop = endpoint, threading.Lock(), threading.Event()
        self._requests = requests()
        self._threads = [
            threading.Thread(target=self._send_requests, args=(random.Random(rng.random()),), daemon=True)
            for _ in range(num_clients)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, seconds: float) -> None:
        """Sends no further requests, and waits up to `seconds` for the open ones to end."""
        self._stop.set()
        deadline = time.monotonic() + seconds
        for thread in (thread for thread in self._threads if thread.ident):
            thread.join(max(0.0, deadline - time.monotonic()))
        while any(entry.response.is_open for entry in self.entries) and time.monotonic() < deadline:
            time.sleep(0.01)

    def wait_flowing(self, num_streams: int, seconds: float) -> None:
        """Waits until this many open streams have sent text. Raises AssertionError after `seconds`."""
        deadline = time.monotonic() + seconds
        while self._num_flowing() < num_streams:
            assert time.monotonic() < deadline, f"not {num_streams} streams with text within {seconds:g} s"
            time.sleep(0.01)

    def send_long_prompt(self) -> Entry:
        """Sends a request whose prompt takes a while to be computed, besides those of the clients."""
        return self._open(next(r for r in self._requests if r.name.startswith("long")))

    def _num_flowing(self) -> int:
        with self._lock:
            return sum(e.response.is_open and bool(e.response.arrivals) for e in self.entries)

    def _send_requests(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            entry = self._open(rng.choice(self._requests))
            while entry.response.is_open:
                time.sleep(0.01)
            if entry.response.status != 200:
                self._stop.wait(0.2)  # refused: a client waits before it tries again

    def _open(self, request: Request) -> Entry:
        entry = Entry(request, self._endpoint.open(request))
        with self._lock:
            self.entries.append(entry)
        return entry


def undisturbed_texts(endpoint: Endpoint) -> dict[str, dict[int, str]]:
    """Returns the text of every request of the load, by name, sent one after the other. Raises AssertionError."""
    texts = {}
    for request in requests():
        response = endpoint.open(request)
        while response.is_open:
            time.sleep(0.005)
        assert response.status == 200, f"{request.name}: {response}"
        assert not response.broken, f"{request.name}: {response}"
        texts[request.name] = response.text
    return texts
