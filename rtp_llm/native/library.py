"""Loads the kernels of the best level that this CPU supports."""

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

from rtp_llm.errors import ConfigError
from rtp_llm.native.build import library_path
from rtp_llm.native.levels import levels, supported_levels

log = logging.getLogger(__name__)

# `Dtype` of native.h, by str(torch.dtype).
DTYPE_CODES = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_QUANTIZED_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "packed_bytes": ([_INT, _SIZE, _SIZE, _INT], _SIZE),
    "pack": ([_INT, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _INT, _INT], None),
    "linear": (
        [_INT, _INT, _POINTER, _SIZE, _POINTER, _POINTER, _POINTER, *[_SIZE] * 4, _INT, _INT],
        None,
    ),
}
# Argument types and result type of each function; see the sources for what they mean.
SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "rtp_level": ([], ctypes.c_char_p),
    **{
        f"rtp_{scheme}_{name}": signature
        for scheme in ("int8", "w8a8", "int4")
        for name, signature in _QUANTIZED_SIGNATURES.items()
    },
    "rtp_linear_start": ([ctypes.POINTER(_INT)], _INT),
    "rtp_linear_packed_bytes": ([_INT, _INT, _SIZE, _SIZE], _SIZE),
    "rtp_linear_pack": ([_INT, _INT, _POINTER, _POINTER, _SIZE, _SIZE, _INT], None),
    "rtp_linear": (
        [*[_INT] * 3, _POINTER, _SIZE, _POINTER, _POINTER, _POINTER, *[_SIZE] * 4, _INT],
        None,
    ),
    "rtp_rms_norm": ([_INT, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _INT], None),
    "rtp_add_rms_norm": ([_INT, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT, _INT], None),
    "rtp_norm_rope": (
        [_INT, _POINTER, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _FLOAT, _INT],
        None,
    ),
    "rtp_all_reduce": ([_POINTER, _INT, _POINTER, _SIZE, _INT], _INT),
    "rtp_gather": ([_POINTER, _POINTER, _POINTER, _SIZE], _INT),
    "rtp_broadcast": ([_POINTER, _POINTER, _SIZE], _INT),
    "rtp_argmax_allowed": ([_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _INT], None),
    "rtp_mask_logits": ([_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _INT], None),
    "rtp_argmax_finite": ([_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _INT], None),
    "rtp_replay": ([ctypes.c_char_p, _SIZE], None),
    "rtp_top_tokens": (
        [_POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER, _INT],
        None,
    ),
    "rtp_sample_by_id": ([_POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _INT], None),
    "rtp_attention_scratch_bytes": ([_SIZE, _SIZE, _SIZE], _SIZE),
    "rtp_attention": (
        [_INT, _POINTER, *(_POINTER, _SIZE) * 3, _POINTER, _POINTER, _SIZE, _FLOAT, _POINTER],
        None,
    ),
}
# The functions that a `tape.Tape` records; src/replay.h gives each a second one.
REPLAYABLE = {
    *("rtp_linear", "rtp_int8_linear", "rtp_w8a8_linear", "rtp_int4_linear"),
    *("rtp_rms_norm", "rtp_add_rms_norm", "rtp_norm_rope", "rtp_attention"),
}


class Library(ctypes.CDLL):
    """The kernel functions compiled for one instruction set (a level). They release the GIL. They do not check their
    arguments.

    level: name of the instruction set. path: the shared library. is_right: whether its matrix products were correct in
    a short test on this CPU when it was loaded. has_amx: whether it uses AMX for matrix products in bf16.
    """

    def __init__(self, level: str, path: Path):
        super().__init__(str(path))
        self.level = level
        self.tapes: dict[int, Any] = {}  # of the threads that record, see `tape.recording`
        for name, (arguments, result) in SIGNATURES.items():
            function = getattr(self, name)
            function.argtypes, function.restype = arguments, result
        amx = _INT()
        self.is_right, self.has_amx = bool(self.rtp_linear_start(ctypes.byref(amx))), bool(amx.value)

    def replay_address(self, name: str) -> int:
        """Returns the address of the C function with which `tape.Tape` repeats a recorded call of the kernel `name`."""
        return ctypes.cast(getattr(self, f"{name}_replay"), ctypes.c_void_p).value or 0


_selection = "auto"


def select_kernels(selection: str) -> None:
    """Sets the kernels that `library` returns from now on: "auto" (the fastest), "off" (torch instead), or the name of
    an instruction set (a level).

    Raises ConfigError if this CPU does not have the instruction set, or no kernels were built for it.
    """
    global _selection
    _load(selection)
    _selection = selection


def library() -> Library | None:
    """Returns the selected kernels; None if torch must compute instead, because they are off, were not built for this
    CPU or compute wrong results on it.
    """
    return _load(_selection)


def built_levels() -> list[str]:
    """Returns the instruction sets of this CPU for which kernels were built, from the slowest to the fastest."""
    return [level.name for level in supported_levels() if library_path(level.name).exists()]


@cache
def _load(selection: str) -> Library | None:
    usable = built_levels()
    allowed = ["auto", "off", *usable]
    if selection not in allowed:
        known = selection in [level.name for level in levels()]
        reason = "it was not built, or this CPU lacks its instructions" if known else "no such level"
        raise ConfigError(f"RTP_CPU_KERNELS={selection!r}: {reason}; allowed: {', '.join(allowed)}")
    if selection == "off" or not usable:
        log.info("CPU kernels: %s; using torch instead", "off" if selection == "off" else "not built for this CPU")
        return None
    level = usable[-1] if selection == "auto" else selection
    kernels = Library(level, library_path(level))
    if not kernels.is_right:
        log.warning("CPU kernels: those for %s compute wrong results on this CPU; using torch instead", level)
        return None
    without_amx = " without AMX, which the kernel does not permit or which computes wrong results"
    log.info("CPU kernels: using those for %s%s", level, without_amx if level == "amx" and not kernels.has_amx else "")
    return kernels
