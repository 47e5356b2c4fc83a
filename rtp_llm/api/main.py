"""`python -m rtp_llm.api.main RUN_DIR`: the API process of one part."""

import sys
from pathlib import Path

from rtp_llm.machine.process import exit_with_supervisord, run_main


def main() -> None:
    """Runs the API process of the part whose run directory is the first argument, until SIGTERM or supervisord ends."""
    run_dir = Path(sys.argv[1])
    exit_with_supervisord(run_dir)
    # Takes a second, in which the process would outlive a killed supervisord.
    from rtp_llm.api.server import serve

    serve(run_dir)


if __name__ == "__main__":
    run_main(main)
