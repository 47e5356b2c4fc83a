"""The engine and the image, or the reason why there is none."""

import os

import pytest

from tests.container.engine import IMAGE, REPOSITORY, docker, no_engine


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
