"""A worker process, which serves as one rank or waits as the spare."""

import os
from pathlib import Path

from rtp_llm import garbage, log
from rtp_llm.parallel.gang_client import GangClient
from rtp_llm.parallel.part_spec import PartSpec
from rtp_llm.parallel.rank_status import RankStatus


def main(run_dir: Path, index: str) -> None:
    """Main function of a worker process: joins the gang, then serves as a rank, again after each loss of another rank,
    until the process ends. `index`: number of the worker within the part.

    Raises FatalError, for example if the settings of the parts differ.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # serve_rank sets the number of threads later
    # The threads of torch's own operations spin for some 20 µs and then sleep, because the kernels and the API process
    # need the cores as well. The default of libgomp is to spin for milliseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    part_spec = PartSpec.load(run_dir)
    log.setup(f"{part_spec.label} worker{index}", part_spec.config.log_level, style=part_spec.config.log_format)
    gang = GangClient(part_spec, int(index), RankStatus(part_spec.plan.part))
    gang.start()
    gang.wait_for_work()
    # Imports torch after the rendezvous: the import takes seconds, and differing settings should be reported before. A
    # spare imports it once the others serve, so that it neither slows their start down nor its own later.
    with gang.importing(), garbage.paused():
        from rtp_llm.engine.rank import serve_rank

    serve_rank(part_spec, gang)
