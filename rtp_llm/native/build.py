"""Compiles the kernels: `python -m rtp_llm.native.build [best|supported|all]`.

Builds one shared library per instruction set level, in `lib` beside this file. Without a compiler it builds nothing and
reports no error: the server then computes with torch. CXX sets another compiler, which may be a cross compiler.
"""

import hashlib
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PACKAGE = Path(__file__).resolve().parent
LIBRARY_FOLDER = PACKAGE / "lib"
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"),
    "-Wno-psabi",  # vectors wider than the registers of a level cross no boundary of the library
)
LINK_FLAGS = ("-shared", "-pthread", "-Wl,-z,now")


def library_path(level: str, folder: Path = LIBRARY_FOLDER) -> Path:
    """Returns the path of the shared library with the kernels compiled for an instruction set (a level)."""
    return folder / f"rtp_native-{level}.so"


def build(selection: str, folder: Path = LIBRARY_FOLDER) -> list[Path]:
    """Compiles the kernel libraries of the selected instruction sets (levels) that are missing or out of date. Returns
    their paths.

    selection: "best" (the fastest level of this CPU), "supported" (all levels of this CPU) or "all". Raises ValueError
    for another selection, CalledProcessError if the compiler fails.
    """
    compiler = find_compiler()
    if not compiler:
        print("native kernels: no C++ compiler, so CPUs compute with torch; install g++ or clang, or set CXX")
        return []
    selected = [level for level in _select(selection, compiler) if _accepts(compiler, level.compiler_flags)]
    for path in set(folder.glob("*.so")) - {library_path(level.name, folder) for level in selected}:
        path.unlink()  # it may be of older sources, and the loader takes whatever is there
    paths = [_build_level(compiler, level, folder) for level in selected]
    print(f"native kernels: {', '.join(level.name for level in selected)}")
    return paths


def find_compiler() -> list[str]:
    """Returns the command of the C++ compiler; [] if there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((shlex.split(name) for name in candidates if shutil.which(shlex.split(name)[0])), [])


def _select(selection: str, compiler: Sequence[str]) -> Sequence[Any]:
    if selection not in ("best", "supported", "all"):
        raise ValueError(f"unknown selection of instruction sets {selection!r}; allowed: best, supported, all")
    # By path: the package may not be importable yet.
    module = runpy.run_path(str(PACKAGE / "levels.py"))
    target = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    machine = target.split("-")[0]
    is_foreign = machine != platform.machine()
    levels = module["levels"](machine) if selection == "all" or is_foreign else module["supported_levels"]()
    return levels[-1:] if selection == "best" else levels


def _accepts(compiler: Iterable[str], flags: Iterable[str]) -> bool:
    """Returns whether the compiler knows these flags; an older one does not know the newest instructions."""
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=b"", stderr=subprocess.DEVNULL, check=False).returncode == 0


def _build_level(compiler: Sequence[str], level: Any, folder: Path) -> Path:
    """Compiles and links one level, unless its library was made from the same sources with the same flags."""
    sources = sorted(PACKAGE.glob("src/*.cpp"))
    flags = (*FLAGS, *level.compiler_flags, f'-DRTP_LEVEL="{level.name}"')
    digest = _digest(compiler, flags)
    path, stamp = library_path(level.name, folder), library_path(level.name, folder).with_suffix(".digest")
    if path.exists() and stamp.exists() and stamp.read_text() == digest:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as objects:
        outputs = [Path(objects, source.stem + ".o") for source in sources]
        commands = [[*compiler, *flags, "-c", str(s), "-o", str(o)] for s, o in zip(sources, outputs, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), commands))
        library = Path(objects, path.name)
        subprocess.run([*compiler, *LINK_FLAGS, *map(str, outputs), "-o", str(library)], check=True)
        # Renamed into place: a server that has mapped the old file keeps it.
        partial = path.with_suffix(f".{os.getpid()}")
        shutil.copy(library, partial)
        partial.replace(path)
    stamp.write_text(digest)
    return path


def _digest(compiler: Sequence[str], flags: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join((*compiler, *flags, *LINK_FLAGS)).encode())
    for source in sorted(PACKAGE.glob("src/*")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    build(sys.argv[1] if len(sys.argv) > 1 else "best")
