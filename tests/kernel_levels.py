"""The kernels' levels of instructions as parameters of tests."""

import pytest

from rtp_llm.native.library import built_levels

# The quick tests run on the slowest and the fastest of this CPU; CI runs all.
LEVELS = [
    pytest.param(level, marks=[] if level in (built_levels()[0], built_levels()[-1]) else pytest.mark.slow)
    for level in built_levels()
]
