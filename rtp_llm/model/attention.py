"""Attention layers: projections, rotary embedding, and the attention backend."""

from typing import Any

import torch
from torch import Tensor, nn

from rtp_llm.contract.kv_cache import KVCacheGroup
from rtp_llm.kernels.attention_backend import AttentionBackend, AttentionParams
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.ops import norm_rope
from rtp_llm.layers.linear import ColumnParallelLinear, RowParallelLinear, qkv_columns, query_head_slices
from rtp_llm.layers.norm import RMSNorm
from rtp_llm.layers.rope import RotaryEmbedding
from rtp_llm.model.forward_context import ForwardContext
from rtp_llm.model.spec import ModelSpec
from rtp_llm.parallel.group import Group
from rtp_llm.parallel.sharding import shard_heads


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention over this rank's heads."""

    def __init__(self, spec: ModelSpec, layer: int, group: Group, backend: AttentionBackend):
        super().__init__()
        prefix, dim = f"model.layers.{layer}.self_attn", spec.head_dim
        heads = shard_heads(spec.num_heads, spec.num_kv_heads, group.size, group.rank)
        self.num_heads, self.num_kv_heads, self.head_dim = heads.num_heads, len(heads.kv_heads), dim
        self.layer, self.backend, self.params = layer, backend, AttentionParams(scale=dim**-0.5)
        self.is_capturable = backend.is_capturable
        rope = spec.layer_rope(layer)
        self.rope = RotaryEmbedding(rope, dim, torch.get_default_device(), torch.get_default_dtype()) if rope else None
        columns = qkv_columns(prefix, heads, dim, spec.num_heads, spec.num_kv_heads)
        out_size = (self.num_heads + 2 * self.num_kv_heads) * dim
        self.qkv_proj = ColumnParallelLinear(spec.hidden_size, out_size, columns, spec.qkv_bias, spec.linear_method)
        self.o_proj = RowParallelLinear(
            f"{prefix}.o_proj",
            spec.num_heads * dim,
            self.num_heads * dim,
            spec.hidden_size,
            query_head_slices(heads, dim),
            spec.o_bias and group.rank == 0,
            spec.linear_method,
        )
        self.norm_eps = spec.norm_eps
        self.q_norm = RMSNorm(f"{prefix}.q_norm", dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(f"{prefix}.k_norm", dim, spec.norm_eps) if spec.qk_norm else None

    def prepare(self, batch: ForwardBatch, index: int, group: KVCacheGroup) -> Any:
        """Returns what the attention backend computes once per step for all layers of a KV cache group, such as indices
        and masks. `index`: position of the group among all groups, as in `batch.block_tables`.
        """
        return self.backend.prepare(batch, index, group.spec, group.block_size)

    def workspace_bytes(self, group: KVCacheGroup, max_tokens: int, max_seq_len: int) -> int:
        """Returns an upper bound, in bytes, of the memory that the attention backend needs in a step besides queries,
        keys, values and the KV cache.

        max_tokens: tokens of the step. max_seq_len: tokens of its longest sequence.
        """
        return self.backend.workspace_bytes(group.spec, self.num_heads, max_tokens, max_seq_len)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Returns this rank's partial result, [T, hidden_size]; the sum over all ranks is the output. x: the input [T,
        hidden_size], equal on all ranks.
        """
        norms = (self.q_norm.weight, self.k_norm.weight) if self.q_norm and self.k_norm else None
        cos_sin = context.cos_sin(self.rope) if self.rope else None
        q, k, v = norm_rope(self.qkv_proj(x), self.num_heads, self.num_kv_heads, norms, self.norm_eps, cos_sin)
        cache, metadata = context.caches[self.layer], context.metadata_of(self.layer)
        return self.o_proj(self.backend.forward(self.params, q, k, v, cache, metadata).flatten(1))
