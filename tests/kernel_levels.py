"""The kernels' levels of instructions as parameters of tests."""

from rtp_llm.native.library import built_levels
from tests.quick import slow_except

LEVELS = slow_except(built_levels(), built_levels()[-1])  # the quick tests run on the one that a server would use
