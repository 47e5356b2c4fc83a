"""Installs the packages that are missing in this Python from wheels. Imports the standard library only.

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
# Lowest versions for this suite. The other tests require a newer transformers.
TEST_REQUIREMENTS = {"pytest": "8.3", "pytest-timeout": "2.3", "transformers": "5.0"}
# Preinstalled on the GPU machine and not downloaded: their versions depend on its torch and transformers.
PREINSTALLED = {"torch", "numpy", "safetensors", "tokenizers", "transformers"}
REQUIREMENT = re.compile(r"([\w.-]+)\s*(?:>=\s*([\w.]+))?")


class SetupError(Exception):
    """The suite cannot run on this machine. The message contains the command to type."""


def canonical_name(name: str) -> str:
    """Returns the normalized name of a package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def release_numbers(version: str) -> tuple[int, ...]:
    """Returns the release segment of a version without trailing zeros: "2.11.0+cu130" → (2, 11)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    result = [int(part) for part in match[0].split(".")] if match else []
    while result and result[-1] == 0:
        result.pop()
    return tuple(result)


def requirements() -> dict[str, str]:
    """Returns the lowest version of each package that the product and this suite require; "" for any version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    matches = [REQUIREMENT.match(line) for line in project["dependencies"]]
    return {canonical_name(match[1]): match[2] or "" for match in matches if match} | TEST_REQUIREMENTS


def installed_versions(path: Iterable[str] | None = None) -> dict[str, str]:
    """Returns the version of each installed package; the first on the path if there are several."""
    versions: dict[str, str] = {}
    for distribution in distributions(path=list(path or sys.path)):
        versions.setdefault(canonical_name(distribution.metadata["Name"]), distribution.version)
    return versions


def unmet_requirements(versions: Mapping[str, str]) -> list[str]:
    """Returns a description of each required package that is absent or too old."""
    return [
        f"{name} ({f'{versions[name]}, but {lowest} is needed' if name in versions else 'absent'})"
        for name, lowest in requirements().items()
        if name not in versions or release_numbers(versions[name]) < release_numbers(lowest)
    ]


def wheels_to_install(versions: Mapping[str, str]) -> list[Path]:
    """Returns the wheels whose package is absent or installed in an older version."""
    wheels = []
    for wheel in sorted(WHEELS.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if release_numbers(versions.get(canonical_name(name), "")) < release_numbers(version):
            wheels.append(wheel)
    return wheels


def install_requirements() -> dict[str, str]:
    """Installs missing packages into SITE. Returns the environment of the suite's processes.

    Raises SetupError if a requirement is not met afterwards.
    """
    shutil.rmtree(SITE, ignore_errors=True)
    wheels = wheels_to_install(installed_versions())
    if wheels:
        _install_wheels(wheels)
    unmet = unmet_requirements(installed_versions([str(SITE), *sys.path]))
    if unmet:
        raise SetupError(_unmet_message(unmet))
    inherited_path = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), str(SITE), *([inherited_path] if inherited_path else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _install_wheels(wheels: list[Path]) -> None:
    print(f"{len(wheels)} packages from {WHEELS}: {', '.join(w.name.split('-')[0] for w in wheels)}", flush=True)
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(SITE))
    completed = subprocess.run([*PIP, "install", *options, *map(str, wheels)], check=False)
    if completed.returncode:
        raise SetupError(f"the wheels in {WHEELS} cannot be installed in this Python; {_download_instructions()}")


def _unmet_message(unmet: list[str]) -> str:
    reason = f"{WHEELS} does not contain them" if WHEELS.is_dir() else f"{WHEELS} does not exist"
    return f"packages missing or too old in {sys.executable}: {', '.join(unmet)}; {reason}.\n{_download_instructions()}"


def _download_instructions() -> str:
    version = ".".join(platform.python_version_tuple()[:2])
    return (
        "With a network: `make .venv/installed-dev test-gpu`. Without one, run on a machine with a network:\n"
        f"  make gpu-wheels PYTHON_VERSION={version}\n"
        "and copy its build/gpu-wheels to this one (another folder: set GPU_WHEELS)"
    )
