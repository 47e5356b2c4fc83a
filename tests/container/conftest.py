"""The image under test. Tests are skipped, with the reason, if no Docker engine is available."""

import os

import pytest

from tests.container.engine import IMAGE, REPOSITORY, docker, engine_unavailable_reason


@pytest.fixture(scope="session")
def image() -> str:
    """Builds the CPU image from the checkout and returns its tag."""
    reason = engine_unavailable_reason()
    if reason:
        pytest.skip(reason)
    wheels = os.environ.get("PIP_FIND_LINKS") or str(REPOSITORY / "image" / "wheels")
    docker(
        *("buildx", "build", "--quiet", "--load", "--network=host", f"--tag={IMAGE}", "--file=image/Dockerfile"),
        *(f"--build-context=wheels={wheels}", "."),
    )
    return IMAGE
