"""Ends the reasoning of a sequence that has used up its reasoning token budget."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows

MAX_DRAFTS = 64


class ReasoningBudget:
    """Logits processor for `SamplingParams.reasoning_budget` (maximum number of reasoning tokens): beyond it, forces
    the tokens that end the reasoning.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self._sequences: dict[int, _BudgetedSequence] = {}

    def reset(self, slot: int, request: Request) -> None:
        self.remove(slot)
        if request.params.reasoning_budget is not None and request.params.reasoning_end:
            self._sequences[slot] = _BudgetedSequence(request)

    def is_active(self, slot: int) -> bool:
        return slot in self._sequences and self._sequences[slot].may_force

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        for row, slot in enumerate(rows.slots.tolist()):
            if slot in self._sequences:
                token = self._sequences[slot].forced_token(rows.drafts_before(row))
                if token is not None:
                    logits[row] = -torch.inf
                    logits[row, token] = 0

    def accept(self, slot: int, token_ids: Sequence[int]) -> None:
        if slot in self._sequences:
            self._sequences[slot].append(token_ids)

    def rollback(self, slot: int, num_tokens: int) -> None:
        if slot in self._sequences and num_tokens:
            self._sequences[slot].pop(num_tokens)

    def remove(self, slot: int) -> None:
        self._sequences.pop(slot, None)


class _BudgetedSequence:
    """The output of one sequence. Its reasoning begins with `start`, or before the output if that is empty."""

    def __init__(self, request: Request):
        params = request.params
        self._start, self._end = list(params.reasoning_start), list(params.reasoning_end)
        self._limit = len(self._start) + (params.reasoning_budget or 0)  # of the output, its start included
        self._output: list[int] = []
        self._length_at_end: int | None = None  # of the output when its reasoning ended
        self.append(request.output)

    @property
    def may_force(self) -> bool:
        """Returns whether the reasoning budget may run out in the next step, so that a token of the reasoning's end is
        forced. Assumes fewer than MAX_DRAFTS draft tokens.
        """
        return self._length_at_end is None and len(self._output) + MAX_DRAFTS >= self._limit

    def append(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            self._output.append(token)
            if self._length_at_end is None and _ends_with(self._tail(), self._end):
                self._length_at_end = len(self._output)

    def pop(self, num_tokens: int) -> None:
        del self._output[-num_tokens:]
        if self._length_at_end is not None and self._length_at_end > len(self._output):
            self._length_at_end = None

    def forced_token(self, drafts: Sequence[int]) -> int | None:
        """Returns the token that must follow the output and the drafts; None if any token may."""
        self.append(drafts)
        try:
            return self._next_token()
        finally:
            if drafts:
                self.pop(len(drafts))

    def _tail(self) -> list[int]:
        """Returns the last tokens of the reasoning, as many as the end marker has."""
        return self._output[max(len(self._start), len(self._output) - len(self._end)) :]

    def _next_token(self) -> int | None:
        is_reasoning = self._length_at_end is None and self._output[: len(self._start)] == self._start
        if not is_reasoning or len(self._output) < self._limit:
            return None
        # The model may have begun to end it by itself.
        tail = self._tail()
        written = (n for n in range(len(self._end) - 1, 0, -1) if _ends_with(tail, self._end[:n]))
        return self._end[next(written, 0)]


def _ends_with(tokens: list[int], end: list[int]) -> bool:
    return tokens[-len(end) :] == end
