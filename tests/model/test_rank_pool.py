"""The rank processes of these tests: where one fails, the test fails with its words, and no process stays behind."""

import subprocess
from pathlib import Path

import pytest

from tests.model.conftest import Oracles
from tests.model.drive import greedy
from tests.model.rank_pool import RankPool


def has_ended(process: "subprocess.Popen[bytes]") -> bool:
    return process.poll() is not None


def test_a_rank_that_fails_is_heard_and_replaced(oracles: Oracles, tmp_path: Path) -> None:
    path = oracles("llama").path
    gang = RankPool(2)
    try:
        with pytest.raises(AssertionError, match=r"CHECKPOINT_PATH=.*nowhere: does not exist"):
            gang.run(tmp_path / "nowhere", [[greedy([1], 1)]])
        assert not gang.processes
        assert len(gang.run(path, [[greedy([1, 2, 3], 2)]]).outcomes["0"].tokens) == 2
        processes = list(gang.processes)
        processes[1].kill()
        processes[1].wait()
        with pytest.raises(AssertionError, match="rank 1 died"):
            gang.run(path, [[greedy([1, 2, 3], 2)]])
        assert all(map(has_ended, processes))
    finally:
        gang.close()
