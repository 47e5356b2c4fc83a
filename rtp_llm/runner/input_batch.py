"""The sequences that a rank computes, kept from step to step by slot (index of a sequence in the batch).

Every rank applies the same steps to the same state. The number of numpy operations depends neither on the number of
sequences nor on their lengths. The digest of a step shows whether this rank would compute the same as rank 0.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rtp_llm.contract.kv_cache import KVCacheGroup
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.contract.step import Ints, Step
from rtp_llm.errors import CommunicationError


@dataclass(frozen=True)
class StepInputs:
    """The arrays of one step in host memory, from which the device's tensors are made. The step computes T tokens of S
    sequences; the ids of D tokens are only on the device. W: blocks of the longest sequence.

    token_ids: [T] int32; 0 for tokens whose ids are on the device.
    device_indices, device_slots: [D] int32, indices of the D tokens among the T, and the slots of their sequences.
    query_start_loc: [S + 1] int32, sequence i has the tokens query_start_loc[i]:query_start_loc[i + 1].
    seq_lens, prompt_lens: [S] int32, tokens of each sequence in the KV cache after this step; tokens of its prompt.
    block_tables: per KV cache group [S, W] int32, block ids in order of position, padded with the null block.
    step: the step from which these arrays were made.
    """

    token_ids: Ints
    device_indices: Ints
    device_slots: Ints
    query_start_loc: Ints
    seq_lens: Ints
    prompt_lens: Ints
    block_tables: list[Ints]
    step: Step

    def digest(self) -> int:
        """Returns a checksum of the tokens that the step computes and of the blocks that it uses."""
        checksum = 0
        arrays = (self.token_ids, self.device_slots, self.query_start_loc, self.seq_lens, *self.block_tables)
        for array in arrays:
            checksum = zlib.crc32(array.tobytes(), checksum)
        return checksum

    def check_digest(self) -> None:
        """Raises CommunicationError if the digest differs from rank 0's, that is if the batches of the ranks differ."""
        if self.digest() != self.step.digest:
            raise CommunicationError(
                f"step {self.step.number}: this rank's tokens or KV blocks differ from rank 0's, so it would compute"
                " something else than rank 0"
            )

    @property
    def sampled_indices(self) -> Ints:
        """Returns the indices, among the step's T tokens, of those whose next token is sampled, [R] int32."""
        return _last_integers(self.query_start_loc[1:], self.step.num_sampled)

    @property
    def sampled_slots(self) -> Ints:
        """Returns the slots of the sequences with sampled tokens, each once, in the order of `step.slots`."""
        return self.step.slots[self.step.num_sampled > 0]

    def sampled_rows(self) -> SampledRows:
        """Returns the slot, the position and the draft token before it of each of the R rows of logits of the step."""
        counts, indices = self.step.num_sampled, self.sampled_indices
        offsets = _last_integers(counts, counts)
        return SampledRows(
            slots=np.repeat(self.step.slots, counts).astype(np.int64),
            positions=_last_integers(self.seq_lens + 1, counts).astype(np.int64),
            draft_offsets=offsets.astype(np.int64),
            draft_tokens=np.where(offsets > 0, self.token_ids[indices], -1).astype(np.int64),
        )


class InputBatch:
    """State of all sequences of a rank, by slot: equal on all ranks, and changed only by steps.

    num_computed: [slots] int32, tokens in the KV cache after the last step.
    prompt_lens: [slots] int32, tokens of the prompt.
    has_sampled: [slots] int32, 1 if the last step of the sequence sampled a token, which the device holds.
    block_tables: per KV cache group [slots, blocks of the longest sequence] int32.
    """

    def __init__(self, groups: Sequence[KVCacheGroup], num_slots: int, max_seq_len: int):
        self.groups = tuple(groups)
        self.num_computed = np.zeros(num_slots, np.int32)
        self.prompt_lens = np.zeros(num_slots, np.int32)
        self.has_sampled = np.zeros(num_slots, np.int32)
        self.block_tables = [np.zeros((num_slots, group.num_blocks(max_seq_len)), np.int32) for group in groups]

    def apply(self, step: Step) -> StepInputs:
        """Applies a step to the state. Returns the arrays with which to compute it."""
        self._update_sequences(step)
        inputs = self._make_inputs(step)
        self.num_computed[step.slots] += step.counts
        self.has_sampled[step.slots] = step.num_sampled > 0
        return inputs

    def _update_sequences(self, step: Step) -> None:
        for tables in self.block_tables:
            tables[step.ended_slots] = 0
        slots, prompt_lens, num_computed = step.new_sequences.T
        self.num_computed[slots], self.prompt_lens[slots], self.has_sampled[slots] = num_computed, prompt_lens, 0
        slots, num_computed = step.rewinds.T
        self.num_computed[slots] = num_computed
        for group, tables in enumerate(self.block_tables):
            slots, _, indices, block_ids = step.new_blocks[step.new_blocks[:, 1] == group].T
            tables[slots, indices] = block_ids

    def _make_inputs(self, step: Step) -> StepInputs:
        query_start_loc = np.concatenate(([0], np.cumsum(step.counts))).astype(np.int32)
        on_device = self.has_sampled[step.slots] > 0
        device_indices = query_start_loc[:-1][on_device]
        token_ids = np.zeros(query_start_loc[-1], np.int32)
        is_known = np.ones(len(token_ids), np.bool_)
        is_known[device_indices] = False
        token_ids[is_known] = step.token_ids
        seq_lens = self.num_computed[step.slots] + step.counts
        widths = [group.num_blocks(int(seq_lens.max(initial=1))) for group in self.groups]
        return StepInputs(
            token_ids=token_ids,
            device_indices=device_indices,
            device_slots=step.slots[on_device],
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            prompt_lens=self.prompt_lens[step.slots],
            block_tables=[t[step.slots, :width] for t, width in zip(self.block_tables, widths, strict=True)],
            step=step,
        )

    def snapshot(self) -> bytes:
        """Returns one uint32 checksum per array and slot; other ranks compare theirs with rank 0's (SNAPSHOT frame)."""
        rows = (row for array in self._arrays().values() for row in array)
        return np.fromiter((zlib.crc32(row.tobytes()) for row in rows), np.uint32).tobytes()

    def check_snapshot(self, data: bytes) -> None:
        """Raises CommunicationError if this state differs from rank 0's, whose `snapshot` returned `data`."""
        names = list(self._arrays())
        own, expected = (np.frombuffer(d, np.uint32).reshape(len(names), -1) for d in (self.snapshot(), data))
        for index, slot in np.argwhere(own != expected).tolist():
            raise CommunicationError(
                f"this rank's state of the sequence in slot {slot} differs from rank 0's in: {names[index]}"
            )

    def _arrays(self) -> dict[str, Ints]:
        state = {"num_computed": self.num_computed, "prompt_lens": self.prompt_lens, "has_sampled": self.has_sampled}
        return state | {f"block table of KV cache group {i}": tables for i, tables in enumerate(self.block_tables)}


def _last_integers(ends: Ints, counts: Ints) -> Ints:
    """Returns one array with the `counts[i]` integers below `ends[i]` for each i, in ascending order."""
    starts = np.cumsum(counts) - counts  # of each i in the result
    return np.arange(int(counts.sum()), dtype=np.int32) + np.repeat(ends - counts - starts, counts).astype(np.int32)
