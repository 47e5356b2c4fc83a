"""Runs the product's runner and engine as rank 0 does, and records the logits that each token was sampled from.

A wrapper around `layers.sampler.sample` records them.
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
MAX_STEPS = 5000  # far more than any test needs; ends a test whose engine makes no progress
Settings = Mapping[str, Any]
# Few tokens per step, so that prompts are chunked; enough KV blocks for the requests of every test.
DEFAULT_SETTINGS: Settings = {"max_batch_tokens_size": 48, "test_block_num": 64, "warm_up": False}


@dataclass
class Completion:
    """All outputs of one request. `logits`: for each token the logits [vocab_size] float32 that it was sampled from."""

    tokens: list[int] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int = 0


Completions = dict[str, Completion]
ForcedTokens = Mapping[str, Sequence[int]]  # by request id


def load_runner(
    path: Path,
    settings: Settings,
    group: Group,
    device: torch.device = CPU,
    max_seq_len: int = MAX_SEQ_LEN,
) -> tuple[ModelRunner, LoadStats]:
    """Returns a runner with weights and KV cache. Collective: all ranks of the group must call it."""
    config = Config.model_validate({"checkpoint_path": str(path), **DEFAULT_SETTINGS, **settings})
    checkpoint = Checkpoint.open(config)
    spec = checkpoint.spec(config)
    spec.check_tp(group.size)
    runner = ModelRunner(config, spec, group, device, max_seq_len)
    load_stats = runner.load(checkpoint, lambda fraction: None)
    runner.allocate_kv_cache(group.size)
    return runner, load_stats


def make_engine(runner: ModelRunner, broadcast: BroadcastStep) -> Engine:
    config = runner.config
    blocks = BlockPool(runner.num_blocks, runner.block_size, config.reuse_cache)
    scheduler_config = SchedulerConfig(
        runner.max_num_batched_tokens,
        config.max_batch_size or config.concurrency_limit,
        config.max_context_batch_size,
    )
    return Engine(Scheduler(blocks, scheduler_config), runner, runner.max_seq_len, epoch=1, broadcast=broadcast)


def make_single_rank_engine(path: Path, device: torch.device = CPU, **settings: Any) -> Engine:
    """Returns an engine at TP 1 in this process."""
    return make_engine(load_runner(path, settings, SingleRankGroup(), device)[0], lambda step: None)


def greedy_request(prompt: Sequence[int], max_tokens: int, id: str = "0", **params: Any) -> Request:
    return Request(id, list(prompt), SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **params}))


def run(engine: Engine, requests: Sequence[Request], forced: ForcedTokens | None = None) -> Completions:
    """Adds all requests at once and runs steps until all have ended. `forced`: tokens that replace the sampled ones."""
    completions: Completions = {r.id: Completion() for r in requests}
    with record_logits(forced) as logits:
        for request in requests:
            assert engine.add(request) is None, "no token is left to generate"
        finish(engine, completions)
    for id, completion in completions.items():
        completion.logits = logits[id]
    return completions


def finish(engine: Engine, completions: Completions) -> None:
    for _ in range(MAX_STEPS):
        if not engine.has_work:
            return
        step(engine, completions)
    raise AssertionError(f"requests are unfinished after {MAX_STEPS} steps")


def step(engine: Engine, completions: Completions) -> None:
    for output in engine.step():
        completion = completions[output.request_id]
        completion.tokens += output.tokens
        completion.logprobs += output.logprobs
        completion.prompt_logprobs += output.prompt_logprobs
        completion.finish, completion.cached_tokens = output.finish, output.cached_tokens


@contextmanager
def record_logits(forced: ForcedTokens | None = None) -> Iterator[dict[str, list[NDArray[np.float32]]]]:
    """Yields lists, by request id, that collect the logits [vocab_size] of each sampled token.

    `forced` tokens replace the sampled ones.
    """
    recorded: dict[str, list[NDArray[np.float32]]] = defaultdict(list)

    def recording_sample(
        logits: Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[list[SampledToken], list[Logprob]]:
        requests = sampling_metadata.requests
        for row, request in zip(sampling_metadata.logits_rows, requests, strict=True):
            recorded[request.id].append(logits[row].cpu().numpy().copy())
        tokens, records = sample(logits, sampling_metadata)
        if forced:
            tokens = [
                replace(token, token_id=forced[request.id][request.num_output_tokens])
                for token, request in zip(tokens, requests, strict=True)
            ]
        return tokens, records

    with mock.patch("rtp_llm.runner.model_runner.sample", recording_sample):
        yield recorded
