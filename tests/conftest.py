"""Distributes the tests over the workers of pytest-xdist."""

import pytest

# Slow folders, whose tests mostly wait for processes, come first: one of them at the end would keep one worker alone.
FIRST_FOLDERS = ("tests/container", "tests/parallel", "tests/doctor", "tests/model")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps each file on one worker, since its tests share fixtures and some depend on their order."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_file(item)))
    items.sort(key=_folder_index)  # stable: the order within a folder stays


def _file(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


def _folder_index(item: pytest.Item) -> int:
    folder = "/".join(_file(item).split("/")[:2])
    return FIRST_FOLDERS.index(folder) if folder in FIRST_FOLDERS else len(FIRST_FOLDERS)
