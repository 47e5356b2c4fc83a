"""`make test-gpu`: runs all groups of the suite, prints a table and writes the results.

Imports the standard library only, since other packages may have to be installed first.

    python3 -m tests.gpu [GROUP …]      RTP_TEST_DEVICE=cpu runs it without a GPU
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu import report
from tests.gpu.environment import BUILD, ROOT, EnvironmentFault, prepare
from tests.gpu.groups import Group, Shard, chosen, run

# Limits on a GPU, of the whole suite and of each group.
SECONDS = 350
CPU_FACTOR = 3  # other programs may use the CPU
GROUPS = [
    Group("doctor", "tests/gpu/checkup.py", 60),
    Group("parity", "tests/gpu/parity.py", 110, shards=3),
    Group("server", "tests/gpu/server.py", 120),
    Group("pieces", "tests/gpu/pieces.py", 50),
    Group("speed", "tests/gpu/speed.py", 100),
]
CANNOT_RUN = 2
FACTS = """
import json, platform, torch, transformers
facts = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
try:
    import triton
    facts["triton"] = triton.__version__
except ImportError:
    pass
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    facts |= {"gpu": card.name, "gpus": torch.cuda.device_count(), "memory_bytes": card.total_memory}
    facts |= {"capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}
    from rtp_llm.machine.gpus import read_gpus
    facts["driver"] = read_gpus().driver
print(json.dumps(facts))
"""
FACTS_SECONDS = 90
NO_GPU = """\
no GPU was found: torch {torch} of {python} sees none. Without one,
  RTP_TEST_DEVICE=cpu make test-gpu
runs the same tests on CPU."""


def main(names: list[str]) -> int:
    started = time.monotonic()
    try:
        groups = chosen(GROUPS, names)
        env = prepare()
        machine = facts(env)
        device = choose_device(machine)
    except (EnvironmentFault, ValueError) as fault:
        print(fault, file=sys.stderr)
        return CANNOT_RUN
    env |= {"RTP_TEST_DEVICE": device, "RTP_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        machine = {key: value for key, value in machine.items() if not key.startswith(("gpu", "cuda", "driver"))}
    print(" ".join(f"{key}={value}" for key, value in machine.items()), f"device={device}", flush=True)
    return conclude(device, machine, run_all(groups, env, started), started)


def choose_device(machine: dict[str, Any]) -> str:
    """Returns the device to test. Raises EnvironmentFault without a GPU."""
    asked = os.environ.get("RTP_TEST_DEVICE", "cuda")
    if asked not in ("cpu", "cuda"):
        raise EnvironmentFault(f"RTP_TEST_DEVICE={asked!r}; allowed: cpu, cuda")
    if asked == "cuda" and "gpu" not in machine:
        raise EnvironmentFault(NO_GPU.format(python=sys.executable, **machine))
    return asked


def facts(env: dict[str, str]) -> dict[str, Any]:
    """Returns the versions and the GPU that torch reports in a separate process. Raises EnvironmentFault."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", FACTS], env=env, cwd=ROOT, capture_output=True, text=True, timeout=FACTS_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"torch did not report its GPUs within {FACTS_SECONDS} s") from None
    if done.returncode:
        raise EnvironmentFault(f"torch or transformers cannot be imported:\n{done.stderr.strip()}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def run_all(groups: list[Group], env: dict[str, str], started: float) -> list[Shard]:
    folder = BUILD / "gpu" / "logs"
    factor = 1 if env["RTP_TEST_DEVICE"] == "cuda" else CPU_FACTOR
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shards = []
    for group in groups:
        left = SECONDS * factor - (time.monotonic() - started)
        print(f"{group.name} …", end=" ", flush=True)
        begun = time.monotonic()
        shards += run(group, env, folder, max(1.0, min(group.seconds * factor, left)))
        print(f"{time.monotonic() - begun:.0f} s", flush=True)
    return shards


def conclude(device: str, machine: dict[str, Any], shards: list[Shard], started: float) -> int:
    """Prints the tables and writes the results. Returns the exit code."""
    results = [result for shard in shards for result in shard.results()]
    speeds = [speed for shard in shards for speed in shard.speeds()]
    seconds = time.monotonic() - started
    path = report.destination(device)
    report.write(path, machine, results, speeds, seconds)
    failed = [result for result in results if result.result in report.FAILED]
    print(f"\n{report.details(results)}\n{report.table(results)}\n\n{report.speed_table(speeds)}\n")
    counts = f"{len(results) - len(failed)} passed or skipped, {len(failed)} failed, in {seconds:.0f} s"
    print(f"{counts}; {shown(path)}, logs in build/gpu/logs")
    return 1 if failed else 0


def shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
