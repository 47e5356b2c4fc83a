"""Finds the packages that this Python lacks, and installs them from wheels. Imports the standard library only.

A GPU machine often has its own torch and no network. `make gpu-wheels` downloads the other packages on a machine with a
network. The suite installs those that are missing into a folder on the PYTHONPATH of its processes, and leaves this
Python unchanged.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
WHEELS = Path(os.environ.get("GPU_WHEELS") or BUILD / "gpu-wheels")
SITE = BUILD / "gpu-site"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# What this suite needs for testing. The other tests require a newer transformers.
OF_TESTS = {"pytest": "8.3", "pytest-timeout": "2.3", "transformers": "5.0"}
# The GPU machine has these: they must fit its torch and transformers.
NOT_CARRIED = {"torch", "numpy", "safetensors", "tokenizers", "transformers"}
LISTED = re.compile(r"([\w.-]+)\s*(?:>=\s*([\w.]+))?")


class EnvironmentFault(Exception):
    """The suite cannot run here. The text says what to type."""


def canonical(name: str) -> str:
    """Returns the name of a package in the normal form of PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    """Returns the numbers that a version begins with: "2.11.0+cu130" → (2, 11)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def needs() -> dict[str, str]:
    """Returns the lowest version of each package that the product or this suite needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [LISTED.match(line) for line in project["dependencies"]]
    return {canonical(match[1]): match[2] or "" for match in listed if match} | OF_TESTS


def installed(path: Iterable[str] | None = None) -> dict[str, str]:
    """Returns the version of each installed package, as Python finds it first."""
    found: dict[str, str] = {}
    for one in distributions(path=list(path or sys.path)):
        found.setdefault(canonical(one.metadata["Name"]), one.version)
    return found


def lacking(have: Mapping[str, str]) -> list[str]:
    """Describes each package that is absent or too old."""
    return [
        f"{name} ({f'{have[name]}, but {lowest} is needed' if name in have else 'absent'})"
        for name, lowest in needs().items()
        if name not in have or numbers(have[name]) < numbers(lowest)
    ]


def wanted_wheels(have: Mapping[str, str]) -> list[Path]:
    """Returns the wheels whose package is absent here or older."""
    found = []
    for wheel in sorted(WHEELS.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if numbers(have.get(canonical(name), "")) < numbers(version):
            found.append(wheel)
    return found


def prepare() -> dict[str, str]:
    """Installs what is missing. Returns the environment of the processes. Raises EnvironmentFault."""
    shutil.rmtree(SITE, ignore_errors=True)
    wheels = wanted_wheels(installed())
    if wheels:
        _install(wheels)
    missing = lacking(installed([str(SITE), *sys.path]))
    if missing:
        raise EnvironmentFault(_advice(missing))
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(SITE), *([before] if before else [])])}


def _install(wheels: list[Path]) -> None:
    print(f"{len(wheels)} packages from {WHEELS}: {', '.join(w.name.split('-')[0] for w in wheels)}", flush=True)
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(SITE))
    done = subprocess.run([*PIP, "install", *options, *map(str, wheels)], check=False)
    if done.returncode:
        raise EnvironmentFault(f"the wheels in {WHEELS} do not suit this Python; {_download()}")


def _advice(missing: list[str]) -> str:
    here = f"{WHEELS} does not hold that" if WHEELS.is_dir() else f"there is no folder {WHEELS}"
    return f"{sys.executable} lacks {', '.join(missing)}, and {here}.\n{_download()}"


def _download() -> str:
    version = ".".join(platform.python_version_tuple()[:2])
    return (
        "Where there is a network: `make .venv/installed-dev test-gpu`. Else, on a machine that has one:\n"
        f"  make gpu-wheels PYTHON_VERSION={version}\n"
        "and copy its build/gpu-wheels here, or name another folder with GPU_WHEELS=…"
    )
