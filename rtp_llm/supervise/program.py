"""`python -m rtp_llm.supervise.program MODULE RUN_DIR [ARGUMENT …]`: a program of supervisord, one process of a part.

Calls the module's `main` with the run directory and the other arguments. Imports the module only after
exit_with_supervisord: the import can take seconds, in which the process would outlive a killed supervisord.
"""

import sys
from importlib import import_module
from pathlib import Path

from rtp_llm.machine.process import exit_with_supervisord, run_main


def main() -> None:
    module, run_dir, *arguments = sys.argv[1:]
    import_module(module).main(Path(run_dir), *arguments)


if __name__ == "__main__":
    exit_with_supervisord(Path(sys.argv[2]))
    run_main(main)
