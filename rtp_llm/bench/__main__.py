"""`python -m rtp_llm.bench`: see `rtp_llm.bench.cli`."""

import sys

from rtp_llm.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
