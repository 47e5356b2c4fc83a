"""The sampler's input (besides the logits) and its output, on rank 0."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rtp_llm.contract.engine_output import Logprob
from rtp_llm.contract.request import Request


@dataclass(frozen=True)
class SamplingMetadata:
    """What rank 0 needs to sample a step, besides the `Step` itself.

    new_requests: (slot, request) of the requests that enter the batch with this step, with their tokens so far.
    prompt_logprobs: (token id, N) for each entry of `Step.logprob_indices`: the row returns the logprobs of this prompt
        token, which follows the row's token, and of the N most likely tokens.
    hidden_indices: indices, among all tokens of the step, of those whose hidden states are returned: the last prompt
        token of each request with `SamplingParams.pooling` (embeddings, reranking).
    """

    new_requests: list[tuple[int, Request]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, int]] = field(default_factory=list)
    hidden_indices: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class SampledRows:
    """The sequence and position of each row of the logits [R, vocab_size].

    A sequence has one row, or 1 + k adjacent rows in a step that verifies k draft tokens: the row at draft offset 0
    gives the token after the sequence's last token, the row at offset j the token after the j-th draft.

    slots: [R] int64; the sequence's slot, whose state `Sampler.reset` has set.
    positions: [R] int64; the position of the token that the row samples, that is the number of tokens before it.
    draft_offsets: [R] int64.
    draft_tokens: [R] int64; the draft that precedes the token of the row, -1 at offset 0. So the drafts before row i
        are `draft_tokens[i - draft_offsets[i] + 1 : i + 1]`.
    """

    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    draft_offsets: NDArray[np.int64]
    draft_tokens: NDArray[np.int64]

    @classmethod
    def build(
        cls, slots: Sequence[int], positions: Sequence[int], drafts: Sequence[Sequence[int]] | None = None
    ) -> "SampledRows":
        """Returns the rows of the logits for some sequences: one per sequence, and one after each draft token.

        positions: for each sequence, the position of the token that its first row samples. drafts: each sequence's
        draft tokens, if any.
        """
        tails = drafts or [()] * len(slots)
        counts = [1 + len(tail) for tail in tails]
        offsets = np.array([offset for count in counts for offset in range(count)], np.int64)
        return cls(
            np.repeat(np.array(slots, np.int64), counts),
            np.repeat(np.array(positions, np.int64), counts) + offsets,
            offsets,
            np.array([token for tail in tails for token in (-1, *tail)], np.int64),
        )

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, rows: slice) -> "SampledRows":
        """Returns some of the rows, with all rows of each of their sequences."""
        return SampledRows(self.slots[rows], self.positions[rows], self.draft_offsets[rows], self.draft_tokens[rows])

    def drafts_before(self, row: int) -> list[int]:
        """Returns the draft tokens between the sequence's last token and the token that the row samples."""
        drafts: list[int] = self.draft_tokens[row - self.draft_offsets[row] + 1 : row + 1].tolist()
        return drafts


@dataclass
class SampledTokens:
    """The new tokens of one sequence after a step: without drafts one token, with k drafts 1 to k + 1 tokens.

    slot: the slot of the sequence.
    token_ids: the accepted drafts, then the token sampled after them.
    logprobs: logprobs of `token_ids`; empty unless the request asks for them.
    failed: the logits of the token after `token_ids` contain NaN or +inf, or only -inf. The request cannot continue.
    """

    slot: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    failed: bool = False


@dataclass
class StepResult:
    """The sampled tokens of a step, on rank 0; empty on the other ranks.

    tokens: the new tokens of each sequence with sampled rows, in order.
    prompt_logprobs: one entry per entry of `Step.logprob_indices`.
    hidden_states: [hidden_size] float32 as bytes, per entry of `SamplingMetadata.hidden_indices`.
    """

    tokens: list[SampledTokens] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    hidden_states: list[bytes] = field(default_factory=list)
