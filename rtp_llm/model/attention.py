"""Attention layers: projections, rotary embedding, and the call of the attention backend."""

from torch import Tensor, nn

from rtp_llm.kernels.batch import AttentionBackend, ForwardBatch, LayerKVCache
from rtp_llm.layers.linear import ColumnParallelLinear, RowParallelLinear, qkv_columns, query_head_slices
from rtp_llm.layers.norm import RMSNorm
from rtp_llm.layers.rope import apply_rotary_emb
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
        self.backend, self.window, self.scale = backend, spec.window(layer), dim**-0.5
        columns = qkv_columns(prefix, heads, dim, spec.num_heads, spec.num_kv_heads)
        out_size = (self.num_heads + 2 * self.num_kv_heads) * dim
        self.qkv_proj = ColumnParallelLinear(spec.hidden_size, out_size, columns, spec.qkv_bias)
        self.o_proj = RowParallelLinear(
            f"{prefix}.o_proj",
            spec.num_heads * dim,
            self.num_heads * dim,
            spec.hidden_size,
            query_head_slices(heads, dim),
            spec.o_bias,
            group,
        )
        self.q_norm = RMSNorm(f"{prefix}.q_norm", dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(f"{prefix}.k_norm", dim, spec.norm_eps) if spec.qk_norm else None

    def forward(self, x: Tensor, batch: ForwardBatch, cache: LayerKVCache, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """x: [num_tokens, hidden_size]. cos_sin: [num_tokens, 1, head_dim / 2] each. Returns the same shape as x."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_emb(q, *cos_sin), apply_rotary_emb(k, *cos_sin)
        out = self.backend(q, k, v, cache, batch, window=self.window, scale=self.scale)
        return self.o_proj(out.flatten(1))
