"""The decoder that a ModelSpec describes: embedding, layers, norm, output head."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import silu

from rtp_llm.kernels.batch import AttentionBackend, ForwardBatch, LayerKVCache
from rtp_llm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.layers.linear import (
    ColumnParallelLinear,
    PrepackedLinear,
    RowParallelLinear,
    merged_columns,
    qkv_columns,
    query_head_slices,
)
from rtp_llm.layers.norm import RMSNorm
from rtp_llm.layers.rope import RotaryEmbedding, apply_rotary_emb
from rtp_llm.model.spec import ModelSpec
from rtp_llm.parallel.group import Group
from rtp_llm.parallel.sharding import shard_heads, shard_mlp


class Attention(nn.Module):
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


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) over this rank's columns."""

    def __init__(self, spec: ModelSpec, layer: int, group: Group):
        super().__init__()
        prefix, full_size = f"model.layers.{layer}.mlp", spec.intermediate_size
        shard = shard_mlp(full_size, group.size, group.rank)
        columns = merged_columns([f"{prefix}.gate_proj", f"{prefix}.up_proj"], full_size, shard)
        self.gate_up_proj = ColumnParallelLinear(spec.hidden_size, 2 * len(shard), columns, spec.mlp_bias)
        self.down_proj = RowParallelLinear(
            f"{prefix}.down_proj",
            full_size,
            len(shard),
            spec.hidden_size,
            [(shard, range(len(shard)))],
            spec.mlp_bias,
            group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size]. Returns the same shape."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and MLP with pre-normalization and residual connections."""

    def __init__(self, spec: ModelSpec, layer: int, group: Group, backend: AttentionBackend):
        super().__init__()
        prefix = f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(f"{prefix}.input_layernorm", spec.hidden_size, spec.norm_eps)
        self.self_attn = Attention(spec, layer, group, backend)
        self.post_attention_layernorm = RMSNorm(f"{prefix}.post_attention_layernorm", spec.hidden_size, spec.norm_eps)
        self.mlp = MLP(spec, layer, group)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        cache: LayerKVCache,
        cos_sin: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """x, residual: [num_tokens, hidden_size]; the residual of the first layer is None.

        Returns (output, residual) of the same shape; the next layer or the last norm adds them.
        """
        x, residual = self.input_layernorm.forward_with_residual(x, residual)
        x = self.self_attn(x, batch, cache, cos_sin)
        x, residual = self.post_attention_layernorm.forward_with_residual(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Computes hidden states with `forward`, and logits of selected tokens with `logits`."""

    def __init__(self, spec: ModelSpec, group: Group, backend: AttentionBackend):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size, group)
        self.layers = nn.ModuleList(DecoderLayer(spec, i, group, backend) for i in range(spec.num_layers))
        self.norm = RMSNorm("model.norm", spec.hidden_size, spec.norm_eps)
        self.local_kv_heads = len(shard_heads(spec.num_heads, spec.num_kv_heads, group.size, group.rank).kv_heads)
        tied_weight = self.embed_tokens.weight if spec.tie_embeddings else None
        self.lm_head = ParallelLMHead(spec.vocab_size, spec.hidden_size, group, tied_weight)
        weight = self.norm.weight
        self.rope = RotaryEmbedding(spec.rope, spec.head_dim, weight.device, weight.dtype)

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerKVCache]) -> Tensor:
        """Returns the hidden states [num_tokens, hidden_size] after the last norm, equal on all ranks.

        `caches`: one per layer.
        """
        cos_sin = self.rope.cos_sin(batch.positions, batch.rope_lens)
        x, residual = self.embed_tokens(batch.token_ids), None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, batch, cache, cos_sin)
        return self.norm.forward_with_residual(x, residual)[0]

    def prepack(self) -> None:
        """Prepacks the weights after loading, one layer at a time to limit peak memory."""
        for module in self.modules():
            if isinstance(module, PrepackedLinear):
                module.prepack(shared=module is self.lm_head and self.lm_head.weight is self.embed_tokens.weight)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Returns logits [num_rows, vocab_size] float32 on rank 0, None on the other ranks.

        hidden: [num_rows, hidden_size].
        """
        return self.lm_head(hidden)
