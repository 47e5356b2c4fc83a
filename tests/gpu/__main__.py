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
from tests.gpu.environment import BUILD, ROOT, SetupError, install_requirements
from tests.gpu.groups import Shard, SuiteGroup, run_group, select_groups

# Limits on a GPU, of the whole suite and of each group. Those of the groups leave time to look at the machine first.
SUITE_SECONDS = 350
CPU_TIMEOUT_FACTOR = 3  # other programs may use the CPU
GROUPS = [
    SuiteGroup("doctor", "tests/gpu/doctor.py", 40),
    SuiteGroup("parity", "tests/gpu/parity.py", 85, shards=3),
    SuiteGroup("attention", "tests/gpu/attention.py", 25),
    SuiteGroup("components", "tests/gpu/components.py", 30),
    SuiteGroup("epoch", "tests/gpu/epoch.py", 25),
    SuiteGroup("server", "tests/gpu/server.py", 75),
    SuiteGroup("speed", "tests/gpu/speed.py", 60),
]
CANNOT_RUN = 2
FACTS_PROGRAM = """
import json, platform, torch, transformers
facts = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
try:
    import triton
    facts["triton"] = triton.__version__
except ImportError:
    pass
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    facts |= {"gpu": gpu.name, "gpus": torch.cuda.device_count(), "memory_bytes": gpu.total_memory}
    facts |= {"capability": f"{gpu.major}.{gpu.minor}", "cuda": torch.version.cuda}
    from rtp_llm.machine.gpus import read_gpus
    facts["driver"] = read_gpus().driver
print(json.dumps(facts))
"""
FACTS_TIMEOUT_SECONDS = 90
NO_GPU = """\
no GPU was found by torch {torch} of {python}. To run the same tests on CPU:
  RTP_TEST_DEVICE=cpu make test-gpu"""


def main(names: list[str]) -> int:
    start = time.monotonic()
    try:
        groups = select_groups(GROUPS, names)
        env = install_requirements()
        machine = read_machine_facts(env)
        device = select_device(machine)
    except (SetupError, ValueError) as error:
        print(error, file=sys.stderr)
        return CANNOT_RUN
    env |= {"RTP_TEST_DEVICE": device, "RTP_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        machine = {key: value for key, value in machine.items() if not key.startswith(("gpu", "cuda", "driver"))}
    print(" ".join(f"{key}={value}" for key, value in machine.items()), f"device={device}", flush=True)
    return write_report(device, machine, run_all(groups, env, start), start)


def select_device(machine: dict[str, Any]) -> str:
    """Returns the device to test, "cpu" or "cuda". Raises SetupError if "cuda" has no GPU."""
    device = os.environ.get("RTP_TEST_DEVICE", "cuda")
    if device not in ("cpu", "cuda"):
        raise SetupError(f"RTP_TEST_DEVICE={device!r}; allowed: cpu, cuda")
    if device == "cuda" and "gpu" not in machine:
        raise SetupError(NO_GPU.format(python=sys.executable, **machine))
    return device


def read_machine_facts(env: dict[str, str]) -> dict[str, Any]:
    """Returns the versions and the GPU that torch reports in a separate process.

    Raises SetupError if torch or transformers cannot be imported.
    """
    try:
        completed = subprocess.run(
            [sys.executable, "-c", FACTS_PROGRAM],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=FACTS_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"torch did not report its GPUs within {FACTS_TIMEOUT_SECONDS} s") from None
    if completed.returncode:
        raise SetupError(f"torch or transformers cannot be imported:\n{completed.stderr.strip()}")
    machine_facts: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return machine_facts


def run_all(groups: list[SuiteGroup], env: dict[str, str], start: float) -> list[Shard]:
    """Runs the groups one after another, each with its time limit. `start`: time.monotonic() of the suite's start."""
    log_dir = BUILD / "gpu" / "logs"
    timeout_factor = 1 if env["RTP_TEST_DEVICE"] == "cuda" else CPU_TIMEOUT_FACTOR
    shutil.rmtree(log_dir, ignore_errors=True)
    log_dir.mkdir(parents=True)
    shards = []
    for group in groups:
        group_start = time.monotonic()
        remaining_seconds = SUITE_SECONDS * timeout_factor - (group_start - start)
        limit = max(1.0, min(group.seconds * timeout_factor, remaining_seconds))
        print(f"{group.name} …", end=" ", flush=True)
        shards += run_group(group, env, log_dir, limit)
        print(f"{time.monotonic() - group_start:.0f} of {limit:.0f} s", flush=True)
    return shards


def write_report(device: str, machine: dict[str, Any], shards: list[Shard], start: float) -> int:
    """Prints the tables and writes the results. Returns the exit code."""
    results = [result for shard in shards for result in shard.results()]
    speeds = [speed for shard in shards for speed in shard.speeds()]
    seconds = time.monotonic() - start
    path = report.results_path(device)
    report.write_results(path, machine, results, speeds, seconds)
    failed = [result for result in results if result.result in report.FAILED_RESULTS]
    print(f"\n{report.format_failures(results)}\n{report.format_results(results)}\n\n{report.format_speeds(speeds)}\n")
    counts = f"{len(results) - len(failed)} passed or skipped, {len(failed)} failed, in {seconds:.0f} s"
    print(f"{counts}; {relative_to_root(path)}, logs in build/gpu/logs")
    return 1 if failed else 0


def relative_to_root(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
