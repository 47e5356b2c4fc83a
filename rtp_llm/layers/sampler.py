"""Samples tokens from logits on rank 0.

Random numbers are a function of (seed, position), so a position that is recomputed after a preemption or a restart, or
in another batch, gets the same number. How a row is sampled depends on its own logits and request only.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtp_llm.contract.engine_output import Logprob
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows, SampledTokens
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.kernels.sampling import FAILED, argmax_finite, sample_by_id
from rtp_llm.layers.grammar_mask import GrammarMask
from rtp_llm.layers.logits_processors import DEFAULT_LOGITS_PROCESSORS, LogitsProcessor, LogitsProcessorFactory
from rtp_llm.layers.logprobs import compute_logprobs
from rtp_llm.layers.token_filter import FILTER_PARAMS, sample_filtered

_FILTERS = ("temperature", "top_k", "top_p", "min_p")
# What a slot's request asks for. `method`: an index into _METHODS.
_SLOT_PARAMS = np.dtype([*((n, FILTER_PARAMS[n]) for n in _FILTERS), ("seed", "u8"), ("method", "i8")])


@dataclass(frozen=True)
class SamplerOutput:
    """The sampled tokens of R rows (rows of logits; a sequence has one per token to sample).

    tokens: [R] int64 on the device of the logits. -1 (FAILED) if the highest logit, before or after the logits
        processors, is NaN or infinite, that is if any logit is NaN or +inf, or all are -inf.
    logprobs: R entries; None if the request asks for none.
    """

    tokens: Tensor
    logprobs: list[Logprob | None]


class Sampler:
    """Samples the next tokens of all sequences of the engine. Keeps the state of a sequence (penalties, grammar) under
    its slot, from `reset` to `remove`.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        device: torch.device,
        processors: Sequence[LogitsProcessorFactory] = DEFAULT_LOGITS_PROCESSORS,
    ):
        """`processors`: logits processors, in order of application."""
        self._processors = [make(vocab_size, device) for make in processors]
        self._params = np.zeros(num_slots, _SLOT_PARAMS)
        # See `logprobs` and `logprob_token_ids` in SamplingParams.
        self._logprobs: list[int | tuple[int, ...] | None] = [None] * num_slots

    def reset(self, slot: int, request: Request) -> None:
        """Assigns the slot to a request that enters or re-enters the batch, with `request.tokens` so far."""
        params = request.params
        filters = (getattr(params, name) for name in _FILTERS)
        self._params[slot] = (*filters, params.seed & (2**64 - 1), _METHODS.index(_choose_method(params)))
        self._logprobs[slot] = params.logprobs
        if params.logprobs is not None and params.logprob_token_ids:
            self._logprobs[slot] = params.logprob_token_ids
        for processor in self._processors:
            processor.reset(slot, request)

    def remove(self, slot: int) -> None:
        """Frees the state of the slot."""
        for processor in self._processors:
            processor.remove(slot)

    def sample(self, logits: Tensor, rows: SampledRows) -> SamplerOutput:
        """Returns a token per row. Does not change the state of the sequences; `accept_drafts` does.

        logits: [len(rows), vocab_size] float32; not changed. Allocates up to twice their size in addition.
        """
        active = [p for p in self._processors if any(map(p.is_active, set(rows.slots.tolist())))]
        if len(active) == 1 and isinstance(active[0], GrammarMask) and self._are_greedy(rows):
            tokens = active[0].argmax(logits, rows)
        else:
            tokens = self._sample_processed(logits, rows, active)
        return SamplerOutput(tokens, self._compute_logprobs(logits, tokens, rows))

    def accept_drafts(self, output: SamplerOutput, rows: SampledRows) -> list[SampledTokens]:
        """Returns the new tokens of every sequence, in order of the rows, and appends them to the sequences: drafts
        that agree with what was sampled, then one sampled token.

        The token that was sampled after j drafts is accepted if j is 0, or if the token that was sampled after j - 1
        drafts is accepted and equals the j-th draft.
        """
        sequences: list[SampledTokens] = []
        previous = FAILED  # the token that the next draft must equal; FAILED equals none
        columns = (rows.slots.tolist(), rows.draft_offsets.tolist(), rows.draft_tokens.tolist())
        for slot, offset, draft, token, logprob in zip(*columns, output.tokens.tolist(), output.logprobs, strict=True):
            if offset == 0:
                sequences.append(SampledTokens(slot))
            elif draft != previous:  # also if that has failed
                previous = FAILED
                continue
            previous = token
            if token == FAILED:
                sequences[-1].failed = True
                continue
            sequences[-1].token_ids.append(token)
            if logprob is not None:
                sequences[-1].logprobs.append(logprob)
        for processor in self._processors:
            for sequence in sequences:
                processor.accept(sequence.slot, sequence.token_ids)
        return sequences

    def _are_greedy(self, rows: SampledRows) -> bool:
        return bool((self._params["method"][rows.slots] == _METHODS.index(_sample_greedy)).all())

    def _sample_processed(self, logits: Tensor, rows: SampledRows, active: Sequence[LogitsProcessor]) -> Tensor:
        """Returns token ids [R], sampled from the logits as the active processors change a copy of them."""
        if not active:
            return self._sample(logits, rows)
        processed = logits.clone(memory_format=torch.contiguous_format)
        for processor in active:
            processor.apply(processed, rows)
        return torch.where(argmax_finite(logits) == FAILED, FAILED, self._sample(processed, rows))

    def _sample(self, logits: Tensor, rows: SampledRows) -> Tensor:
        """Returns token ids [R]. All rows of a method are sampled together."""
        params = self._params[rows.slots]
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for index in np.unique(params["method"]).tolist():
            method, is_chosen = _METHODS[index], params["method"] == index
            if is_chosen.all():
                return method(logits, params, rows.positions)
            chosen = torch.from_numpy(is_chosen.nonzero()[0]).to(logits.device)
            tokens[chosen] = method(logits[chosen], params[is_chosen], rows.positions[is_chosen])
        return tokens

    def _compute_logprobs(self, logits: Tensor, tokens: Tensor, rows: SampledRows) -> list[Logprob | None]:
        tops = [self._logprobs[slot] for slot in rows.slots.tolist()]
        chosen = [row for row, top in enumerate(tops) if top is not None]
        logprobs: list[Logprob | None] = [None] * len(rows)
        if chosen:
            chosen_tokens = tokens[chosen].clamp(min=0).tolist()  # FAILED is no token
            chosen_tops = [tops[row] or 0 for row in chosen]
            for row, logprob in zip(chosen, compute_logprobs(logits[chosen], chosen_tokens, chosen_tops), strict=True):
                logprobs[row] = logprob
        return logprobs


def uniform(seed: int, position: int) -> float:
    """Returns a random number in [0, 1) for sampling one token. It depends on seed and position only, and is the same
    on all machines.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", seed & (2**64 - 1), position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) / float(1 << 53)


def _draw_numbers(params: NDArray[np.void], positions: NDArray[np.int64]) -> NDArray[np.void]:
    """Returns the parameters [n] _SLOT_PARAMS as FILTER_PARAMS, with the random number of each row's position."""
    drawn = np.empty(len(params), FILTER_PARAMS)
    for name in _FILTERS:
        drawn[name] = params[name]
    drawn["number"] = [
        uniform(seed, position) for seed, position in zip(params["seed"].tolist(), positions.tolist(), strict=True)
    ]
    return drawn


def _sample_greedy(logits: Tensor, params: NDArray[np.void], positions: NDArray[np.int64]) -> Tensor:
    return argmax_finite(logits)


def _sample_filtered(logits: Tensor, params: NDArray[np.void], positions: NDArray[np.int64]) -> Tensor:
    return sample_filtered(logits, _draw_numbers(params, positions))


def _sample_unfiltered(logits: Tensor, params: NDArray[np.void], positions: NDArray[np.int64]) -> Tensor:
    drawn = _draw_numbers(params, positions)
    return sample_by_id(logits, drawn["temperature"], drawn["number"])


# Each gets logits [R, vocab_size], parameters [R] _SLOT_PARAMS and positions [R], and returns token ids [R].
_METHODS = (_sample_greedy, _sample_filtered, _sample_unfiltered)


def _choose_method(params: SamplingParams) -> Callable[[Tensor, NDArray[np.void], NDArray[np.int64]], Tensor]:
    if params.is_greedy:
        return _sample_greedy
    return _sample_filtered if params.top_k > 0 or params.top_p < 1 or params.min_p > 0 else _sample_unfiltered
