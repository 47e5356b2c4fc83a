"""`python -m rtp_llm.engine.main RUN_DIR RANK`: the process of one rank."""

import os
import sys
from functools import partial
from pathlib import Path

from rtp_llm import log
from rtp_llm.parallel.gang import Gang, leave
from rtp_llm.parallel.handover import Handover
from rtp_llm.parallel.lifeline import live_below_supervisord, run_to_exit
from rtp_llm.parallel.pulse import Pulse


def main(run_dir: Path, rank: int) -> None:
    handover = Handover.load(run_dir)
    log.setup(f"{handover.who} rank{rank}", handover.config.log_level, style=handover.config.log_format)
    gang = Gang(handover.plan, Pulse(rank, handover.plan.part), handover.config, run_dir, leave)
    gang.join(handover.fingerprint)
    # Only now torch: its import takes seconds, and a gang that disagrees must say so within a few.
    from rtp_llm.engine.rank import serve_rank

    serve_rank(handover, gang)


if __name__ == "__main__":
    live_below_supervisord(Path(sys.argv[1]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # until the rank knows its share of the cores
    run_to_exit(partial(main, Path(sys.argv[1]), int(sys.argv[2])))
