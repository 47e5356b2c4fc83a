"""The decoder that a ModelSpec describes: embedding, layers, norm, output head."""

from collections.abc import Sequence

from torch import Tensor, nn

from rtp_llm.kernels.batch import AttentionBackend, ForwardBatch, LayerKVCache
from rtp_llm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.layers.linear import PrepackedLinear
from rtp_llm.layers.norm import RMSNorm
from rtp_llm.layers.rope import RotaryEmbedding
from rtp_llm.model.attention import GroupedQueryAttention
from rtp_llm.model.mlp import GatedMLP
from rtp_llm.model.spec import ModelSpec
from rtp_llm.parallel.group import Group
from rtp_llm.parallel.sharding import shard_heads


class DecoderLayer(nn.Module):
    """Attention and MLP with pre-normalization and residual connections."""

    def __init__(self, spec: ModelSpec, layer: int, group: Group, backend: AttentionBackend):
        super().__init__()
        prefix = f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(f"{prefix}.input_layernorm", spec.hidden_size, spec.norm_eps)
        self.self_attn = GroupedQueryAttention(spec, layer, group, backend)
        self.post_attention_layernorm = RMSNorm(f"{prefix}.post_attention_layernorm", spec.hidden_size, spec.norm_eps)
        self.mlp = GatedMLP(spec, layer, group)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        cache: LayerKVCache,
        cos_sin: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """x, residual: [num_tokens, hidden_size]; the residual of the first layer is None.

        Returns (output, residual), both of that shape; the next layer, or the norm after the last layer, adds them.
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

        `caches`: the KV cache of each layer.
        """
        cos_sin = self.rope.cos_sin(batch.positions, batch.rope_lens)
        x, residual = self.embed_tokens(batch.token_ids), None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, batch, cache, cos_sin)
        return self.norm.forward_with_residual(x, residual)[0]

    def prepack(self) -> None:
        """Reorders the loaded weights to oneDNN's layout on CPU, one layer at a time to limit peak memory."""
        for module in self.modules():
            if isinstance(module, PrepackedLinear):
                module.prepack(shared=module is self.lm_head and self.lm_head.weight is self.embed_tokens.weight)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Returns logits [num_rows, vocab_size] float32 on rank 0, None on the other ranks.

        hidden: [num_rows, hidden_size].
        """
        return self.lm_head(hidden)
