"""Runs the product's runner and engine as rank 0 does, and records the logits that each token was sampled from.

Wrappers around the methods of `layers.sampler.Sampler` record them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.contract.step import Step
from rtp_llm.engine.engine import Engine, EngineCallbacks
from rtp_llm.engine.epoch import make_scheduler
from rtp_llm.engine.proposer import DraftProposer
from rtp_llm.layers.logits_processors import DEFAULT_LOGITS_PROCESSORS, LogitsProcessorFactory
from rtp_llm.layers.sampler import Sampler, SamplerOutput
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.weights import LoadStats
from rtp_llm.parallel.group import Communicator, SingleRankGroup
from rtp_llm.parallel.mesh import Mesh, MeshAxis
from rtp_llm.runner.model_runner import ModelRunner
from rtp_llm.runner.residency import Residency
from tests.unit.scheduling import AdmitAll

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
    communicator: Communicator,
    device: torch.device = CPU,
    max_seq_len: int = MAX_SEQ_LEN,
    logits_processors: Sequence[LogitsProcessorFactory] = DEFAULT_LOGITS_PROCESSORS,
) -> tuple[ModelRunner, LoadStats]:
    """Returns a runner with weights and KV cache. Collective: all ranks of the communicator must call it."""
    config = Config.model_validate({"checkpoint_path": str(path), **DEFAULT_SETTINGS, **settings})
    checkpoint = Checkpoint.open(config)
    spec = checkpoint.spec(config)
    spec.check_tp(communicator.size)
    mesh = Mesh(MeshAxis(communicator.rank, communicator.size))
    mesh.tp.bind(communicator)
    residency = Residency(config, spec, mesh, device, max_seq_len)
    load_stats = residency.load(checkpoint, lambda fraction: None)
    residency.allocate_kv_cache(communicator.size)
    residency.begin_epoch()
    return ModelRunner(residency, logits_processors), load_stats


def make_engine(
    runner: ModelRunner,
    broadcast: Callable[[Step], None] = lambda step: None,
    proposer: DraftProposer | None = None,
) -> Engine:
    """Returns an engine that admits requests as long as blocks are free, so that tests with few blocks preempt."""
    residency = runner.residency
    scheduler = make_scheduler(residency, proposer)
    scheduler.admission_control = AdmitAll(scheduler.kv_cache_manager)
    return Engine(
        scheduler,
        runner,
        residency.max_seq_len,
        epoch=1,
        callbacks=EngineCallbacks(broadcast),
        pipeline_depth=residency.config.rtp_pipeline_depth,
    )


def make_single_rank_engine(path: Path, device: torch.device = CPU, **settings: Any) -> Engine:
    """Returns an engine at TP 1 in this process."""
    return make_engine(load_runner(path, settings, SingleRankGroup(), device)[0])


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
    requests: dict[tuple[int, int], Request] = {}  # by sampler and slot
    reset, sample = Sampler.reset, Sampler.sample

    def recording_reset(sampler: Sampler, slot: int, request: Request) -> None:
        requests[id(sampler), slot] = request
        reset(sampler, slot, request)

    def recording_sample(sampler: Sampler, logits: Tensor, rows: SampledRows) -> SamplerOutput:
        output = sample(sampler, logits, rows)
        for row, (slot, position) in enumerate(zip(rows.slots.tolist(), rows.positions.tolist(), strict=True)):
            request = requests[id(sampler), slot]
            recorded[request.id].append(logits[row].cpu().numpy().copy())
            if forced:
                output.tokens[row] = forced[request.id][position - request.num_prompt_tokens]
        return output

    with mock.patch.object(Sampler, "reset", recording_reset), mock.patch.object(Sampler, "sample", recording_sample):
        yield recorded
