"""What the tests of the GPU suite share: the device they are for."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """RTP_TEST_DEVICE, which the suite sets for its processes; the first GPU where it is cuda."""
    name = os.environ["RTP_TEST_DEVICE"]
    torch.set_float32_matmul_precision("highest")  # no TF32: fp32 is to mean fp32
    return torch.device("cuda", 0) if name == "cuda" else torch.device(name)
