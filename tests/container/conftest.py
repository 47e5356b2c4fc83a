"""The engine and the image, or the reason why there is none."""

import os
import shutil
import subprocess

import pytest

from tests.container.engine import IMAGE, REPOSITORY, docker


def no_engine() -> str:
    """Why no container can be run here; empty where one can."""
    if not shutil.which("docker"):
        return "there is no docker client"
    done = subprocess.run(["docker", "info"], capture_output=True, text=True)
    if done.returncode:
        return "no Docker engine answers: " + (done.stderr.strip().splitlines() or ["?"])[-1]
    if subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode:
        return "the docker client has no buildx"
    return ""


@pytest.fixture(scope="session")
def image() -> str:
    """The CPU image, built from the checkout."""
    reason = no_engine()
    if reason:
        pytest.skip(reason)
    wheels = os.environ.get("PIP_FIND_LINKS") or str(REPOSITORY / "image" / "wheels")
    docker(
        *("buildx", "build", "--quiet", "--load", "--network=host", f"--tag={IMAGE}", "--file=image/Dockerfile"),
        *(f"--build-context=wheels={wheels}", "."),
    )
    return IMAGE
