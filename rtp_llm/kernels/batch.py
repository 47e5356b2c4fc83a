"""Input tensors of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int32] | NDArray[np.int64]


def to_tensor(array: Ints, device: torch.device) -> Tensor:
    """Returns integers as int64 on the device."""
    return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(device, non_blocking=True)


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of S sequences. Sequences with one token (decodes) come first.

    token_ids, positions: [T] int64. positions: position of each token in its sequence.
    rope_lens: [T] int64, sequence length that dynamic rope scaling uses for each token, see `layers.rope`.
    query_start_loc: [S + 1] int64; sequence i has the tokens query_start_loc[i]:query_start_loc[i + 1].
    seq_lens: [S] int64, tokens of each sequence in the KV cache after this step.
    slot_mapping: per KV cache group [T] int64, the slot that each token is written to: block id * block_size + offset;
        for a group with one state per sequence [S] int64: the block id of each sequence.
    block_tables: per KV cache group [S, W] int64, block ids in order of position, padded with the null block 0.
    host_query_start_loc, host_seq_lens: copies on the host, which can be read without waiting for the device.
    num_decodes: the first `num_decodes` sequences have one token each.
    """

    token_ids: Tensor
    positions: Tensor
    rope_lens: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    slot_mapping: list[Tensor]
    block_tables: list[Tensor]
    host_query_start_loc: Ints
    host_seq_lens: Ints
    num_decodes: int

    @classmethod
    def build(
        cls,
        *,
        token_ids: Ints,
        query_start_loc: Ints,
        seq_lens: Ints,
        prompt_lens: Ints,
        block_tables: Sequence[Ints],
        block_sizes: Sequence[int],
        device: torch.device,
    ) -> "ForwardBatch":
        """Copies a step to the device. Computes positions and slots: the new tokens are the last ones of each sequence.

        prompt_lens: [S], tokens of each prompt. block_tables: [S, W] per group; block_sizes: of each group, see
        `contract.kv_cache.KVCacheGroup`. The other arguments: see the fields.
        """

        counts = np.diff(query_start_loc)
        sequence = np.repeat(np.arange(len(counts)), counts)  # of each token
        positions = np.arange(len(token_ids)) + (seq_lens - query_start_loc[1:])[sequence]
        rope_lens = np.maximum(prompt_lens[sequence], positions + 1)
        slots = [
            table[sequence, positions // size] * size + positions % size if size else table[:, 0]
            for table, size in zip(block_tables, block_sizes, strict=True)
        ]
        arrays = [token_ids, positions, rope_lens, query_start_loc, seq_lens, *slots, *map(np.ravel, block_tables)]
        # One copy to the device instead of many.
        tensors = to_tensor(np.concatenate(arrays), device).split_with_sizes([array.size for array in arrays])
        first_table = len(tensors) - len(block_tables)
        return cls(
            token_ids=tensors[0],
            positions=tensors[1],
            rope_lens=tensors[2],
            query_start_loc=tensors[3],
            seq_lens=tensors[4],
            slot_mapping=list(tensors[5:first_table]),
            block_tables=[t.view(x.shape) for t, x in zip(tensors[first_table:], block_tables, strict=True)],
            host_query_start_loc=query_start_loc,
            host_seq_lens=seq_lens,
            num_decodes=int(np.argmin(np.append(counts == 1, False))),
        )
