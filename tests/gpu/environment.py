"""What this Python lacks to run the product and its tests, and how that gets here. Imports the standard library only.

A machine with a GPU brings its own torch, and often no way to the network. What else is missing travels as wheels:
`make gpu-wheels` downloads them where there is a network, and the suite unpacks those that are missing here into a
folder that its processes find on PYTHONPATH. The Python itself is left as it is.
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
# Of the tests' own needs, those of this suite. transformers may be older than the rest of the tests ask for.
OF_TESTS = {"pytest": "8.3", "pytest-timeout": "2.3", "transformers": "5.0"}
# They come with torch and transformers; a wheel of them would not suit those that are there.
NOT_CARRIED = {"torch", "numpy", "safetensors", "tokenizers", "transformers"}
LISTED = re.compile(r"([\w.-]+)\s*(?:>=\s*([\w.]+))?")


class EnvironmentFault(Exception):
    """Something is missing; the text says what to type."""


def canonical(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    """What the version begins with: "2.11.0+cu130" → (2, 11)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def needs() -> dict[str, str]:
    """Lowest version by package: the product's own dependencies, and those of this suite."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [LISTED.match(line) for line in project["dependencies"]]
    return {canonical(match[1]): match[2] or "" for match in listed if match} | OF_TESTS


def installed(path: Iterable[str] | None = None) -> dict[str, str]:
    """Version by package; where one is there twice, the one that Python finds first."""
    found: dict[str, str] = {}
    for one in distributions(path=list(path or sys.path)):
        found.setdefault(canonical(one.metadata["Name"]), one.version)
    return found


def lacking(have: Mapping[str, str]) -> list[str]:
    """Each package that is absent or too old, with what is there."""
    return [
        f"{name} ({f'{have[name]}, but {lowest} is needed' if name in have else 'absent'})"
        for name, lowest in needs().items()
        if name not in have or numbers(have[name]) < numbers(lowest)
    ]


def wanted_wheels(have: Mapping[str, str]) -> list[Path]:
    """Those in the folder whose package is absent here, or older."""
    found = []
    for wheel in sorted(WHEELS.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if numbers(have.get(canonical(name), "")) < numbers(version):
            found.append(wheel)
    return found


def prepare() -> dict[str, str]:
    """The environment variables for all processes of the suite. Raises EnvironmentFault."""
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
