"""One rank for test_epoch: `python -m tests.seams.epoch_rank RUN_DIR RANK CONTROL_FD COLLECTIVES`.

Runs the product's `serve_rank`. The test decides when an epoch begins and when it is aborted, through commands, one per
line, over the inherited socket CONTROL_FD; this process answers with lines too. COLLECTIVES: `shm` or `gloo`.
"""

import queue
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast
from unittest import mock

from torch import Tensor

from rtp_llm import log
from rtp_llm.engine.rank import serve_rank
from rtp_llm.parallel.gang_client import Assignment, GangClient
from rtp_llm.parallel.mesh import MeshAxis
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.rank_status import RankStatus
from rtp_llm.parallel.rendezvous import KVCacheSize
from tests.model.rank import make_assignment


class ScriptedGang:
    """Stands in for GangClient.

    Commands: `epoch` begins the next epoch, `abort` aborts the current one, as the heartbeat thread does. `silent`
    makes the next all-reduce of this rank wait for `resume` before it joins the others.
    """

    def __init__(self, rank: int, control: socket.socket):
        self.rank, self.rank_status = rank, RankStatus(0)
        self.resident_rank: int | None = None
        self.kv_cache = KVCacheSize()
        self.abort_epoch = lambda reason: None
        self._control = control
        self._epochs: queue.Queue[bool] = queue.Queue()
        self._may_join = threading.Event()
        self._may_join.set()
        threading.Thread(target=self._read_commands, daemon=True).start()

    def epochs(self) -> Iterator[Assignment]:
        number = 0
        while self._epochs.get():
            number += 1
            self.rank_status.begin_epoch(self.rank)
            yield make_assignment(self.rank, number)
            self.reply(f"left epoch {number}")

    def fail_epoch(self, reason: str) -> None:
        self.reply("failed by itself")

    def check_epoch(self) -> None:
        pass

    def wait_until_loaded(self) -> None:
        pass

    def reply(self, line: str) -> None:
        self._control.sendall(f"{line}\n".encode())

    def _read_commands(self) -> None:
        for line in self._control.makefile():
            command = line.strip()
            if command == "epoch":
                self._epochs.put(True)
            elif command == "abort":
                self.abort_epoch("a test aborts")
            elif command == "silent":
                self._may_join.clear()
            elif command == "resume":
                self._may_join.set()
        self._epochs.put(False)

    def delay_collective(self) -> None:
        if not self._may_join.is_set():
            self.reply("is silent")
            self._may_join.wait()


def main(run_dir: Path, rank: int, control_fd: int, collectives: str) -> None:
    log.setup(f"rank{rank}", "INFO")
    gang = ScriptedGang(rank, socket.socket(fileno=control_fd))
    all_reduce = MeshAxis.all_reduce

    def delayed_all_reduce(self: MeshAxis, tensor: Tensor) -> Tensor:
        gang.delay_collective()
        return all_reduce(self, tensor)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(MeshAxis, "all_reduce", delayed_all_reduce))
        if collectives == "gloo":
            patches.enter_context(mock.patch.object(PartSpec, "shm_prefix", ""))
        serve_rank(PartSpec.load(run_dir), cast(GangClient, gang))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
