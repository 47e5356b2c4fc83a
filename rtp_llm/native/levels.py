"""The instruction set levels of CPUs for which the kernels are compiled.

This file and `build.py` run before any package is installed, so they import only the standard library.
"""

import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Level:
    """An instruction set for which the kernels are compiled, such as AVX-512. compiler_flags: for g++ and clang.
    cpu_flags: flags of /proc/cpuinfo that it needs.
    """

    name: str
    compiler_flags: tuple[str, ...] = ()
    cpu_flags: frozenset[str] = frozenset()


_AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
_AMX = (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8")
_AVX2_CPU = {"avx2", "fma", "f16c", "bmi2"}
_AVX512_CPU = _AVX2_CPU | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX512_BF16_CPU = _AVX512_CPU | {"avx512_bf16", "avx512_vnni"}

PORTABLE = Level("portable")
X86_LEVELS = (  # from the slowest to the fastest
    PORTABLE,
    Level("avx2", ("-march=x86-64-v3",), frozenset(_AVX2_CPU)),
    Level("avx512", _AVX512, frozenset(_AVX512_CPU)),
    Level("avx512_bf16", _AVX512_BF16, frozenset(_AVX512_BF16_CPU)),
    Level("amx", _AMX, frozenset(_AVX512_BF16_CPU | {"amx_tile", "amx_bf16", "amx_int8"})),
)


def levels(machine: str = platform.machine()) -> tuple[Level, ...]:
    """Returns the instruction set levels of an architecture (`uname -m`), from the slowest to the fastest."""
    return X86_LEVELS if machine in ("x86_64", "AMD64") else (PORTABLE,)


def supported_levels() -> tuple[Level, ...]:
    """Returns the instruction sets (levels) that this CPU has, from the slowest to the fastest."""
    flags = _cpu_flags()
    return tuple(level for level in levels() if level.cpu_flags <= flags)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
