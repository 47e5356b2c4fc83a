"""`python -m rtp_llm.engine.main RUN_DIR RANK`: runs the process of one rank."""

import os
import sys
from functools import partial
from pathlib import Path

from rtp_llm import log
from rtp_llm.machine.process import exit_with_supervisord, run_main
from rtp_llm.parallel.gang_client import GangClient, exit_process
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.rank_status import RankStatus


def main(run_dir: Path, rank: int) -> None:
    """Joins the gang, then serves as one rank until the process ends.

    Raises FatalError, for example if the settings of the parts differ or another rank is lost.
    """
    part_spec = PartSpec.load(run_dir)
    log.setup(f"{part_spec.label} rank{rank}", part_spec.config.log_level, style=part_spec.config.log_format)
    gang = GangClient(part_spec.plan, RankStatus(rank, part_spec.plan.part), part_spec.config, run_dir, exit_process)
    gang.join(part_spec.fingerprint)
    # Imports torch after the rendezvous: the import takes seconds, and differing settings should be reported before.
    from rtp_llm.engine.rank import serve_rank

    serve_rank(part_spec, gang)


if __name__ == "__main__":
    exit_with_supervisord(Path(sys.argv[1]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # serve_rank sets the number of threads later
    run_main(partial(main, Path(sys.argv[1]), int(sys.argv[2])))
