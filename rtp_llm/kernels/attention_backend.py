"""The interface of attention backends."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rtp_llm.contract.kv_cache import KVCacheSpec
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.kv_cache import LayerKVCache


@dataclass(frozen=True)
class AttentionParams:
    """Constants of one attention layer; its sliding window is in the KVCacheSpec.

    scale: factor of the attention scores before the softmax, usually 1 / sqrt(head_dim).
    """

    scale: float


class AttentionBackend(Protocol):
    """Paged causal attention. `prepare` computes, once per step and KV cache group (layers with equal KVCacheSpecs),
    what all layers of the group need; then `forward` computes each layer.

    batch_invariant: whether the bits of a token's result depend neither on how its prompt is cut into chunks nor on the
        other sequences of the step.
    is_capturable: whether a CUDA graph of decodes can be replayed for other decodes: `prepare` and `forward` launch the
        same work on the same tensors for all batches with the same number of decodes and the same longest of
        `host_seq_lens`, which may be larger than those on the device.
    """

    batch_invariant: bool
    is_capturable: bool

    def prepare(self, batch: ForwardBatch, group: int, spec: KVCacheSpec, block_size: int) -> Any:
        """Returns the metadata that `forward` needs for the layers of this group, such as indices and masks on the
        device.

        group: index into `batch.block_tables`. spec, block_size: of this group, see `contract.kv_cache.KVCacheGroup`.
        """
        ...

    def forward(
        self, layer: AttentionParams, q: Tensor, k: Tensor, v: Tensor, cache: LayerKVCache, metadata: Any
    ) -> Tensor:
        """Writes k and v to the cache, to the slots of the batch given to `prepare`, then returns the attention output.

        q: [T, heads, head_dim], T as in ForwardBatch; head j attends to KV head j // (heads / kv_heads).
        k, v: [T, kv_heads, head_dim]. heads, kv_heads: numbers of heads on this rank.
        cache: has the tensors `keys` and `values`. A query attends to the newest `KVCacheSpec.window` keys up to its
            own position; if the window is 0, to all of them. metadata: what `prepare` returned for the layer's group.
        Returns [T, heads, head_dim]. Never waits for the device.
        """
        ...

    def workspace_bytes(self, spec: KVCacheSpec, num_heads: int, max_tokens: int, max_seq_len: int) -> int:
        """Returns an upper bound, in bytes, of the memory that metadata and `forward` need besides q, k, v and the
        cache.

        num_heads: query heads on this rank. max_tokens: tokens of a step. max_seq_len: tokens of a sequence.
        """
        ...


def has_keys_and_values(spec: KVCacheSpec, max_head_dim: int) -> bool:
    """Returns whether a KV cache has the tensors `keys` and `values` of equal shapes, and nothing else, with at most
    `max_head_dim` numbers per head.
    """
    shapes = dict(spec.tensors)
    if shapes.keys() != {"keys", "values"} or shapes["keys"] != shapes["values"]:
        return False
    return shapes["keys"][1] <= max_head_dim


def with_adjacent_heads(x: Tensor) -> Tensor:
    """Returns x [T, heads, head_dim], copied unless the heads of a token are adjacent."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
