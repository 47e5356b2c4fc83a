"""Excludes tokens on request: all but some (`allowed_token_ids`), or those that would complete a word (`bad_words`)."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.kernels.logits_mask import Bits, mask_logits


class AllowedTokens:
    """Logits processor for `SamplingParams.allowed_token_ids`: forbids all other tokens."""

    def __init__(self, vocab_size: int, device: torch.device):
        self._vocab_size = vocab_size
        self._masks: dict[int, Bits] = {}

    def reset(self, slot: int, request: Request) -> None:
        self.remove(slot)
        if request.params.allowed_token_ids:
            is_allowed = np.zeros(self._vocab_size, np.bool_)
            is_allowed[list(request.params.allowed_token_ids)] = True
            self._masks[slot] = np.packbits(is_allowed, bitorder="little")

    def is_active(self, slot: int) -> bool:
        return slot in self._masks

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        masks = {row: self._masks[slot] for row, slot in enumerate(rows.slots.tolist()) if slot in self._masks}
        mask_logits(logits, np.array(list(masks.values()), np.uint8), list(masks))

    def accept(self, slot: int, token_ids: Sequence[int]) -> None:
        pass

    def rollback(self, slot: int, num_tokens: int) -> None:
        pass

    def remove(self, slot: int) -> None:
        self._masks.pop(slot, None)


class BadWords:
    """Logits processor for `SamplingParams.bad_words`: forbids the last token of a word after its other tokens."""

    def __init__(self, vocab_size: int, device: torch.device):
        self._vocab_size, self._device = vocab_size, device
        self._sequences: dict[int, _WordSequence] = {}

    def reset(self, slot: int, request: Request) -> None:
        self.remove(slot)
        if request.params.bad_words:
            self._sequences[slot] = _WordSequence(request)

    def is_active(self, slot: int) -> bool:
        return slot in self._sequences

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        forbidden = [
            self._sequences[slot].forbidden(rows.drafts_before(row)) + row * self._vocab_size
            for row, slot in enumerate(rows.slots.tolist())
            if slot in self._sequences
        ]
        if forbidden:
            logits.view(-1)[torch.from_numpy(np.concatenate(forbidden)).to(self._device)] = -torch.inf

    def accept(self, slot: int, token_ids: Sequence[int]) -> None:
        if slot in self._sequences:
            self._sequences[slot].output += token_ids

    def rollback(self, slot: int, num_tokens: int) -> None:
        if slot in self._sequences:
            output = self._sequences[slot].output
            del output[len(output) - num_tokens :]

    def remove(self, slot: int) -> None:
        self._sequences.pop(slot, None)


class _WordSequence:
    """The output of one sequence, and its bad words, indexed by their second-to-last token."""

    def __init__(self, request: Request):
        self.output = list(request.output)
        words = request.params.bad_words
        self._single = np.array([word[0] for word in words if len(word) == 1], np.int64)
        self._by_token: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
        for word in words:
            if len(word) > 1:
                self._by_token[word[-2]].append(word)

    def forbidden(self, drafts: Sequence[int]) -> NDArray[np.int64]:
        """Returns the tokens that would complete a forbidden word after the output and the drafts."""
        output = [*self.output, *drafts] if drafts else self.output
        words = self._by_token.get(output[-1], ()) if output else ()
        ends = [word[-1] for word in words if tuple(output[1 - len(word) :]) == word[:-1]]
        return np.concatenate([self._single, np.array(ends, np.int64)])
