"""A step's tensors on the device, and the interface of every attention backend."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rtp_llm.contract.step import Step


@dataclass(frozen=True)
class ForwardBatch:
    """`contract.step.Step` on the device. T tokens of S sequences, decodes first; `host` keeps the numbers that shape
    the launch.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64
    query_start_loc: Tensor  # [S + 1] int64
    seq_lens: Tensor  # [S] int64
    rope_lens: Tensor  # [T] int64, length that dynamic rope scaling goes by: see layers.rope
    block_tables: Tensor  # [S, W] int64
    logits_indices: Tensor  # [R] int64
    cpu_step: Step

    @classmethod
    def from_step(cls, step: Step, device: torch.device) -> "ForwardBatch":
        def move(array: object) -> Tensor:
            return torch.as_tensor(array).to(device=device, dtype=torch.int64, non_blocking=True)

        counts = step.query_start_loc[1:] - step.query_start_loc[:-1]
        rope_lens = torch.maximum(torch.as_tensor(step.prompt_lens.repeat(counts)), torch.as_tensor(step.positions + 1))
        return cls(
            token_ids=move(step.token_ids),
            positions=move(step.positions),
            slot_mapping=move(step.slot_mapping),
            query_start_loc=move(step.query_start_loc),
            seq_lens=move(step.seq_lens),
            rope_lens=move(rope_lens),
            block_tables=move(step.block_tables),
            logits_indices=move(step.logits_indices),
            cpu_step=step,
        )


@dataclass(frozen=True)
class LayerKVCache:
    """Keys and values of one layer: [num_blocks, block_size, kv_heads, head_dim] each, in the model's dtype."""

    keys: Tensor
    values: Tensor


class AttentionBackend(Protocol):
    """Paged causal attention for one layer of one step."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: LayerKVCache,
        batch: ForwardBatch,
        *,
        window: int,
        scale: float,
    ) -> Tensor:
        """Writes key and value [T, kv_heads, head_dim] to the batch's slots, then attends.

        query [T, heads, head_dim]; head j uses KV head j // (heads / kv_heads); `window` > 0 limits each query to that
        many newest keys, its own included. Returns [T, heads, head_dim].
        """
        ...
