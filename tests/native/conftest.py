"""Every test of a kernel runs on each level of instructions that this CPU has."""

from collections.abc import Iterator

import pytest
import torch

from rtp_llm.native.library import Library, library, select_kernels
from tests.kernel_levels import LEVELS


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Selects one level, and one thread."""
    torch.set_num_threads(1)
    select_kernels(request.param)
    selected = library()
    assert selected
    yield selected
    select_kernels("auto")
