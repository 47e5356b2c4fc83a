"""Paged attention on CPU with the kernels of `rtp_llm.native`."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from rtp_llm.contract.kv_cache import KVCacheSpec
from rtp_llm.kernels.attention_backend import AttentionParams, has_keys_and_values, with_adjacent_heads
from rtp_llm.kernels.batch import ForwardBatch
from rtp_llm.kernels.kv_cache import DTYPES, LayerKVCache
from rtp_llm.native.library import DTYPE_CODES, Library, library

MAX_HEAD_DIM = 256
PARTIAL_BYTES = 16 << 20  # for the splits of long contexts that several threads compute; with less, one thread does


class Step(ctypes.Structure):
    """A step as the attention kernels get it: the C struct `AttentionStep` of src/attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query_start_loc", "seq_lens", "block_tables", "slots")),
        *((name, ctypes.c_int64) for name in ("num_sequences", "num_tokens", "table_width", "block_size", "window")),
        *((name, ctypes.c_int64) for name in ("kv_heads", "head_dim", "heads")),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


@dataclass
class NativeMetadata:
    """One step for the attention kernels: the C struct `Step`, and the tensors that it points to."""

    step: Step
    tensors: tuple[Tensor, ...]

    def update(self, newer: "NativeMetadata") -> None:
        """Points the struct, at the same address, to the tensors of another step with as many tokens. So recorded
        kernel calls, which hold that address, can be replayed for the other step.
        """
        for name in ("query_start_loc", "seq_lens", "block_tables", "slots", "num_sequences", "table_width"):
            setattr(self.step, name, getattr(newer.step, name))
        self.tensors = newer.tensors


class NativeBackend:
    """Implements `AttentionBackend` with kernels in C++ for CPUs. The bits of a row (the result for one token) depend
    neither on the number of threads nor on the block size.
    """

    batch_invariant = True
    is_capturable = False

    def __init__(self) -> None:
        kernels = library()
        assert kernels, "is_supported comes first"
        self._library: Library = kernels
        self._workspaces: dict[tuple[int, ...], Tensor] = {}

    @staticmethod
    def is_supported(spec: KVCacheSpec) -> bool:
        """Returns whether this machine has kernels for a KV cache with these tensors, see `has_keys_and_values`."""
        return library() is not None and has_keys_and_values(spec, MAX_HEAD_DIM)

    def prepare(self, batch: ForwardBatch, group: int, spec: KVCacheSpec, block_size: int) -> NativeMetadata:
        """Returns the metadata of a step: a struct that points to the tensors of the batch, see `AttentionBackend`."""
        kv_heads, head_dim = spec.tensors[0][1]
        tensors = (batch.query_start_loc, batch.seq_lens, batch.block_tables[group], batch.slot_mapping[group])
        table = batch.block_tables[group]
        assert all(tensor.is_contiguous() for tensor in tensors)
        sizes = len(batch.seq_lens), len(batch.token_ids), table.shape[1], block_size, spec.window, kv_heads, head_dim
        return NativeMetadata(Step(*(tensor.data_ptr() for tensor in tensors), *sizes), tensors)

    def forward(
        self, layer: AttentionParams, q: Tensor, k: Tensor, v: Tensor, cache: LayerKVCache, metadata: NativeMetadata
    ) -> Tensor:
        """Writes the new keys and values, then returns the attention output, see `AttentionBackend`."""
        q, k, v = with_adjacent_heads(q), with_adjacent_heads(k), with_adjacent_heads(v)
        keys, values, step = cache["keys"], cache["values"], metadata.step
        assert keys.stride() == values.stride()
        if not step.workspace:
            self._add_workspace(step, q.shape[1], torch.get_num_threads())
        out = torch.empty(q.shape, dtype=q.dtype)
        self._library.rtp_attention(
            DTYPE_CODES[str(q.dtype)],
            ctypes.addressof(step),
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
            layer.scale,
            out.data_ptr(),
        )
        return out

    def workspace_bytes(self, spec: KVCacheSpec, num_heads: int, max_tokens: int, max_seq_len: int) -> int:
        """Returns an upper bound of the memory that `forward` needs, in bytes, see `AttentionBackend`."""
        kv_heads, head_dim = spec.tensors[0][1]
        out_bytes = max_tokens * num_heads * head_dim * DTYPES[spec.dtype].itemsize
        return (
            self._buffer_bytes(num_heads, kv_heads, head_dim, torch.get_num_threads()) + 4 * out_bytes
        )  # q, k and v may be copied

    def _buffer_bytes(self, num_heads: int, kv_heads: int, head_dim: int, threads: int) -> int:
        return threads * int(self._library.rtp_attention_scratch_bytes(num_heads, kv_heads, head_dim)) + PARTIAL_BYTES

    def _add_workspace(self, step: Step, num_heads: int, threads: int) -> None:
        """Adds the memory that the threads need, which is kept for the next steps."""
        key = num_heads, step.kv_heads, step.head_dim, threads
        if key not in self._workspaces:
            self._workspaces[key] = torch.empty(self._buffer_bytes(*key), dtype=torch.uint8)
        memory = self._workspaces[key]
        fields = {
            "heads": num_heads,
            "threads": threads,
            "workspace": memory.data_ptr(),
            "workspace_bytes": len(memory),
        }
        for name, value in fields.items():
            setattr(step, name, value)
