"""What each kind of attention stores in the KV cache, computed from the ModelSpec. No torch.

The runner's allocation and the doctor use the same functions.
"""

from collections.abc import Callable

from rtp_llm.contract.kv_cache import KVCacheSpec
from rtp_llm.model.spec import ModelSpec
from rtp_llm.parallel.sharding import shard_heads


def kv_cache_specs(spec: ModelSpec, tp_size: int, tp_rank: int) -> list[KVCacheSpec]:
    """Returns the KVCacheSpec of each layer: which tensors the layer stores in the KV cache on the rank `tp_rank`."""
    return [
        KV_CACHE_SPECS[spec.attention_kind(layer)](spec, layer, tp_size, tp_rank) for layer in range(spec.num_layers)
    ]


def _grouped_query_attention(spec: ModelSpec, layer: int, tp_size: int, tp_rank: int) -> KVCacheSpec:
    shape = (len(shard_heads(spec.num_heads, spec.num_kv_heads, tp_size, tp_rank).kv_heads), spec.head_dim)
    return KVCacheSpec((("keys", shape), ("values", shape)), spec.dtype, window=spec.window(layer))


# By the kinds in ModelSpec; arguments: spec, layer, tp_size, tp_rank.
KV_CACHE_SPECS: dict[str, Callable[[ModelSpec, int, int, int], KVCacheSpec]] = {"gqa": _grouped_query_attention}
