"""Masks the tokens that a request's grammar does not allow next.

The matcher of a sequence advances with each sampled token that is kept (a rejected draft is not). Another thread then
computes the next mask, while the forward pass of the next step runs on the device.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from threading import Lock

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.kernels.logits_mask import Bits, argmax_allowed, mask_logits
from rtp_llm.kernels.sampling import FAILED

MAX_ERROR = 300  # characters of the grammar's error
NUM_THREADS = 2  # that compute masks: mostly a few microseconds each, at most some milliseconds


class GrammarMask:
    """Logits processor for grammars. It comes last: if a grammar has ended, it allows the stop tokens even if other
    processors (`MinTokens`) forbid them, so that the request ends.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self._vocab_size = vocab_size
        self._sequences: dict[int, _ConstrainedSequence] = {}
        self._changed: deque[_ConstrainedSequence] = deque()  # since their masks were computed
        self._threads = ThreadPoolExecutor(NUM_THREADS, "grammar-mask")

    def reset(self, slot: int, request: Request) -> None:
        self.remove(slot)
        if request.matcher:
            self._sequences[slot] = _ConstrainedSequence(request, request.matcher, self._vocab_size)
            self._compute_ahead(self._sequences[slot])

    def is_active(self, slot: int) -> bool:
        return slot in self._sequences

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        masks = self._masks(rows)
        mask_logits(logits, _stack(masks), list(masks))
        for row, mask in masks.items():
            if mask.end_ids:
                logits[row, mask.end_ids] = 0

    def argmax(self, logits: Tensor, rows: SampledRows) -> Tensor:
        """Returns, for each row of logits, the token with the highest logit that the sequence's grammar allows, [R]
        int64; -1 (FAILED) if the highest logit is NaN or infinite. For greedy sequences for which no other logits
        processor is active. Much faster than `apply` and an argmax, since it does not write logits.
        """
        masks = self._masks(rows)
        ends = {row: min(mask.end_ids) for row, mask in masks.items() if mask.end_ids}
        masks = {row: mask for row, mask in masks.items() if row not in ends}
        tokens = argmax_allowed(logits.contiguous(), _stack(masks), list(masks))
        for row, token in ends.items():
            if tokens[row] != FAILED:
                tokens[row] = token
        return tokens

    def _masks(self, rows: SampledRows) -> "dict[int, _Mask]":
        """Returns the mask of each row that has one."""
        masks: dict[int, _Mask] = {}
        for row, slot in enumerate(rows.slots.tolist()):
            if slot in self._sequences and (mask := self._sequences[slot].mask(rows.drafts_before(row))):
                masks[row] = mask
        return masks

    def accept(self, slot: int, token_ids: Sequence[int]) -> None:
        if slot in self._sequences:
            self._sequences[slot].accept(token_ids)
            self._compute_ahead(self._sequences[slot])

    def rollback(self, slot: int, num_tokens: int) -> None:
        if slot in self._sequences:
            self._sequences[slot].rollback(num_tokens)

    def remove(self, slot: int) -> None:
        self._sequences.pop(slot, None)

    def _compute_ahead(self, sequence: "_ConstrainedSequence") -> None:
        """Lets a thread compute the sequence's mask. One wake-up serves all sequences of a step."""
        self._changed.append(sequence)
        if len(self._changed) == 1:
            self._threads.submit(self._compute_masks)

    def _compute_masks(self) -> None:
        while self._changed:
            with suppress(IndexError):  # another thread has taken the last one
                self._changed.popleft().mask()


@dataclass(frozen=True)
class _Mask:
    """The tokens that may follow. `end_ids`: these tokens, if all of them end the output; else empty."""

    allowed: Bits
    end_ids: tuple[int, ...] = ()


class _ConstrainedSequence:
    """The matcher of one sequence, after its output so far. Two threads use it: one computes the mask ahead of time."""

    def __init__(self, request: Request, matcher: LLMatcher, vocab_size: int):
        self._request, self._matcher = request, matcher.deep_copy()
        self._lock = Lock()
        self._mask: _Mask | None = None  # of the next token, once it is computed
        self._position, self._vocab_size = request.num_prompt_tokens, vocab_size
        self._num_after_end = 0  # tokens from the one on that ended the output; the matcher has not seen them
        self._stop_ids = frozenset(request.params.stop_token_ids)
        self._stop_bits, self._vocabulary_bits = _pack(list(self._stop_ids), vocab_size), _pack(slice(None), vocab_size)
        self.accept(request.output)

    def mask(self, drafts: Sequence[int] = ()) -> _Mask | None:
        """Returns the mask of tokens that may follow the output and the drafts; it allows none if the grammar failed.

        Returns None if any token is allowed: the output has ended, or the drafts violate the grammar and will be
        rejected.
        """
        with self._lock:
            if self._num_after_end or not self._stop_ids.isdisjoint(drafts):
                return None
            if not drafts:
                self._mask = self._mask or self._compute_mask()
                return self._mask
            num_valid = self._matcher.try_consume_tokens(list(drafts))
            mask = self._compute_mask() if num_valid == len(drafts) else None
            self._matcher.rollback(num_valid)
            return mask

    def accept(self, token_ids: Sequence[int]) -> None:
        with self._lock:
            for token in token_ids:
                if self._num_after_end or token in self._stop_ids:
                    self._num_after_end += 1
                else:
                    self._matcher.consume_token(token)
            self._move(len(token_ids))

    def rollback(self, num_tokens: int) -> None:
        with self._lock:
            num_unseen = min(num_tokens, self._num_after_end)
            self._num_after_end -= num_unseen
            self._matcher.rollback(num_tokens - num_unseen)
            self._move(-num_tokens)

    def _move(self, num_tokens: int) -> None:
        """Finds what the grammar forces after so many more tokens of the output. It takes some microseconds."""
        self._mask = None
        self._position += num_tokens
        forced = [] if self._num_after_end else self._matcher.compute_ff_tokens()
        self._request.forced_tokens = self._position, list(takewhile(self._goes_on, forced))

    def _goes_on(self, token: int) -> bool:
        """Returns whether the output can continue after a token. The tokenizer may know more tokens than the model."""
        return token < self._vocab_size and token not in self._stop_ids

    def _compute_mask(self) -> _Mask:
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)[: len(self._vocabulary_bits)]
        if self._matcher.is_error():
            self._request.error = self._matcher.get_error()[:MAX_ERROR]
            return _Mask(np.zeros_like(allowed))
        allowed = allowed & self._vocabulary_bits  # the tokenizer may know more tokens than the model
        if self._matcher.is_accepting():
            allowed |= self._stop_bits
        if (allowed & ~self._stop_bits).any():
            return _Mask(allowed)
        return _Mask(allowed, tuple(token for token in self._stop_ids if allowed[token // 8] >> token % 8 & 1))


def _stack(masks: "dict[int, _Mask]") -> Bits:
    return np.array([mask.allowed for mask in masks.values()], np.uint8)


def _pack(token_ids: list[int] | slice, vocab_size: int) -> Bits:
    bits = np.zeros(vocab_size, np.uint8)
    bits[token_ids] = 1
    return np.packbits(bits, bitorder="little")
