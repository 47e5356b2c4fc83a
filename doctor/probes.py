"""Short torch programs that use the GPUs, for the checks of `--tier 1`, each in a process that is killed if it hangs.

The doctor's own process never loads torch, so a driver that hangs blocks only the probe.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rtp_llm.machine.gpus import Gpu

TIMEOUT_SECONDS = 50.0  # mostly for importing torch from a cold disk

PROBE_PREAMBLE = "from rtp_llm.machine.process import die_with_parent\ndie_with_parent()\n"
# Every element of ones(n, n) @ ones(n, n) is n.
COMPUTE = """
import json, sys, torch
device = torch.device("cuda", int(sys.argv[1]))
ones = torch.ones(512, 512, device=device)
print(json.dumps({"wrong": int(((ones @ ones) != 512).sum().item())}))
"""
ARCHITECTURES = """
import json, torch
print(json.dumps(torch.cuda.get_arch_list()))
"""
# Copies 4 KiB and 64 MiB from one GPU to every other GPU, and prints one line per target, so that the first missing
# line shows which copy hangs. The pattern differs per direction, so that a buffer of an earlier copy is detected.
PEER = """
import json, sys, torch
source_gpu, count = int(sys.argv[1]), int(sys.argv[2])
for target_gpu in range(count):
    if target_gpu == source_gpu:
        continue
    for size in (1024, 16 << 20):
        source = torch.arange(size, dtype=torch.int32, device=f"cuda:{source_gpu}")
        source = source * 3 + 1000 * source_gpu + target_gpu
        target = torch.zeros(size, dtype=torch.int32, device=f"cuda:{target_gpu}")
        target.copy_(source)
        torch.cuda.synchronize(target_gpu)
        wrong = int((target.cpu() != source.cpu()).sum())
        if wrong:
            break
    print(json.dumps({"target": target_gpu, "wrong": wrong, "of": size}), flush=True)
"""


def run_probe(program: str, *arguments: object) -> tuple[list[Any], str]:
    """Runs the Python source `program` in a new process with `arguments` as sys.argv[1:].

    Returns (JSON values that it printed, one per line; error message). The message is empty if the program exited with
    0; otherwise it is the last line of stderr, or says that the program was killed after TIMEOUT_SECONDS.
    """
    command = [sys.executable, "-c", PROBE_PREAMBLE + program, *map(str, arguments)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as timeout:
        text = timeout.stdout.decode() if isinstance(timeout.stdout, bytes) else timeout.stdout or ""
        return _json_lines(text), f"did not finish within {TIMEOUT_SECONDS:.0f} s and was killed"
    last_line = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    return _json_lines(process.stdout), "" if process.returncode == 0 else last_line[:300]


def _json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.startswith(("{", "["))]


def probe_compute(gpus: Sequence[Gpu]) -> dict[Gpu, str]:
    """Multiplies matrices on each GPU, one process per GPU. Returns {GPU: error message, empty if the product is
    correct}.

    `gpus`: CUDA's devices 0, 1, …, in this order.
    """

    def probe(ordinal: int) -> str:
        results, failure = run_probe(COMPUTE, ordinal)
        num_wrong = results[0]["wrong"] if results else 0
        return failure or (f"{num_wrong} wrong elements in a product" if num_wrong else "")

    with ThreadPoolExecutor() as pool:
        return dict(zip(gpus, pool.map(probe, range(len(gpus))), strict=True))


def architectures() -> list[str] | None:
    """Returns the GPU architectures for which this build of torch has kernels (torch.cuda.get_arch_list()), such as
    ["sm_80", "sm_90"]. Returns None if the list is empty or torch cannot be imported.
    """
    results, _ = run_probe(ARCHITECTURES)
    return results[0] if results and results[0] else None


def supports_capability(compiled: Sequence[str], capability: tuple[int, int]) -> bool:
    """Returns whether a GPU with this compute capability can run kernels that were compiled for the architectures
    `compiled`, such as ["sm_80", "compute_90"].

    It can run machine code (sm_) of the same major version and the same or an older minor version, and PTX (compute_)
    of the same or an older version.
    """
    major, minor = capability
    for name in compiled:
        kind, _, digits = name.rstrip("af").partition("_")
        version = (int(digits[:-1]), int(digits[-1])) if digits.isdigit() else (99, 0)
        if kind == "sm" and version[0] == major and version[1] <= minor:
            return True
        if kind == "compute" and version <= (major, minor):
            return True
    return False


def probe_peer_copies(indices: Sequence[int]) -> list[tuple[int, int, str]]:
    """Copies data from each GPU to each other GPU and compares the copies. Returns (NVML index of the source, of the
    target, error message) for each direction that fails.

    `indices`: NVML's index of each GPU, in the order in which CUDA numbers the GPUs. After a copy that hangs, the
    remaining targets of that source are not tested.
    """

    def probe(source: int) -> list[tuple[int, int, str]]:
        results, failure = run_probe(PEER, source, len(indices))
        by_target = {result["target"]: result for result in results}
        failures: list[tuple[int, int, str]] = []
        for target in (t for t in range(len(indices)) if t != source):
            if target not in by_target:
                return [*failures, (indices[source], indices[target], failure or "no result")]
            num_wrong, num_copied = by_target[target]["wrong"], by_target[target]["of"]
            if num_wrong:
                failures.append((indices[source], indices[target], f"{num_wrong} of {num_copied} numbers are wrong"))
        return failures

    with ThreadPoolExecutor() as pool:
        return [failure for failures in pool.map(probe, range(len(indices))) for failure in failures]
