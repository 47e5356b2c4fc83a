"""A step's tensors on the device, and the interface of every attention backend."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rtp_llm.engine.step import Step


@dataclass(frozen=True)
class Batch:
    """`engine.step.Step` on the device. T tokens of S sequences, decodes first; `host` keeps the numbers that shape
    the launch.
    """

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    query_starts: Tensor  # [S + 1] int64
    context_lens: Tensor  # [S] int64
    rope_lens: Tensor  # [T] int64, length that dynamic rope scaling goes by: see layers.rope
    tables: Tensor  # [S, W] int64
    rows: Tensor  # [R] int64
    host: Step

    @classmethod
    def from_step(cls, step: Step, device: torch.device) -> "Batch":
        def move(array: object) -> Tensor:
            return torch.as_tensor(array).to(device=device, dtype=torch.int64, non_blocking=True)

        counts = step.query_starts[1:] - step.query_starts[:-1]
        rope_lens = torch.maximum(torch.as_tensor(step.prompt_lens.repeat(counts)), torch.as_tensor(step.positions + 1))
        return cls(
            ids=move(step.ids),
            positions=move(step.positions),
            slots=move(step.slots),
            query_starts=move(step.query_starts),
            context_lens=move(step.context_lens),
            rope_lens=move(rope_lens),
            tables=move(step.tables),
            rows=move(step.rows),
            host=step,
        )


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer: [num_blocks, block_size, kv_heads, head_dim] each, in the model's dtype."""

    keys: Tensor
    values: Tensor


class AttentionBackend(Protocol):
    """Paged causal attention for one layer of one step."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, batch: Batch, *, window: int, scale: float
    ) -> Tensor:
        """Writes key and value [T, kv_heads, head_dim] to the batch's slots, then attends.

        query [T, heads, head_dim]; head j uses KV head j // (heads / kv_heads); `window` > 0 limits each query to that
        many newest keys, its own included. Returns [T, heads, head_dim].
        """
        ...
