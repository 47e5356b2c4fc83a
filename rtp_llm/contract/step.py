"""One step as flat int32 arrays: all that a rank must know to compute it, and the bytes that carry it there."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Step:
    """T tokens of S sequences, decodes first. All arrays int32.

    ids[T], positions[T], slots[T] (block x block_size + offset, where keys and values go); query_starts[S+1] (each
    sequence's tokens are query_starts[i]:query_starts[i+1]); context_lens[S] (tokens it will have in the cache after
    this step); prompt_lens[S]; tables[S, W] (its blocks, padded with 0); rows[R] (tokens whose logits are wanted);
    num_decodes: sequences with one token each.
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
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.seq_lens)

    def to_bytes(self) -> bytes:
        sizes = (self.num_tokens, self.num_sequences, self.block_tables.shape[1], len(self.logits_indices))
        header = np.array((self.epoch, self.number, self.num_decodes, *sizes), dtype=np.int32)
        arrays = (
            self.token_ids,
            self.positions,
            self.slot_mapping,
            self.query_start_loc,
            self.seq_lens,
            self.prompt_lens,
        )
        return b"".join(a.tobytes() for a in (header, *arrays, self.block_tables, self.logits_indices))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Step":
        """Raises ValueError where the length does not fit the header."""
        flat = np.frombuffer(bytearray(data), dtype=np.int32)  # a copy: torch wants memory it may write
        epoch, number, num_decodes, tokens, sequences, width, rows = (int(n) for n in flat[:7])
        lengths = (tokens, tokens, tokens, sequences + 1, sequences, sequences, sequences * width, rows)
        if len(flat) != 7 + sum(lengths):
            raise ValueError(f"step frame has {len(flat)} numbers, its header says {7 + sum(lengths)}")
        ids, positions, slots, starts, contexts, prompts, tables, wanted = np.split(flat[7:], np.cumsum(lengths)[:-1])
        tables = tables.reshape(sequences, width)
        return cls(epoch, number, num_decodes, ids, positions, slots, starts, contexts, prompts, tables, wanted)
