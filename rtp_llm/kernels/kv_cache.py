"""KV caches of the layers: named, strided views of one flat buffer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rtp_llm.contract.kv_cache import KVCacheLayout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LayerKVCache:
    """KV cache of one layer on this rank: its tensors by the names in its `KVCacheSpec`.

    A tensor is [num_blocks, block_size, *shape], or [num_blocks, *shape] for a state per sequence, with `shape` from
    the KVCacheSpec. It is not contiguous, since a block also holds other tensors and layers: index it with (block,
    offset), do not flatten it.
    """

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def carve(memory: Tensor, layout: KVCacheLayout) -> list[LayerKVCache]:
    """Returns the KV caches of all layers, as views of `memory`, the KV memory of this rank: [num_blocks, block_bytes]
    uint8, contiguous.
    """
    caches: dict[int, dict[str, Tensor]] = {}
    for group in layout.groups:
        flat, shapes = memory.flatten().view(DTYPES[group.spec.dtype]), dict(group.spec.tensors)
        block_stride = layout.block_bytes // flat.itemsize
        for layer, name, offset in group.tensor_offsets():
            shape = ((group.block_size,) if group.block_size else ()) + shapes[name]
            strides = torch.empty(shape, device="meta").stride()
            caches.setdefault(layer, {})[name] = flat.as_strided(
                (len(memory), *shape), (block_stride, *strides), offset // flat.itemsize
            )
    return [LayerKVCache(caches[layer]) for layer in sorted(caches)]
