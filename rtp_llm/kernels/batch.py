"""Input tensors of the forward pass, and the interface of attention backends."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rtp_llm.contract.step import Step


@dataclass(frozen=True)
class ForwardBatch:
    """A step copied to the device. The docstring of `contract.step.Step` defines T, S, R, W and the fields.

    rope_lens: sequence length that dynamic rope scaling uses for each token, see `layers.rope`.
    cpu_step: the original step; reading a size from it does not wait for the device.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64
    query_start_loc: Tensor  # [S + 1] int64
    seq_lens: Tensor  # [S] int64
    rope_lens: Tensor  # [T] int64
    block_tables: Tensor  # [S, W] int64
    logits_indices: Tensor  # [R] int64
    cpu_step: Step

    @classmethod
    def from_step(cls, step: Step, device: torch.device) -> "ForwardBatch":
        """Returns the batch of a step, with its arrays on the device."""

        def to_device(array: object) -> Tensor:
            return torch.as_tensor(array).to(device=device, dtype=torch.int64, non_blocking=True)

        counts = step.query_start_loc[1:] - step.query_start_loc[:-1]
        rope_lens = torch.maximum(torch.as_tensor(step.prompt_lens.repeat(counts)), torch.as_tensor(step.positions + 1))
        return cls(
            token_ids=to_device(step.token_ids),
            positions=to_device(step.positions),
            slot_mapping=to_device(step.slot_mapping),
            query_start_loc=to_device(step.query_start_loc),
            seq_lens=to_device(step.seq_lens),
            rope_lens=to_device(rope_lens),
            block_tables=to_device(step.block_tables),
            logits_indices=to_device(step.logits_indices),
            cpu_step=step,
        )


@dataclass(frozen=True)
class LayerKVCache:
    """KV cache of one layer on this rank, in the model's dtype. kv_heads: number of KV heads of this rank."""

    keys: Tensor  # [num_blocks, block_size, kv_heads, head_dim]
    values: Tensor  # [num_blocks, block_size, kv_heads, head_dim]


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
        """Writes key and value to the cache (`batch.slot_mapping`), then returns the attention output.

        query: [T, heads, head_dim], T tokens in the step; head j attends to KV head j // (heads / kv_heads).
        key, value: [T, kv_heads, head_dim]. heads, kv_heads: numbers of heads on this rank.
        window: a query attends to the newest `window` keys up to its own position; 0: to all of them.
        scale: factor of the attention scores.
        Returns [T, heads, head_dim].
        """
        ...
