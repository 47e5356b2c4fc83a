"""The all-reduce of `rtp-llm-doctor --tier 3`: starts the ranks of this part, forms the process group with all parts
and times all-reduces of three sizes.

`python -m doctor.all_reduce` runs one rank. It reads one JSON object (the plan, i.e. the gang's layout, the rank
number, this part's address and a timeout) from stdin, and prints its measurements as JSON.
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

TIMEOUT_SECONDS = 55.0
ITERATIONS = {8: 50, 64 << 10: 30, 16 << 20: 5}  # size of the tensor in bytes: number of all-reduces


def measure_all_reduce(ctx: CheckContext, plan: Plan, address: str, seconds: float = TIMEOUT_SECONDS) -> dict[str, Any]:
    """Starts one process for each rank of this part. The processes time all-reduces with the ranks of all parts, and
    are killed after `seconds`. `address`: IP address of this part, on which its ranks listen.

    Returns {"failure": error messages of the failed ranks}, or {"sizes": {message size in bytes: {"wrong": number of
    wrong elements, "seconds": time of one all-reduce}}, "backend": class name of the process group}.
    """
    task = {"plan": asdict(plan), "address": address, "timeout": seconds - 10, "parent": os.getpid()}
    with ThreadPoolExecutor(plan.local_world_size) as pool:
        results = list(pool.map(lambda rank: _run_rank({**task, "rank": rank}, seconds), plan.ranks))
    failures = [
        f"rank {rank}: {result['failure']}"
        for rank, result in zip(plan.ranks, results, strict=True)
        if "failure" in result
    ]
    return {"failure": "; ".join(failures)} if failures else results[0]


def _run_rank(task: dict[str, Any], seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "doctor.all_reduce"]
    try:
        process = subprocess.run(
            command, input=json.dumps(task), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"no result within {seconds:.0f} s; the process was killed"}
    if process.returncode:
        return {"failure": (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1][:300]}
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Runs one rank of the measurement. `measure_all_reduce` starts this function in a process of its own, because it
    imports torch, and a hang of torch or the driver must not block the doctor.
    """
    import torch

    from rtp_llm.parallel.group import init_group
    from rtp_llm.parallel.ports import leader_host

    task = json.load(sys.stdin)
    if os.getppid() != task["parent"]:  # the parent exited before die_with_parent took effect
        return
    plan, rank = Plan.from_json(task["plan"]), int(task["rank"])
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if plan.device == "cuda":
        device = torch.device("cuda", rank % plan.local_world_size)
        torch.cuda.set_device(device)
    group = init_group(
        plan,
        rank,
        "doctor",
        host=leader_host(plan),
        address=task["address"],
        timeout=float(task["timeout"]),
        device=device,
        shm_prefix=f"rtp-llm-{plan.start_port:012x}-",
    )
    sizes = {}
    for size, iterations in ITERATIONS.items():
        tensor = torch.empty(size // 4, dtype=torch.float32, device=device)
        started = 0.0
        for iteration in range(-1, iterations):  # the first one warms up
            if iteration == 0:
                started = time.monotonic()
            tensor.fill_(float(rank + 1))
            group.all_reduce(tensor)
        num_wrong = int((tensor != plan.world_size * (plan.world_size + 1) / 2).sum().item())
        sizes[size] = {"wrong": num_wrong, "seconds": (time.monotonic() - started) / iterations}
    group.close()
    print(json.dumps({"sizes": sizes, "backend": type(group).__name__}))


if __name__ == "__main__":
    die_with_parent()
    main()
