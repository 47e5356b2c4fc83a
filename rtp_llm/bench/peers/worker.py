"""Runs an engine in this process. Reads commands from stdin and writes results to stdout, one JSON object per line.

`rtp_llm.bench.worker_process` starts the modules of this package that call `serve`. They import only their engine,
`rtp_llm.bench.record` and this file, so that any Python with that engine can run them. The first output line, when the
engine is loaded, is {"description": "…", "load_seconds": 1.5}. Then each command gets one reply, such as

    {"requests": [{"prompt": [1, 2], "output_tokens": 8}, …], "concurrency": 4, "arrivals": []}
    {"records": [{…}, …]}

where each record has the fields of `rtp_llm.bench.record.Record`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from rtp_llm.bench.record import Record


class Engine(Protocol):
    """Interface of an engine to measure, which computes its requests together in steps (forward passes)."""

    def add(self, id: int, prompt: list[int], output_tokens: int) -> None: ...

    def step(self) -> dict[int, int]:
        """Computes one step of all requests that were added and are not complete. Returns the number of new output
        tokens by request id.
        """


def serve(load: Callable[[str, dict[str, Any]], tuple[Engine, str]]) -> None:
    """Loads the engine, then reads commands from stdin and executes them until stdin is closed.

    `load`: function of the model's folder and the settings (both from the command line) that returns the engine and a
    description of it.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints must not come between the answers
    start = time.perf_counter()
    engine, description = load(sys.argv[1], json.loads(sys.argv[2]))
    _answer(answers, {"description": description, "load_seconds": time.perf_counter() - start})
    for line in sys.stdin:
        command = json.loads(line)
        records = run(engine, command["requests"], command["concurrency"], command["arrivals"])
        _answer(answers, {"records": [asdict(record) for record in records]})


def run(engine: Engine, requests: list[dict[str, Any]], concurrency: int, arrivals: list[float]) -> list[Record]:
    """Runs all requests, at most `concurrency` at a time, and returns their records.

    `arrivals`: when each request is due, in seconds after the start; if it is empty, all are due at once.
    """
    records = [Record(len(request["prompt"]), 0.0) for request in requests]
    next_number, running = 0, set[int]()
    origin = time.perf_counter()
    while next_number < len(requests) or running:
        now = time.perf_counter() - origin
        while next_number < len(requests) and len(running) < concurrency:
            due = arrivals[next_number] if arrivals else now
            if due > now:
                break
            records[next_number].start = due
            engine.add(next_number, requests[next_number]["prompt"], requests[next_number]["output_tokens"])
            running.add(next_number)
            next_number += 1
        if not running:
            time.sleep(arrivals[next_number] - now)
            continue
        tokens = engine.step()
        now = time.perf_counter() - origin
        for number, count in tokens.items():
            records[number].events.append(now)
            records[number].output_tokens += count
            if records[number].output_tokens >= requests[number]["output_tokens"]:
                running.discard(number)
    return records


def _answer(answers: Any, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()
