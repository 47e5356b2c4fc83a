"""Sets the order in which the tests run, and how Triton's kernels do."""

import os

import pytest

# In Triton's interpreter, since there is no GPU. Triton reads this when it is imported; torch and transformers do that.
if os.environ.get("RTP_TEST_DEVICE") != "cuda":
    os.environ["TRITON_INTERPRET"] = "1"

# Folders whose tests mostly wait for processes come first, so that no worker ends the run alone with one of them.
FIRST = ("tests/container", "tests/parallel", "tests/doctor", "tests/model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)  # stable: the order within a folder stays


def _rank(item: pytest.Item) -> int:
    folder = "/".join(item.nodeid.split("/")[:2])
    return FIRST.index(folder) if folder in FIRST else len(FIRST)
