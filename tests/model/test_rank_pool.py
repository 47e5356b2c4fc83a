"""The pool of rank processes: a failed rank fails the test with its log, and all processes are stopped."""

import subprocess
from pathlib import Path

import pytest

from tests.model.conftest import Oracles
from tests.model.drive import greedy_request
from tests.model.rank_pool import RankPool


def has_ended(process: "subprocess.Popen[bytes]") -> bool:
    return process.poll() is not None


@pytest.mark.slow
def test_failed_rank_is_reported_and_replaced(oracles: Oracles, tmp_path: Path) -> None:
    path = oracles("llama").path
    rank_pool = RankPool(2)
    try:
        with pytest.raises(AssertionError, match=r"CHECKPOINT_PATH=.*nowhere: does not exist"):
            rank_pool.run(tmp_path / "nowhere", [[greedy_request([1], 1)]])
        assert not rank_pool.processes
        assert len(rank_pool.run(path, [[greedy_request([1, 2, 3], 2)]]).completions["0"].tokens) == 2
        processes = list(rank_pool.processes)
        processes[1].kill()
        processes[1].wait()
        with pytest.raises(AssertionError, match="rank 1 died"):
            rank_pool.run(path, [[greedy_request([1, 2, 3], 2)]])
        assert all(map(has_ended, processes))
    finally:
        rank_pool.close()
