"""Injects faults into real parts under load and reports what their clients see.

python -m tests.chaos --faults kill_rank,kill_api --injections 3 --seed 1
python -m tests.chaos --injections 50 --records docs/reliability.jsonl --report docs/reliability.md
"""

import argparse
import random
import sys
import time
from pathlib import Path

from tests.chaos import report
from tests.chaos.campaign import Records, run
from tests.chaos.faults import FAULTS
from tests.chaos.lane import end_when_told


def main() -> int:
    parser = argparse.ArgumentParser("tests.chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", default=",".join(FAULTS), help="names, separated by commas (default: all)")
    parser.add_argument("--injections", type=int, default=3, help="per fault (default 3)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16), help="default: a random one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no gang is started any more")
    parser.add_argument("--lanes", type=int, default=1, help="gangs side by side (default 1)")
    parser.add_argument("--pause-file", type=Path, help="while it exists, nothing is injected: to measure other things")
    parser.add_argument("--records", type=Path, help="file of injections: those in it are not repeated")
    parser.add_argument("--report", type=Path, help="file to write as docs/reliability.md")
    parser.add_argument("--list", action="store_true", help="list the faults")
    args = parser.parse_args()
    end_when_told()  # and remove what was created
    if args.list:
        print("\n".join(f"{name:28} {fault.text}" for name, fault in FAULTS.items()))
        return 0
    if unknown := set(args.faults.split(",")) - set(FAULTS):
        parser.error(f"--faults: unknown: {', '.join(sorted(unknown))}; allowed: {', '.join(FAULTS)}")
    print(f"seed {args.seed}", flush=True)
    records = Records(args.records)
    faults = [FAULTS[name] for name in args.faults.split(",")]
    skipped = run(
        faults,
        records,
        args.injections,
        args.seed,
        deadline=time.monotonic() + 60 * args.minutes,
        num_lanes=args.lanes,
        pause_file=args.pause_file,
    )
    if args.report:
        report.write(args.report, records.injections, skipped)
    return 1 if any(record.problems for record in records.injections) else 0


if __name__ == "__main__":
    sys.exit(main())
