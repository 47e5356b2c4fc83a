"""Limits the duration of steps with decodes, since each stream waits for the step (ITL: inter-token latency).

If S streams are served evenly, a step computes one token of each and a proportional amount of prompt tokens, and lasts
S / (output tokens per second). A longer step delays S streams; a shorter one delays prompts. So the automatic budget is
that duration plus a small margin, so that prompts do not pile up.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rtp_llm.contract.request import Request
from rtp_llm.engine.prompt_budget import PromptBudget
from rtp_llm.engine.scheduler_config import SchedulerConfig
from rtp_llm.engine.step_cost import StepCost, StepWork

HEADROOM = 1.1  # of the automatic budget over the duration of an even step
MIN_AUTOMATIC_SECONDS = 0.025  # 40 tokens per second: faster than people read, so prompts take precedence
NUM_LATEST = 32  # admitted requests that count as the load of late
FULL_STEP = 8  # times the seconds to read the weights: a step without decodes that lasts longer takes no further prompt


class Demand(NamedTuple):
    """The work that one or several requests cause in total.

    rows: prompt tokens to compute, without those from the prefix cache. prompt_keys: number of tokens that a prompt
    token attends to, summed over `rows`, see `StepWork`. output_tokens: expected number of output tokens.
    """

    rows: float
    prompt_keys: float
    output_tokens: float

    @classmethod
    def of(cls, request: Request, num_output_tokens: int) -> "Demand":
        """Returns the work of one request, without the prompt tokens that the prefix cache provided.

        `num_output_tokens`: the expected length of its whole output.
        """
        rows = request.num_prompt_tokens - request.cached_tokens
        return cls(rows, rows * (request.cached_tokens + request.num_prompt_tokens) / 2, num_output_tokens)

    @classmethod
    def sum(cls, demands: Iterable["Demand"]) -> "Demand":
        """Returns the total work of one or more requests."""
        return cls(*(sum(amounts) for amounts in zip(*demands, strict=True)))


class ItlBudget:
    """Limits the prompt tokens that a step computes beside decodes, so that the inter-token latency (ITL) stays low.
    Computes this prompt budget for each step from the learned cost of steps and the recent load.
    """

    def __init__(self, config: SchedulerConfig):
        self._config = config
        self._latest: deque[Demand] = deque(maxlen=NUM_LATEST)
        self.cost = StepCost()

    def record_admission(self, demand: Demand) -> None:
        """Adds a request, which enters the batch for the first time, to the statistics of the recent load."""
        self._latest.append(demand)

    def prompt_budget(self, decodes: Sequence[Request], streams: Iterable[Demand]) -> PromptBudget:
        """Returns what a step may spend on prompts: tokens per prompt, and seconds for all prompts together.

        `decodes`: the requests that compute one token each in this step. `streams`: the work of all requests that will
        be in the batch together: the decodes, those that compute their prompt, and waiting ones as far as they fit.
        """
        config, tile, cost = self._config, self._config.chunk_tile, self.cost.per_unit
        max_chunk = config.mixed_prefill_chunk if decodes else config.max_num_batched_tokens
        if config.max_mixed_chunk or not self.cost.is_known:
            return PromptBudget(max_chunk, tile, max_chunk)
        if not decodes:
            return PromptBudget(max_chunk, tile, max_chunk, cost, FULL_STEP * cost.steps)
        work = StepWork(1, len(decodes), decode_keys=sum(r.num_computed_tokens for r in decodes))
        seconds = config.itl_budget_seconds or self._automatic_seconds(work, list(streams))
        return PromptBudget(max_chunk, tile, tile, cost, seconds, work)

    def _automatic_seconds(self, decodes: StepWork, streams: Sequence[Demand]) -> float:
        # The latest requests count rather than those present where a long prompt is an exception, and those present
        # where the load has changed to shorter prompts.
        demands = Demand.sum(streams), Demand.sum(self._latest)
        seconds = min(self._even_seconds(decodes, len(streams), demand) for demand in demands)
        return max(HEADROOM * seconds, MIN_AUTOMATIC_SECONDS)

    def _even_seconds(self, decodes: StepWork, num_streams: int, demand: Demand) -> float:
        """Returns the duration of a step with one token of each stream and a proportional amount of prompt tokens."""
        share = num_streams / max(1, demand.output_tokens)
        decode_keys = decodes.decode_keys * num_streams / decodes.logit_rows
        even = StepWork(1, num_streams, demand.rows * share, decode_keys, demand.prompt_keys * share)
        return self.cost.seconds(even)
