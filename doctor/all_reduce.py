"""Tier 3: the plan's own process group, formed for real, and all-reduces of three sizes through it.

`python -m doctor.all_reduce` is one rank: it reads its orders as JSON from stdin and prints what it measured.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from doctor.context import CheckContext
from rtp_llm.machine.process import die_with_parent
from rtp_llm.parallel.plan import Plan

SIZES = (8, 64 << 10, 16 << 20)  # bytes
SECONDS = 55.0
ROUNDS = {8: 50, 64 << 10: 30, 16 << 20: 5}


def measure_all_reduce(ctx: CheckContext, plan: Plan, address: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Runs the ranks of this part. {"failure": text} or {"sizes": {bytes: {"wrong", "seconds"}}, "backend": …}."""
    orders = {"plan": asdict(plan), "address": address, "timeout": seconds - 10, "parent": os.getpid()}
    with ThreadPoolExecutor(plan.local_world_size) as pool:
        found = list(pool.map(lambda rank: _rank({**orders, "rank": rank}, seconds), plan.ranks))
    failures = [
        f"rank {rank}: {answer['failure']}"
        for rank, answer in zip(plan.ranks, found, strict=True)
        if "failure" in answer
    ]
    return {"failure": "; ".join(failures)} if failures else found[0]


def _rank(orders: dict[str, Any], seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "doctor.all_reduce"]
    try:
        done = subprocess.run(
            command, input=json.dumps(orders), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"no end within {seconds:.0f} s; the process was killed"}
    if done.returncode:
        return {"failure": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """One rank. Imports torch, which the doctor itself does not."""
    import torch

    from rtp_llm.parallel.gang_client import leader_host
    from rtp_llm.parallel.group import init_group

    orders = json.load(sys.stdin)
    if os.getppid() != orders["parent"]:  # it ended before the kernel was asked
        return
    plan, rank = Plan.from_json(orders["plan"]), int(orders["rank"])
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if plan.device == "cuda":
        device = torch.device("cuda", rank % plan.local_world_size)
        torch.cuda.set_device(device)
    group = init_group(
        plan,
        rank,
        0,
        host=leader_host(plan),
        address=orders["address"],
        timeout=float(orders["timeout"]),
        device=device,
        shm_prefix=f"rtp-llm-{plan.start_port:012x}-",
    )
    sizes = {}
    for size in SIZES:
        tensor = torch.empty(size // 4, dtype=torch.float32, device=device)
        wrong, rounds = 0, ROUNDS[size]
        started = 0.0
        for number in range(-1, rounds):  # the first sets up what the others use
            if number == 0:
                started = time.monotonic()
            tensor.fill_(float(rank + 1))
            group.all_reduce(tensor)
        wrong = int((tensor != plan.world_size * (plan.world_size + 1) / 2).sum().item())
        sizes[size] = {"wrong": wrong, "seconds": (time.monotonic() - started) / rounds}
    group.close()
    print(json.dumps({"sizes": sizes, "backend": type(group).__name__}))


if __name__ == "__main__":
    die_with_parent()
    main()
