"""A scheduler without an engine: makes schedulers and requests, and computes steps in place of the ranks."""

from collections.abc import Sequence
from typing import Any

from rtp_llm.contract.kv_cache import KVCacheGroup, KVCacheSpec
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.engine.admission_control import AdmissionControl
from rtp_llm.engine.block_pool import BlockPool
from rtp_llm.engine.kv_cache_manager import CachedPrefix, KVCacheManager
from rtp_llm.engine.scheduler import Scheduler
from rtp_llm.engine.scheduler_config import SchedulerConfig
from rtp_llm.engine.scheduler_output import SchedulerOutput

BLOCK_SIZE = 4


class AdmitAll(AdmissionControl):
    """Admits requests as long as blocks are free, so that too many run, and some are preempted."""

    def fits(self, running: Sequence[Request], candidate: Request, prefix: CachedPrefix) -> bool:
        return True


class FixedProposer:
    """Proposes the same draft tokens each time."""

    def __init__(self, drafts: list[int], needs_result: bool = True):
        self.drafts, self.needs_result = drafts, needs_result

    def propose(self, request: Request) -> list[int]:
        is_known = request.num_pending_tokens == 1
        assert is_known or not self.needs_result, "asked for drafts before the last token is known"
        return list(self.drafts)


def make_group(block_size: int = BLOCK_SIZE, window: int = 0, per_sequence: bool = False) -> KVCacheGroup:
    kv_cache_spec = KVCacheSpec((("keys", (1,)),), "bf16", per_sequence, window)
    return KVCacheGroup(kv_cache_spec, (0,), 0 if per_sequence else block_size)


def make_scheduler(
    blocks: int = 16,
    tokens: int = 16,
    sequences: int = 4,
    groups: Sequence[KVCacheGroup] = (make_group(),),
    *,
    admit_all: bool = True,
    enable_caching: bool = True,
    **limits: Any,
) -> Scheduler:
    """`blocks`: without the null block. `limits`: see `SchedulerConfig`."""
    kv_cache_manager = KVCacheManager(BlockPool(1 + blocks), groups, enable_caching)
    scheduler = Scheduler(kv_cache_manager, SchedulerConfig(tokens, sequences, **limits))
    if admit_all:
        scheduler.admission_control = AdmitAll(kv_cache_manager)
    return scheduler


def make_request(name: str, prompt: int | list[int], max_tokens: int = 100, **params: Any) -> Request:
    """`prompt`: the token ids, or their number; with a number, requests with different names share no prefix."""
    tokens = prompt if isinstance(prompt, list) else [ord(name)] * prompt
    return Request(name, tokens, SamplingParams(max_tokens, **params))


def step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """Schedules and computes one step, as the engine does. Returns (request id, start, num_tokens) of each chunk."""
    output = scheduler.schedule()
    complete(scheduler, output)
    return chunks_of(output)


def complete(scheduler: Scheduler, output: SchedulerOutput, token: int = 1) -> None:
    """Passes the result of a step to the scheduler: `token` for every row that is sampled."""
    scheduler.update(output, [[token] * c.num_sampled for c in output.chunks if c.num_sampled])


def chunks_of(output: SchedulerOutput) -> list[tuple[str, int, int]]:
    """Returns (request id, start, num_tokens) of each chunk."""
    return [(c.request.id, c.start, c.num_tokens) for c in output.chunks]
