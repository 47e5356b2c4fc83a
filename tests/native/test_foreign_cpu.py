"""The portable kernels on another architecture: cross-compiled for aarch64 and run by qemu-user where both are there
(Debian's g++-aarch64-linux-gnu and qemu-user), and the same program on this CPU.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from rtp_llm.native.build import PACKAGE, build, find_compiler

PROGRAM = Path(__file__).with_name("foreign_cpu.cpp")
FLAGS = ("-std=c++17", "-O2", "-pthread", '-DRTP_LEVEL="portable"')


def run_program(folder: Path, compiler: list[str], emulator: list[str]) -> None:
    program = folder / "program"
    sources = map(str, (PROGRAM, *sorted(PACKAGE.glob("src/*.cpp"))))
    subprocess.run([*compiler, *FLAGS, "-static", *sources, "-o", str(program)], check=True)
    result = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("largest error") == 11


@pytest.mark.slow
def test_on_this_cpu(tmp_path: Path) -> None:
    compiler = find_compiler()
    if not compiler:
        pytest.skip("no C++ compiler")
    run_program(tmp_path, compiler, [])


@pytest.mark.slow
def test_on_aarch64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64")
    if not shutil.which(compiler) or not emulator:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    run_program(tmp_path, [compiler], [emulator])
    monkeypatch.setenv("CXX", compiler)
    (library,) = build("all", tmp_path)
    assert library.read_bytes()[:20].endswith(b"\xb7\x00")  # ELF's number for AArch64
