"""Memory that a model needs on one rank, from its ModelSpec. Does not import torch, so the doctor can use it."""

from rtp_llm.contract.kv_cache import ITEM_BYTES
from rtp_llm.model.kv_cache_specs import kv_cache_specs
from rtp_llm.model.spec import ModelSpec
from rtp_llm.parallel.sharding import padded_vocab, shard_heads, shard_mlp

# Bytes of a weight of linear methods that quantize, scales of groups included.
QUANTIZED_BYTES = {"int8": 1, "w8a8": 1, "int4": 0.5625}


def weight_bytes(spec: ModelSpec, tp_size: int) -> int:
    """Returns the size in bytes of the weights on the rank with the largest shard.

    Includes padding of heads and vocabulary; excludes norms and biases (some kilobytes).
    """
    layers = layer_weights(spec, tp_size) * _weight_size(spec, spec.linear_method)
    head_size = _weight_size(spec, spec.head_method)
    has_embedding = not spec.tie_embeddings or spec.head_method != ""  # beside the output head
    embedding_size = ITEM_BYTES[spec.dtype] if has_embedding else 0
    return int(layers + head_weights(spec, tp_size) * (head_size + embedding_size))


def _weight_size(spec: ModelSpec, linear_method: str) -> float:
    return QUANTIZED_BYTES.get(linear_method, ITEM_BYTES[spec.dtype])


def layer_weights(spec: ModelSpec, tp_size: int) -> int:
    """Returns the number of weights (matrix elements) of all layers together, on the rank with the largest shard."""
    return max(_rank_layer_weights(spec, tp_size, rank) for rank in range(tp_size))


def _rank_layer_weights(spec: ModelSpec, tp_size: int, rank: int) -> int:
    heads = shard_heads(spec.num_heads, spec.num_kv_heads, tp_size, rank)
    attention = spec.hidden_size * spec.head_dim * 2 * (heads.num_heads + len(heads.kv_heads))  # q and o, k and v
    mlp = 3 * spec.hidden_size * len(shard_mlp(spec.intermediate_size, tp_size, rank))
    return spec.num_layers * (attention + mlp)


def head_weights(spec: ModelSpec, tp_size: int) -> int:
    """Returns the number of elements in one rank's shard of the output head. The embedding's shard is as large."""
    return padded_vocab(spec.vocab_size, tp_size) // tp_size * spec.hidden_size


def kv_bytes_per_token(spec: ModelSpec, tp_size: int) -> int:
    """Returns the size in bytes of one token in the KV cache, over all layers, on the rank with the most KV heads."""
    return max(
        sum(s.num_bytes for s in kv_cache_specs(spec, tp_size, rank) if not s.per_sequence) for rank in range(tp_size)
    )
