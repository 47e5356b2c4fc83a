"""The decoder that a ModelSpec describes: embedding, layers, norm, output head."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from rtp_llm.kernels.attention_backend import AttentionBackend
from rtp_llm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.layers.linear import ParallelLinear
from rtp_llm.layers.norm import ResidualNorm, RMSNorm
from rtp_llm.model.attention import GroupedQueryAttention
from rtp_llm.model.forward_context import Attention, ForwardContext
from rtp_llm.model.mlp import GatedMLP
from rtp_llm.model.spec import ModelSpec, NormPlacement
from rtp_llm.parallel.group import Group

# The modules of a layer, by the kinds in ModelSpec. Their outputs are partial: the layer sums them over the ranks.
ATTENTIONS: dict[str, Callable[[ModelSpec, int, Group, AttentionBackend], nn.Module]] = {"gqa": GroupedQueryAttention}
FFNS: dict[str, Callable[[ModelSpec, int, Group], nn.Module]] = {"gated_mlp": GatedMLP}


class LayerNorms(NamedTuple):
    """Names of the norms of one decoder layer in the checkpoint; "": the model has no norm at this place."""

    before_attention: str
    after_attention: str
    before_ffn: str
    after_ffn: str


LAYER_NORMS: dict[NormPlacement, LayerNorms] = {
    "pre": LayerNorms("input_layernorm", "", "post_attention_layernorm", ""),
    "post": LayerNorms("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "both": LayerNorms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
}


def _make_norm(spec: ModelSpec, layer: int, name: str) -> RMSNorm | None:
    return RMSNorm(f"model.layers.{layer}.{name}", spec.hidden_size, spec.norm_eps) if name else None


class DecoderLayer(nn.Module):
    """Attention and feed-forward network, each followed by all-reduce, residual addition and norms.

    next_norm: the norm after the layer: that of the next layer's input, or the final norm. It is part of this layer so
    that all-reduce, addition and norm are one operation.
    """

    def __init__(self, spec: ModelSpec, layer: int, group: Group, backend: AttentionBackend, next_norm: RMSNorm | None):
        super().__init__()
        names = LAYER_NORMS[spec.norm_placement]
        self.self_attn = ATTENTIONS[spec.attention_kind(layer)](spec, layer, group, backend)
        self.attention_residual = ResidualNorm(
            group, _make_norm(spec, layer, names.after_attention), _make_norm(spec, layer, names.before_ffn)
        )
        self.mlp = FFNS[spec.ffn_kind(layer)](spec, layer, group)
        self.ffn_residual = ResidualNorm(group, _make_norm(spec, layer, names.after_ffn), next_norm)

    def forward(self, x: Tensor, residual: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Returns (x, residual) for the next layer. x: input of this layer's attention, normed if the model has a norm
        there. residual: sum to which this layer adds its outputs. Each is [num_tokens, hidden_size].
        """
        x, residual = self.attention_residual(self.self_attn(x, context), residual)
        x, residual = self.ffn_residual(self.mlp(x), residual)
        return x, residual


class Decoder(nn.Module):
    """A transformer decoder. Computes hidden states with `forward`, and logits of selected tokens with `logits`.

    Its parameters are on the meta device, without memory, until `model.weights.load_weights` loads them.
    """

    def __init__(self, spec: ModelSpec, group: Group, backend: AttentionBackend):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size, group)
        first_name = LAYER_NORMS[spec.norm_placement].before_attention
        norms = [_make_norm(spec, layer, first_name) for layer in range(spec.num_layers)]
        norms.append(RMSNorm("model.norm", spec.hidden_size, spec.norm_eps))
        self.input_norm = norms[0]
        self.layers = nn.ModuleList(
            DecoderLayer(spec, layer, group, backend, norms[layer + 1]) for layer in range(spec.num_layers)
        )
        tied = self.embed_tokens if spec.tie_embeddings else None
        self.lm_head = ParallelLMHead(spec.vocab_size, spec.hidden_size, group, tied, spec.head_method)

    def forward(self, context: ForwardContext) -> Tensor:
        """Returns the hidden states [T, hidden_size] after the last norm, equal on all ranks."""
        return self.run_layers(*self.embed(context), context)

    def embed(self, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Returns (x, residual), the inputs of the first layer, each [T, hidden_size]. residual: the token embeddings.
        x: the same after the layer's input norm, if the model has one.
        """
        residual = self.embed_tokens(context.batch.token_ids)
        return residual if self.input_norm is None else self.input_norm(residual), residual

    def run_layers(self, x: Tensor, residual: Tensor, context: ForwardContext) -> Tensor:
        """Returns the hidden states [T, hidden_size] after the last norm, as `forward` does. x, residual: results of
        `embed`; may be overwritten.
        """
        for layer in self.layers:
            x, residual = layer(x, residual, context)
            context.on_layer()
        return x

    @property
    def attentions(self) -> list[Attention]:
        """Returns the attention modules of all layers, in the order of the layers."""
        return [layer.self_attn for layer in self.layers]  # type: ignore[misc]

    @property
    def batch_invariant(self) -> bool:
        """True if the result of every linear layer for a token is bit-identical whatever other tokens the step has."""
        return all(bool(m.method.batch_invariant) for m in self.modules() if isinstance(m, ParallelLinear))

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Returns logits [num_rows, vocab_size] float32 on rank 0, None on the other ranks.

        hidden: [num_rows, hidden_size], the hidden states of the tokens whose logits are wanted.
        """
        return self.lm_head(hidden)
