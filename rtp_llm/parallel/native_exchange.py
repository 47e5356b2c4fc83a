"""Collectives on a shared-memory segment with the kernels of `rtp_llm.native`."""

import ctypes

import torch
from torch import Tensor

from rtp_llm.native.library import DTYPE_CODES, Library
from rtp_llm.parallel.segment import COUNTER_BYTES, SLOT_BYTES


class GroupState(ctypes.Structure):
    """The C struct `GroupState` of all_reduce.cpp as a ctypes structure: one rank's view of the shared-memory segment,
    its counters, timeout and abort flag.
    """

    _fields_ = (
        ("segment", ctypes.c_void_p),
        ("counter_bytes", ctypes.c_int64),
        ("slot_bytes", ctypes.c_int64),
        ("sequence", ctypes.c_int64),
        ("operation", ctypes.c_int64),
        ("timeout", ctypes.c_double),
        ("wait_seconds", ctypes.c_double),
        ("rank", ctypes.c_int),
        ("size", ctypes.c_int),
        ("is_aborted", ctypes.c_int),
    )


class NativeExchange:
    """Implements `shared_memory.Exchange` with kernels in C++.

    Large sums (from some KiB on) are split: each rank sums one chunk for all ranks, so that the bytes that a rank reads
    do not grow with the number of ranks. The kernels order their memory accesses with atomic operations, so they also
    work on processors that reorder stores, such as Arm.
    """

    def __init__(self, kernels: Library, memory: Tensor, rank: int, size: int, timeout: float):
        """`memory`: the segment, uint8."""
        self._kernels, self._memory = kernels, memory
        self._state = GroupState(memory.data_ptr(), COUNTER_BYTES, SLOT_BYTES, 0, 0, timeout, 0.0, rank, size, 0)
        self._address = ctypes.addressof(self._state)

    @property
    def wait_seconds(self) -> float:
        return float(self._state.wait_seconds)

    @property
    def sequence(self) -> int:
        return int(self._state.sequence)

    def abort(self) -> None:
        self._state.is_aborted = 1

    def all_reduce(self, tensor: Tensor) -> bool:
        return bool(
            self._kernels.rtp_all_reduce(
                self._address,
                DTYPE_CODES[str(tensor.dtype)],
                tensor.data_ptr(),
                tensor.numel(),
                torch.get_num_threads(),
            )
        )

    def gather(self, tensor: Tensor, gathered: Tensor | None) -> bool:
        target = None if gathered is None else gathered.data_ptr()
        return bool(self._kernels.rtp_gather(self._address, tensor.data_ptr(), target, tensor.nbytes))

    def broadcast(self, tensor: Tensor) -> bool:
        return bool(self._kernels.rtp_broadcast(self._address, tensor.data_ptr(), tensor.nbytes))
