"""What the tests of the model share: oracles and rank processes, each made once and only where a test asks for it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers.utils import logging

from tests.model.checkpoints import CASES
from tests.model.oracle import Oracle, make_oracle
from tests.model.rank_pool import RankPool

Oracles = Callable[[str], Oracle]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """These matrices are too small to share, and other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    """By the name of a case."""
    made: dict[str, Oracle] = {}
    cases = {case.name: case for case in CASES}

    def get(name: str) -> Oracle:
        if name not in made:
            made[name] = make_oracle(cases[name], tmp_path_factory.mktemp("checkpoint") / name)
        return made[name]

    return get


@pytest.fixture(scope="session", params=[1, 2, 3, 4], ids="tp{}".format)
def gang(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """One set of rank processes at a time; pytest orders the tests so that each is started once."""
    gang = RankPool(request.param)
    yield gang
    gang.close()
