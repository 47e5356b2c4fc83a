"""Records calls of kernels, to replay them with one call from Python (like a CUDA graph on a GPU).

A decode step of a small model calls some 200 kernels. From Python, each call adds several microseconds.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rtp_llm.native.library import REPLAYABLE, SIGNATURES, Library

_FORMATS: dict[type, str] = {ctypes.c_void_p: "<Q", ctypes.c_int64: "<q", ctypes.c_int: "<i", ctypes.c_float: "<f"}
SLOT_BYTES = 8


class Tape:
    """Recorded calls of kernels, in order, which `replay` repeats without running Python between them. The owner of the
    tape must keep the memory to which the arguments of the calls point.

    unrecorded: names of library functions that were called while recording but cannot be replayed.
    is_on_host: True while `call_on_host` runs its function; kernel calls of that function are not recorded.
    """

    def __init__(self, kernels: Library):
        self.unrecorded: set[str] = set()
        self.is_on_host = False
        self._kernels = kernels
        self._parts: list[_Kernels | Callable[[], Any]] = []

    def note(self, name: str, arguments: Sequence[Any]) -> None:
        """Records a call of the library's function `name`, or adds the name to `unrecorded` if that function cannot be
        replayed. Does nothing while `is_on_host`.
        """
        if self.is_on_host:
            return
        if name in REPLAYABLE:
            slots = _pack(arguments, SIGNATURES[name][0])
            self._last_kernels().append(self._kernels.replay_address(name), slots)
        else:
            self.unrecorded.add(name)

    def _last_kernels(self) -> "_Kernels":
        last = self._parts[-1] if self._parts else None
        if not isinstance(last, _Kernels):
            last = _Kernels()
            self._parts.append(last)
        return last

    def call_on_host(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a Python function and returns its result. Each replay calls it again, at the same place among the
        recorded kernel calls.

        For work that is no kernel call of the library, such as a collective, which waits for other ranks and can fail.
        """
        self._parts.append(partial(function, *arguments))
        self.is_on_host = True
        try:
            return function(*arguments)
        finally:
            self.is_on_host = False

    def replay(self) -> None:
        """Repeats all recorded calls of kernels and of Python functions, in order, with the same arguments."""
        for part in self._parts:
            if isinstance(part, _Kernels):
                self._kernels.rtp_replay(part.table, part.num_calls)
            else:
                part()


class _Kernels:
    """Consecutive calls of kernels. table: the `Call`s of src/replay.cpp."""

    def __init__(self) -> None:
        self.table, self.num_calls = b"", 0
        self._slots: list[Any] = []  # keeps the arguments where the table says

    def append(self, function: int, slots: bytes) -> None:
        buffer = ctypes.create_string_buffer(slots)
        self._slots.append(buffer)
        self.table += struct.pack("<QQ", function, ctypes.addressof(buffer))
        self.num_calls += 1


def _pack(arguments: Sequence[Any], types: Sequence[type]) -> bytes:
    packed = (struct.pack(_FORMATS[t], value or 0) for t, value in zip(types, arguments, strict=True))
    return b"".join(slot.ljust(SLOT_BYTES, b"\0") for slot in packed)


_lock = threading.Lock()  # held while the functions of a library are exchanged


@contextmanager
def recording(kernels: Library) -> Iterator[Tape]:
    """Context manager that records this thread's kernel calls. Other threads may use and record kernels meanwhile."""
    tape = Tape(kernels)
    with _lock:
        if not kernels.tapes:
            for name in SIGNATURES:
                setattr(kernels, name, partial(_call, kernels.tapes, name, getattr(kernels, name)))
        kernels.tapes[threading.get_ident()] = tape
    try:
        yield tape
    finally:
        with _lock:
            del kernels.tapes[threading.get_ident()]
            if not kernels.tapes:
                for name in SIGNATURES:
                    setattr(kernels, name, getattr(kernels, name).args[-1])


def _call(tapes: dict[int, Tape], name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    tape = tapes.get(threading.get_ident())
    if tape:
        tape.note(name, arguments)
    return function(*arguments)
