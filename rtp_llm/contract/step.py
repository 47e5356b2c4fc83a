"""Input of one forward step as int32 arrays. Rank 0 broadcasts it to the other ranks as one frame."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
NUM_HEADER_FIELDS = 7


@dataclass(frozen=True)
class Step:
    """T tokens of S sequences; the logits of R of the tokens are needed. Sequences with one token (decodes) come first.

    W is the largest number of KV blocks of a sequence.

    epoch: number that rises with every restart of all ranks.
    number: of the step in the epoch, counted from 1; the warm-up step has 0.
    num_decodes: the first `num_decodes` sequences have one token each.
    token_ids: [T] int32.
    positions: [T] int32, of each token in its sequence.
    slot_mapping: [T] int32, KV cache slot that each token is written to: block id * block_size + offset in the block.
    query_start_loc: [S + 1] int32; sequence i has the tokens query_start_loc[i]:query_start_loc[i + 1].
    seq_lens: [S] int32, tokens of each sequence in the KV cache after this step.
    prompt_lens: [S] int32, tokens of each prompt.
    block_tables: [S, W] int32, KV block ids of each sequence in order of position, padded with 0.
    logits_indices: [R] int32, indices into T of the tokens whose logits are needed.
    """

    epoch: int
    number: int
    num_decodes: int
    token_ids: Ints
    positions: Ints
    slot_mapping: Ints
    query_start_loc: Ints
    seq_lens: Ints
    prompt_lens: Ints
    block_tables: Ints
    logits_indices: Ints

    @property
    def num_tokens(self) -> int:
        """Returns T, the number of tokens."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """Returns S, the number of sequences."""
        return len(self.seq_lens)

    def to_bytes(self) -> bytes:
        """Returns the payload of the frame that rank 0 broadcasts, in int32.

        A header (epoch, number, num_decodes, T, S, W, R) precedes the arrays; `Step` defines the letters.
        """
        sizes = (self.num_tokens, self.num_sequences, self.block_tables.shape[1], len(self.logits_indices))
        header = np.array((self.epoch, self.number, self.num_decodes, *sizes), dtype=np.int32)
        arrays = (
            header,
            self.token_ids,
            self.positions,
            self.slot_mapping,
            self.query_start_loc,
            self.seq_lens,
            self.prompt_lens,
            self.block_tables,
            self.logits_indices,
        )
        return b"".join(array.tobytes() for array in arrays)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Step":
        """Builds a step from the bytes that `to_bytes` returned. Raises ValueError if header and length disagree."""
        flat = np.frombuffer(bytearray(data), dtype=np.int32)  # a copy, because torch requires writable memory
        epoch, number, num_decodes, num_tokens, num_sequences, width, num_logits = (
            int(n) for n in flat[:NUM_HEADER_FIELDS]
        )
        lengths = (
            num_tokens,  # token_ids
            num_tokens,  # positions
            num_tokens,  # slot_mapping
            num_sequences + 1,  # query_start_loc
            num_sequences,  # seq_lens
            num_sequences,  # prompt_lens
            num_sequences * width,  # block_tables
            num_logits,  # logits_indices
        )
        frame_length = NUM_HEADER_FIELDS + sum(lengths)
        if len(flat) != frame_length or min(lengths) < 0:
            raise ValueError(
                f"step frame has {len(flat)} int32 values; its header requires {frame_length}, with arrays of {lengths}"
            )
        (
            token_ids,
            positions,
            slot_mapping,
            query_start_loc,
            seq_lens,
            prompt_lens,
            block_tables,
            logits_indices,
        ) = np.split(flat[NUM_HEADER_FIELDS:], np.cumsum(lengths)[:-1])
        return cls(
            epoch,
            number,
            num_decodes,
            token_ids,
            positions,
            slot_mapping,
            query_start_loc,
            seq_lens,
            prompt_lens,
            block_tables.reshape(num_sequences, width),
            logits_indices,
        )
