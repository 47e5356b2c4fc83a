"""The inputs of all layers in one forward pass, besides the hidden states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from rtp_llm.contract.kv_cache import KVCacheGroup, KVCacheLayout
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.kv_cache import LayerKVCache
from rtp_llm.layers.rope import RotaryEmbedding
from rtp_llm.layers.rope_spec import RopeSpec


class Attention(Protocol):
    """Interface of the attention module of a decoder layer, or of a module in its place, such as a recurrent one.
    `decoder.ATTENTIONS` lists the implementations by name.

    is_capturable: whether a CUDA graph of decodes can be replayed for others, see `AttentionBackend`.
    """

    is_capturable: bool

    def prepare(self, batch: ForwardBatch, index: int, group: KVCacheGroup) -> Any:
        """Returns the attention metadata of a step: what is computed once for all layers of a KV cache group, such as
        indices and masks. index: position of the group among all groups, as in `batch.block_tables`.
        """

    def workspace_bytes(self, group: KVCacheGroup, max_tokens: int, max_seq_len: int) -> int:
        """Returns an upper bound, in bytes, of the memory that a step needs besides the layer's input, its projections
        and the KV cache.

        max_tokens: tokens of the step. max_seq_len: tokens of its longest sequence.
        """

    def __call__(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """x: [T, hidden_size]. Returns this rank's partial result, of the same shape."""


@dataclass(frozen=True)
class ForwardContext:
    """The inputs of one forward pass (a step) that all layers share.

    batch: the tokens and sequences of the step. caches: the KV cache of each layer.
    group_of_layer: the index of each layer's KV cache group.
    metadata: for each KV cache group, what `Attention.prepare` returned, such as indices and masks.
    on_layer: called after each layer, to report progress.
    """

    batch: ForwardBatch
    caches: Sequence[LayerKVCache]
    group_of_layer: Sequence[int]
    metadata: Sequence[Any]
    on_layer: Callable[[], None] = lambda: None
    _rotations: dict[tuple[RopeSpec, int], tuple[RotaryEmbedding, Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        batch: ForwardBatch,
        caches: Sequence[LayerKVCache],
        layout: KVCacheLayout,
        attentions: Sequence[Attention],
        on_layer: Callable[[], None] = lambda: None,
    ) -> "ForwardContext":
        """Returns the context of a step.

        attentions: the attention module of each layer. That of the first layer of each KV cache group prepares the
        metadata of the group.
        """
        metadata = [attentions[group.layers[0]].prepare(batch, i, group) for i, group in enumerate(layout.groups)]
        return cls(batch, caches, layout.group_of_layer, metadata, on_layer)

    def metadata_of(self, layer: int) -> Any:
        """Returns the attention metadata of the layer's KV cache group: what `Attention.prepare` returned."""
        return self.metadata[self.group_of_layer[layer]]

    def cos_sin(self, rope: RotaryEmbedding) -> tuple[Tensor, Tensor]:
        """Returns (cos, sin) of the step's positions, each [T, 1, head_dim / 2]; cached per rotary embedding."""
        key = (rope.spec, rope.head_dim)
        if key not in self._rotations:
            self._rotations[key] = rope, *rope.cos_sin(self.batch.positions, self.batch.rope_lens)
        return self._rotations[key][1:]

    @property
    def ropes(self) -> list[RotaryEmbedding]:
        """Returns the rotary embeddings for which a layer has called `cos_sin` in this step.

        `runner.recorded_steps` records the kernel calls of a step to replay them, like a CUDA graph. Before it records,
        it computes the cosines and sines of these rotary embeddings, so that they are not part of the recording.
        """
        return [rope for rope, *_ in self._rotations.values()]

    def update(self, newer: "ForwardContext") -> None:
        """Copies the attention metadata, cosines and sines of another step into the tensors of this context.

        The tensors keep their addresses, so that a recording of kernel calls, like a CUDA graph, can be replayed for
        the other step. Both steps must have the same number of tokens, and their metadata a method `update`.
        """
        for metadata, newer_metadata in zip(self.metadata, newer.metadata, strict=True):
            metadata.update(newer_metadata)
        for rope, *tensors in self._rotations.values():
            for tensor, newer_tensor in zip(tensors, newer.cos_sin(rope), strict=True):
                tensor.copy_(newer_tensor)
