"""Ranks of a tensor-parallel group as threads of this process, so that what a test registers is seen by all of them."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtp_llm.contract.step import Step
from rtp_llm.engine.engine import Engine
from rtp_llm.engine.proposer import DraftProposer
from rtp_llm.layers.logits_processors import DEFAULT_LOGITS_PROCESSORS, LogitsProcessorFactory
from rtp_llm.model.weights import LoadStats
from rtp_llm.runner.model_runner import ModelRunner
from tests.model import drive

TIMEOUT_SECONDS = 60
Ranks = list[tuple[ModelRunner, LoadStats]]


class ThreadGroup:
    """The group of one of several ranks that are threads."""

    wait_seconds: float | None = None
    is_waiting = False

    def __init__(self, rank: int, tensors: list[Tensor], barrier: threading.Barrier):
        self.rank, self.size = rank, len(tensors)
        self._tensors, self._barrier = tensors, barrier

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._tensors[self.rank] = tensor.clone()
        self._barrier.wait()
        tensors = list(self._tensors)
        self._barrier.wait()
        return tensors

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        tensors = self._exchange(tensor)
        return tensors if self.rank == 0 else None

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self._exchange(tensor)[0])

    def min(self, value: int) -> int:
        return value

    def check_aborted(self) -> None:
        pass

    def abort(self, reason: str) -> None:
        self._barrier.abort()

    def close(self) -> None:
        pass


@contextmanager
def thread_ranks(
    path: Path,
    size: int,
    proposer: DraftProposer | None = None,
    logits_processors: Sequence[LogitsProcessorFactory] = DEFAULT_LOGITS_PROCESSORS,
    **settings: Any,
) -> Iterator[tuple[Engine, Ranks]]:
    """Yields the engine of rank 0, and all ranks' runners; ranks above 0 execute its steps in threads."""
    tensors, barrier = [torch.empty(0)] * size, threading.Barrier(size, timeout=TIMEOUT_SECONDS)
    groups = [ThreadGroup(rank, tensors, barrier) for rank in range(size)]
    ranks = [drive.load_runner(path, settings, group, logits_processors=logits_processors) for group in groups]
    steps: list[queue.SimpleQueue[Step | None]] = [queue.SimpleQueue() for _ in range(1, size)]

    def follow(runner: ModelRunner, inbox: "queue.SimpleQueue[Step | None]") -> None:
        with suppress(threading.BrokenBarrierError):
            while (step := inbox.get()) is not None:
                inputs = runner.prepare(step)
                inputs.check_digest()
                runner.execute(inputs)

    def broadcast(step: Step | None) -> None:
        for inbox in steps:
            inbox.put(step)

    pairs = zip(ranks[1:], steps, strict=True)
    threads = [threading.Thread(target=follow, args=(runner, inbox)) for (runner, _), inbox in pairs]
    for thread in threads:
        thread.start()
    try:
        yield drive.make_engine(ranks[0][0], broadcast, proposer), ranks
    except BaseException:
        barrier.abort()  # releases the threads that wait for a rank 0 that has failed
        raise
    finally:
        broadcast(None)
        for thread in threads:
            thread.join(TIMEOUT_SECONDS)
