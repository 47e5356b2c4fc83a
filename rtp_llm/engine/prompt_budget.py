"""How many prompt tokens one step may compute, and where the chunks of prompts end."""

import math

from rtp_llm.contract.request import Request
from rtp_llm.engine.scheduler_output import ScheduledChunk
from rtp_llm.engine.step_cost import IDLE, StepWork

PROMPT_LOGPROB_CHUNK = 256  # tokens per step of a request with prompt logprobs, at most


class PromptBudget:
    """What a step can still spend on prompts: a maximum number of tokens per prompt, and seconds for all prompts
    together.
    """

    def __init__(
        self,
        max_chunk: int,
        tile: int,
        floor: int,
        cost: StepWork = IDLE,
        seconds: float = math.inf,
        decodes: StepWork = IDLE,
    ):
        """`max_chunk`: maximum number of tokens per request. `tile`: chunks end at its multiples.

        `floor`: tokens that the first prompt may compute however long they take. `cost`: seconds per unit of work.
        `seconds`: maximum duration of the step, including the work `decodes`.
        """
        self._max_chunk, self._tile, self._floor, self._cost = max_chunk, tile, floor, cost
        seconds -= cost.decode_keys * decodes.decode_keys
        self._seconds_for_rows = seconds - cost.logit_rows * decodes.logit_rows  # and keys of prompts
        self._seconds_for_keys = seconds - cost.steps  # of prompts, if the weights take longer than the rows
        self._has_prompt = False  # several tokens of the step are a prompt's

    def chunk_size(self, request: Request, start: int, limit: int) -> int:
        """Returns how many tokens of a prompt the step computes from position `start` on, at most `limit`; 0 or less:
        none.

        Chunks end with the prompt or at a multiple of the tile (a number of tokens for which kernels are efficient). If
        the step already has a chunk of another prompt, a chunk too short to reach either is postponed.
        """
        num_tokens = min(request.num_tokens - start, limit, self._max_tokens(request, start))
        if start + num_tokens == request.num_tokens:
            return num_tokens
        num_aligned = num_tokens - (start + num_tokens) % self._tile
        return num_aligned if num_aligned > 0 or self._has_prompt else num_tokens

    def take(self, chunk: ScheduledChunk) -> None:
        """Subtracts the work of a chunk from the budget."""
        work, cost = StepWork.of([chunk]), self._cost
        keys = cost.decode_keys * work.decode_keys + cost.prompt_keys * work.prompt_keys
        self._seconds_for_rows -= keys + cost.logit_rows * work.logit_rows + cost.other_rows * work.other_rows
        self._seconds_for_keys -= keys
        self._has_prompt = self._has_prompt or chunk.num_tokens > 1

    def _max_tokens(self, request: Request, start: int) -> int:
        row, max_chunk = self._cost.other_rows, self._max_chunk
        if request.wants_prompt_logprobs:  # whose logits need time and memory
            row, max_chunk = self._cost.logit_rows, min(max_chunk, PROMPT_LOGPROB_CHUNK)
        in_time = min(
            self._tokens_in(self._seconds_for_rows, row, start), self._tokens_in(self._seconds_for_keys, 0.0, start)
        )
        return int(min(max_chunk, in_time if self._has_prompt else max(in_time, self._floor)))

    def _tokens_in(self, seconds: float, row: float, start: int) -> float:
        """Returns how many tokens from `start` on fit into `seconds`; each takes `row` and the time of its keys."""
        if seconds <= 0 or math.isinf(seconds):
            return max(0.0, seconds)
        key = self._cost.prompt_keys
        first = row + key * start  # the first token; each further one has one key more
        return 2 * seconds / (first + math.sqrt(first * first + 2 * key * seconds))
