"""Tier 1: short programs that use a GPU for real, each in a process of its own that is killed when it hangs.

The doctor itself never loads torch: a hung driver takes the probe with it and leaves the doctor alive.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rtp_llm.machine.gpus import Gpu

SECONDS = 50.0  # most of it for importing torch from a cold disk

PROBE_PREAMBLE = "from rtp_llm.machine.process import die_with_parent\ndie_with_parent()\n"
# A matrix product whose result is known: every element of ones(n, n) @ ones(n, n) is n.
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
# Small and 64 MiB, from one GPU to every other; the pattern differs for each, so that a stale buffer cannot pass.
# A line per direction: the one that hangs is the one that has none.
PEER = """
import json, sys, torch
one, count = int(sys.argv[1]), int(sys.argv[2])
for other in range(count):
    if other == one:
        continue
    for size in (1024, 16 << 20):
        source = torch.arange(size, dtype=torch.int32, device=f"cuda:{one}") * 3 + 1000 * one + other
        target = torch.zeros(size, dtype=torch.int32, device=f"cuda:{other}")
        target.copy_(source)
        torch.cuda.synchronize(other)
        wrong = int((target.cpu() != source.cpu()).sum())
        if wrong:
            break
    print(json.dumps({"other": other, "wrong": wrong, "of": size}), flush=True)
"""


def run_probe(program: str, *arguments: object) -> tuple[list[Any], str]:
    """What the program printed, a line of JSON each, and why there is no more of it (empty at an orderly end)."""
    command = [sys.executable, "-c", PROBE_PREAMBLE + program, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return _lines(text), f"no answer within {SECONDS:.0f} s; the process was killed"
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return _lines(done.stdout), "" if done.returncode == 0 else last[:300]


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.startswith(("{", "["))]


def probe_compute(gpus: Sequence[Gpu]) -> dict[Gpu, str]:
    """What is wrong with each GPU; empty where it computes. Ordinals are CUDA's: the order of `gpus`."""

    def judge(ordinal: int) -> str:
        answers, failure = run_probe(COMPUTE, ordinal)
        wrong = answers[0]["wrong"] if answers else 0
        return failure or (f"{wrong} wrong elements in a product" if wrong else "")

    with ThreadPoolExecutor() as pool:
        return dict(zip(gpus, pool.map(judge, range(len(gpus))), strict=True))


def architectures() -> list[str] | None:
    """torch.cuda.get_arch_list(); None where torch cannot be asked."""
    answers, _ = run_probe(ARCHITECTURES)
    return answers[0] if answers and answers[0] else None


def supports_capability(known: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether machine code of this major generation and no newer minor one is there, or PTX of an older one."""
    major, minor = capability
    for name in known:
        kind, _, digits = name.rstrip("af").partition("_")
        version = (int(digits[:-1]), int(digits[-1])) if digits.isdigit() else (99, 0)
        if kind == "sm" and version[0] == major and version[1] <= minor:
            return True
        if kind == "compute" and version <= (major, minor):
            return True
    return False


def probe_peer_copies(order: Sequence[int]) -> list[tuple[int, int, str]]:
    """(from, to, what is wrong), by NVML index, for every direction that does not deliver. `order`: in CUDA's order."""

    def judge(source: int) -> list[tuple[int, int, str]]:
        answers, failure = run_probe(PEER, source, len(order))
        seen = {answer["other"]: answer for answer in answers}
        found: list[tuple[int, int, str]] = []
        for target in (t for t in range(len(order)) if t != source):
            if target not in seen:
                return [*found, (order[source], order[target], failure or "no answer")]
            if seen[target]["wrong"]:
                text = f"{seen[target]['wrong']} of {seen[target]['of']} numbers are wrong"
                found.append((order[source], order[target], text))
        return found

    with ThreadPoolExecutor() as pool:
        return [failure for failures in pool.map(judge, range(len(order))) for failure in failures]
