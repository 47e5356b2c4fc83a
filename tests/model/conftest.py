"""Fixtures of the model tests: expected results (oracles) and rank processes, created once, when first used."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers.utils import logging

from rtp_llm.native.library import select_kernels
from tests.model.checkpoints import CASES
from tests.model.oracle import Oracle, make_oracle
from tests.model.rank_pool import RankPool
from tests.quick import slow_except

Oracles = Callable[[str], Oracle]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread: the matrices are small, and the rank processes need the other cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    """Returns a function that returns the Oracle of a CheckpointCase, by its name."""
    cache: dict[str, Oracle] = {}
    cases = {case.name: case for case in CASES}

    def get(name: str) -> Oracle:
        if name not in cache:
            cache[name] = make_oracle(cases[name], tmp_path_factory.mktemp("checkpoint") / name)
        return cache[name]

    return get


TP_SIZES = slow_except([1, 2, 3, 4], 1, 2)


@pytest.fixture
def without_kernels() -> Iterator[None]:
    """Lets torch compute."""
    select_kernels("off")
    yield
    select_kernels("auto")


@pytest.fixture(scope="session", params=TP_SIZES, ids="tp{}".format)
def rank_pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Yields the rank processes of one TP size. pytest groups the tests by TP size, so each pool starts once."""
    rank_pool = RankPool(request.param)
    yield rank_pool
    rank_pool.close()
