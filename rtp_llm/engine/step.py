"""One step as flat int32 arrays: all that a rank must know to compute it, and the bytes that carry it there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtp_llm.engine.scheduler import Slice

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
    ids: Ints
    positions: Ints
    slots: Ints
    query_starts: Ints
    context_lens: Ints
    prompt_lens: Ints
    tables: Ints
    rows: Ints

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)

    def to_bytes(self) -> bytes:
        sizes = (self.num_tokens, self.num_sequences, self.tables.shape[1], len(self.rows))
        header = np.array((self.epoch, self.number, self.num_decodes, *sizes), dtype=np.int32)
        arrays = (self.ids, self.positions, self.slots, self.query_starts, self.context_lens, self.prompt_lens)
        return b"".join(a.tobytes() for a in (header, *arrays, self.tables, self.rows))

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


def build_step(slices: Sequence[Slice], block_size: int, epoch: int, number: int) -> Step:
    """The step that computes these slices. They must be ordered with decodes (count 1) first: see `decodes_first`."""
    counts = np.array([s.count for s in slices], dtype=np.int32)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    ids, positions, slots, rows = [], [], [], []
    width = max(len(s.request.block_ids) for s in slices)
    tables = np.zeros((len(slices), width), dtype=np.int32)
    for index, piece in enumerate(slices):
        blocks = np.array(piece.request.block_ids, dtype=np.int32)
        place = np.arange(piece.start, piece.start + piece.count, dtype=np.int32)
        tables[index, : len(blocks)] = blocks
        ids.append(np.array(piece.request.tokens[piece.start : piece.start + piece.count], dtype=np.int32))
        positions.append(place)
        slots.append(blocks[place // block_size] * block_size + place % block_size)
        rows.append(wanted_rows(piece) + starts[index])
    return Step(
        epoch=epoch,
        number=number,
        num_decodes=sum(1 for s in slices if s.count == 1),
        ids=np.concatenate(ids),
        positions=np.concatenate(positions),
        slots=np.concatenate(slots),
        query_starts=starts,
        context_lens=np.array([s.start + s.count for s in slices], dtype=np.int32),
        prompt_lens=np.array([s.request.num_prompt for s in slices], dtype=np.int32),
        tables=tables,
        rows=np.concatenate(rows).astype(np.int32),
    )


def decodes_first(slices: Sequence[Slice]) -> list[Slice]:
    """Attention kernels want the sequences with a single query together and in front."""
    return sorted(slices, key=lambda s: s.count != 1)


def wanted_rows(piece: Slice) -> Ints:
    """Offsets within the slice whose logits are wanted: the last token's where it completes, all for prompt
    logprobs.
    """
    if piece.request.wants_prompt_logprobs:
        return np.arange(piece.count, dtype=np.int32)
    return np.arange(piece.count - 1, piece.count if piece.completes else piece.count - 1, dtype=np.int32)
