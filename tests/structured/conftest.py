"""Fixtures of the tests of structured output."""

from pathlib import Path

import pytest

from tests import random_model
from tests.structured.random_text import Vocabulary


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("structured") / "model"
    random_model.write(directory)
    return directory


@pytest.fixture(scope="session")
def vocabulary(checkpoint: Path) -> Vocabulary:
    return Vocabulary(checkpoint)
