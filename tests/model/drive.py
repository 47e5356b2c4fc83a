"""Drives the product's runner and engine as rank 0 does, and keeps the logits that each token was chosen from.

The logits are taken where the runner hands them to the sampler: the one place that all of them pass.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtp_llm.config import Config
from rtp_llm.contract.engine_output import FinishReason, Logprob
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledToken, SamplingMetadata
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.engine.blocks import BlockPool
from rtp_llm.engine.engine import BroadcastStep, Engine
from rtp_llm.engine.scheduler import Scheduler, SchedulerConfig
from rtp_llm.layers.sampler import sample
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.weights import LoadStats
from rtp_llm.parallel.group import Group, SingleRankGroup
from rtp_llm.runner.model_runner import ModelRunner

CPU = torch.device("cpu")
MAX_SEQ_LEN = 256
MOST_STEPS = 5000  # far more than any test needs: an engine that gets nowhere must not hang
Settings = Mapping[str, Any]
# Small enough that prompts are cut in chunks beside decodes, large enough to hold every test's requests.
DEFAULTS: Settings = {"max_batch_tokens_size": 48, "test_block_num": 64, "warm_up": False}


@dataclass
class Completion:
    """What became of one request. `logits`: those that each token of `tokens` was chosen from."""

    tokens: list[int] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0


Outcomes = dict[str, Completion]
Forced = Mapping[str, Sequence[int]]


def load(
    path: Path,
    settings: Settings,
    group: Group,
    device: torch.device = CPU,
    max_seq_len: int = MAX_SEQ_LEN,
) -> tuple[ModelRunner, LoadStats]:
    """One rank, ready to compute; all ranks of the group call it."""
    config = Config.model_validate({"checkpoint_path": str(path), **DEFAULTS, **settings})
    checkpoint = Checkpoint.open(config)
    spec = checkpoint.spec(config)
    spec.check_tp(group.size)
    runner = ModelRunner(config, spec, group, device, max_seq_len)
    report = runner.load(checkpoint, lambda share: None)
    runner.allocate_kv_cache(group.size)
    return runner, report


def engine_of(runner: ModelRunner, publish: BroadcastStep) -> Engine:
    config = runner.config
    blocks = BlockPool(runner.num_blocks, runner.block_size, config.reuse_cache)
    limits = SchedulerConfig(
        runner.max_tokens, config.max_batch_size or config.concurrency_limit, config.max_context_batch_size
    )
    return Engine(Scheduler(blocks, limits), runner, runner.max_seq_len, epoch=1, publish=publish)


def alone(path: Path, device: torch.device = CPU, **settings: Any) -> Engine:
    """An engine at TP 1 in this process."""
    return engine_of(load(path, settings, SingleRankGroup(), device)[0], lambda step: None)


def greedy(prompt: Sequence[int], count: int, id: str = "0", **params: Any) -> Request:
    return Request(id, list(prompt), SamplingParams(max_tokens=count, **{"temperature": 0.0, **params}))


def run(engine: Engine, requests: Sequence[Request], forced: Forced | None = None) -> Outcomes:
    """Adds all requests at once and steps until all have ended. `forced`: tokens by request, in place of the chosen."""
    outcomes: Outcomes = {r.id: Completion() for r in requests}
    with watching(forced) as logits:
        for request in requests:
            assert engine.add(request) is None, "there is nothing left to compute"
        finish(engine, outcomes)
    for id, outcome in outcomes.items():
        outcome.logits = logits[id]
    return outcomes


def finish(engine: Engine, outcomes: Outcomes) -> None:
    for _ in range(MOST_STEPS):
        if not engine.has_work:
            return
        step(engine, outcomes)
    raise AssertionError(f"requests are unfinished after {MOST_STEPS} steps")


def step(engine: Engine, outcomes: Outcomes) -> None:
    for event in engine.step():
        outcome = outcomes[event.request_id]
        outcome.tokens += event.tokens
        outcome.logprobs += event.logprobs
        outcome.prompt_logprobs += event.prompt_logprobs
        outcome.finish, outcome.cached_tokens = event.finish, event.cached_tokens


@contextmanager
def watching(forced: Forced | None = None) -> Iterator[dict[str, list[NDArray[np.float32]]]]:
    seen: dict[str, list[NDArray[np.float32]]] = defaultdict(list)

    def watched(logits: Tensor, sampling: SamplingMetadata) -> tuple[list[SampledToken], list[Logprob]]:
        for row, request in zip(sampling.rows, sampling.requests, strict=True):
            seen[request.id].append(logits[row].cpu().numpy().copy())
        chosen, records = sample(logits, sampling)
        if forced:
            pairs = zip(chosen, sampling.requests, strict=True)
            chosen = [replace(c, token_id=forced[request.id][request.num_output_tokens]) for c, request in pairs]
        return chosen, records

    with mock.patch("rtp_llm.runner.model_runner.sample", watched):
        yield seen
