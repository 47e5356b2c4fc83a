"""Logits processors, which change logits before sampling: penalties, biases, minimum lengths, and custom ones.

A processor serves all sequences and keeps state per sequence slot, so that sequences that it does not change cost
nothing in a step.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.layers.forbidden_tokens import AllowedTokens, BadWords
from rtp_llm.layers.grammar_mask import GrammarMask
from rtp_llm.layers.reasoning_budget import ReasoningBudget


class LogitsProcessor(Protocol):
    """Changes the logits of sequences before tokens are sampled. `slot`: index of a sequence in the batch, 0 or more.
    Methods are called for all sequences, also for those whose request does not use this processor.
    """

    def reset(self, slot: int, request: Request) -> None:
        """Replaces the state of the slot: `request` starts, resumes or is recomputed, with `request.tokens` so far."""
        ...

    def is_active(self, slot: int) -> bool:
        """Returns whether `apply` may change rows of this sequence."""
        ...

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        """Changes logits [len(rows), vocab_size] float32, contiguous, in place.

        A row at draft offset j is processed as if the j drafts before it were tokens of the sequence. Does not change
        the state.
        """
        ...

    def accept(self, slot: int, token_ids: Sequence[int]) -> None:
        """Appends tokens to the sequence: drafts that were accepted and the token sampled after them."""
        ...

    def rollback(self, slot: int, num_tokens: int) -> None:
        """Undoes `accept` for the newest `num_tokens` tokens, all of which were accepted after the last `reset`."""
        ...

    def remove(self, slot: int) -> None:
        """Deletes the state of the sequence."""
        ...


LogitsProcessorFactory = Callable[[int, torch.device], LogitsProcessor]  # (vocab_size, device of the logits)


class Penalties:
    """Repetition, presence and frequency penalties and logit biases, in one pass over the tokens that they change.

    Keeps token counts only for the tokens of a sequence: hundreds of numbers. A row of counts over the vocabulary would
    be 150,000 numbers, most of them zero, to be read in each step.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self._vocab_size, self._device = vocab_size, device
        self._tables: dict[int, _EditTable] = {}

    def reset(self, slot: int, request: Request) -> None:
        self.remove(slot)
        params = request.params
        if _has_penalty(params) or params.logit_bias:
            self._tables[slot] = _EditTable(request)

    def is_active(self, slot: int) -> bool:
        return slot in self._tables

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        edits: list[_Edits] = []
        for row, slot in enumerate(rows.slots.tolist()):
            if slot in self._tables:
                token_ids, divisors, addends = self._tables[slot].after(rows.drafts_before(row))
                edits.append((token_ids + row * self._vocab_size, divisors, addends))
        if not edits:
            return
        indices, factors, terms = (
            torch.from_numpy(np.concatenate(column)).to(self._device) for column in zip(*edits, strict=True)
        )
        flat = logits.view(-1)
        values = flat[indices]
        flat[indices] = torch.where(values > 0, values / factors, values * factors) + terms

    def accept(self, slot: int, token_ids: Sequence[int]) -> None:
        if slot in self._tables:
            self._tables[slot].append(token_ids)

    def rollback(self, slot: int, num_tokens: int) -> None:
        if slot in self._tables:
            self._tables[slot].pop(num_tokens)

    def remove(self, slot: int) -> None:
        self._tables.pop(slot, None)


class MinTokens:
    """Forbids the stop tokens of a sequence until its output has `min_tokens` tokens."""

    def __init__(self, vocab_size: int, device: torch.device):
        self._vocab_size, self._device = vocab_size, device
        self._missing: dict[int, int] = {}  # tokens, by slot; below 0 once the output is longer
        self._stop_token_ids: dict[int, NDArray[np.int64]] = {}

    def reset(self, slot: int, request: Request) -> None:
        self.remove(slot)
        params = request.params
        if params.min_tokens and params.stop_token_ids:
            self._missing[slot] = params.min_tokens - request.num_output_tokens
            self._stop_token_ids[slot] = np.array(params.stop_token_ids, np.int64)

    def is_active(self, slot: int) -> bool:
        return self._missing.get(slot, 0) > 0

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        banned = [
            self._stop_token_ids[slot] + row * self._vocab_size
            for row, (slot, offset) in enumerate(zip(rows.slots.tolist(), rows.draft_offsets.tolist(), strict=True))
            if self._missing.get(slot, 0) > offset
        ]
        if banned:
            logits.view(-1)[torch.from_numpy(np.concatenate(banned)).to(self._device)] = -torch.inf

    def accept(self, slot: int, token_ids: Sequence[int]) -> None:
        if slot in self._missing:
            self._missing[slot] -= len(token_ids)

    def rollback(self, slot: int, num_tokens: int) -> None:
        if slot in self._missing:
            self._missing[slot] += num_tokens

    def remove(self, slot: int) -> None:
        self._missing.pop(slot, None)
        self._stop_token_ids.pop(slot, None)


DEFAULT_LOGITS_PROCESSORS: tuple[LogitsProcessorFactory, ...] = (
    *(Penalties, AllowedTokens, BadWords, MinTokens),
    *(ReasoningBudget, GrammarMask),  # whose tokens are forced
)

_Edits = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]


def _has_penalty(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)


class _EditTable:
    """The edits of one sequence. Entry i divides the logit of token `ids[i]` by `factors[i]` if it is positive, else
    multiplies it, then adds `terms[i]`. A token has at most one entry.
    """

    def __init__(self, request: Request):
        params = self._params = request.params
        self._prompt = set(request.tokens[: request.num_prompt_tokens]) if params.repetition_penalty != 1 else set()
        self._appended: list[int] = []  # since `reset`
        self._entries: dict[int, int] = {}  # by token
        self._counts: list[int] = []  # of the token in the output, by entry
        self._ids, self._factors, self._terms = array("q"), array("f"), array("f")
        output = Counter(request.output if _has_penalty(params) else [])
        for token in {*params.logit_bias, *self._prompt, *output}:
            self._count(token, output[token])

    def append(self, token_ids: Sequence[int]) -> None:
        """Counts tokens that were appended to the sequence's output, for its penalties."""
        if _has_penalty(self._params):
            self._appended += token_ids
            for token in token_ids:
                self._count(token, 1)

    def pop(self, num_tokens: int) -> None:
        """Stops counting the newest `num_tokens` tokens of the output, which were rejected."""
        if _has_penalty(self._params):
            for _ in range(num_tokens):
                self._count(self._appended.pop(), -1)

    def after(self, drafts: Sequence[int]) -> _Edits:
        """Returns copies of the edits of the logits (token ids, factors, terms), as if the draft tokens were part of
        the output.
        """
        self.append(drafts)
        edits = np.array(self._ids), np.array(self._factors), np.array(self._terms)
        self.pop(len(drafts))
        return edits

    def _count(self, token: int, change: int) -> None:
        """Changes the number of times that a token is in the output."""
        entry = self._entries.setdefault(token, len(self._counts))
        if entry == len(self._counts):
            for column, value in ((self._counts, 0), (self._ids, token), (self._factors, 1), (self._terms, 0)):
                column.append(value)
        params = self._params
        count = self._counts[entry] = self._counts[entry] + change
        self._factors[entry] = params.repetition_penalty if count or token in self._prompt else 1
        penalty = params.presence_penalty * (count > 0) + params.frequency_penalty * count
        self._terms[entry] = params.logit_bias.get(token, 0) - penalty
