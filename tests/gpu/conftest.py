"""Fixtures of the GPU suite."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Returns the device that RTP_TEST_DEVICE names; for cuda the first GPU."""
    name = os.environ["RTP_TEST_DEVICE"]
    torch.set_float32_matmul_precision("highest")  # no TF32
    return torch.device("cuda", 0) if name == "cuda" else torch.device(name)
