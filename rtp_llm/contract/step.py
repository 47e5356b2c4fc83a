"""The message that rank 0 sends to every rank before a step: what changed in the batch since the previous step."""

import struct
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
HEADER = struct.Struct("<iiI")  # epoch, number, digest
# Integers per row of the arrays that are tables; all others are vectors.
ROW_SIZES = {"new_sequences": 3, "rewinds": 2, "new_blocks": 4}


@dataclass(frozen=True)
class Step:
    """A step computes T tokens of S sequences. Ranks keep each sequence under its slot, its index in the batch
    (`runner.input_batch`).

    A sequence whose token was sampled in its last step continues with that token, which ranks hold on the device and no
    step transfers. Sequences with one token come first, so that an attention backend can compute them together.

    epoch: number of the communicator that the ranks have formed, which rises whenever one of them is lost and replaced.
    number: number of the step in the epoch, counted from 1.
    digest: checksum of the arrays that rank 0 computes from this step, see `InputBatch.prepare`.
    ended_slots: [E] int32, slots of the sequences that have left the batch since the last step; applied first.
    new_sequences: [N, 3] int32, (slot, tokens of the prompt, computed tokens) of the sequences that enter.
    rewinds: [X, 2] int32, (slot, computed tokens) of the sequences with fewer computed tokens than were scheduled,
        because draft tokens were rejected.
    retired_blocks: [R] int32, free KV blocks that are given up to save memory: every rank returns their pages to the
        kernel, before it uses new blocks.
    new_blocks: [B, 4] int32, (slot, KV cache group, index in the block table, block id).
    slots: [S] int32, slots of the sequences in this step.
    counts: [S] int32, number of tokens of each sequence.
    num_sampled: [S] int32, for how many tokens of each sequence, its last ones in this step, the logits are computed
        and the next token is sampled: 0 before the end of a prompt, otherwise 1 plus one for each draft token.
    token_ids: [K] int32, all tokens of the sequences in order, without those that ranks hold on the device.
    logprob_indices: [L] int32, indices, among the T tokens, of the prompt tokens whose logits are needed.
    """

    epoch: int
    number: int
    digest: int
    ended_slots: Ints
    new_sequences: Ints
    rewinds: Ints
    retired_blocks: Ints
    new_blocks: Ints
    slots: Ints
    counts: Ints
    num_sampled: Ints
    token_ids: Ints
    logprob_indices: Ints

    @property
    def num_tokens(self) -> int:
        """Returns T, the number of tokens."""
        return int(self.counts.sum())

    def to_bytes(self) -> bytes:
        """Returns the payload of a STEP frame: epoch, number of the step, digest (checksum that all ranks must get when
        they apply the step), the number of rows of each array, the arrays.
        """
        arrays = [getattr(self, name) for name in ARRAYS]
        lengths = np.array([len(array) for array in arrays], np.int32)
        header = HEADER.pack(self.epoch, self.number, self.digest)
        return b"".join((header, lengths.tobytes(), *(array.tobytes() for array in arrays)))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Step":
        """Parses the payload of a STEP frame. Raises ValueError if its length does not match its header."""
        if len(data) < HEADER.size + 4 * len(ARRAYS) or len(data) % 4:
            raise ValueError(f"invalid STEP frame of {len(data)} bytes; allowed: int32 values with a complete header")
        flat = np.frombuffer(data, np.int32, offset=HEADER.size)
        lengths = flat[: len(ARRAYS)].astype(np.int64)
        sizes = lengths * [ROW_SIZES.get(name, 1) for name in ARRAYS]
        if sizes.min() < 0 or sizes.sum() != len(flat) - len(ARRAYS):
            raise ValueError(
                f"invalid STEP frame: it has {len(flat) - len(ARRAYS)} int32 values; its header requires {sizes}"
            )
        parts = np.split(flat[len(ARRAYS) :], np.cumsum(sizes)[:-1])
        arrays: dict[str, Any] = {
            name: part.reshape(-1, ROW_SIZES[name]) if name in ROW_SIZES else part
            for name, part in zip(ARRAYS, parts, strict=True)
        }
        return cls(*HEADER.unpack_from(data), **arrays)


ARRAYS = tuple(field.name for field in fields(Step) if field.name not in ("epoch", "number", "digest"))
