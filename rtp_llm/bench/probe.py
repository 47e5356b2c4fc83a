"""Measures the machine's current rates: bytes per second read from memory, operations per second of matrix products.

Runs in a process of its own, because the load generator must not import torch. Measures once for each line on stdin and
writes the result as a line of JSON to stdout.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

READ_BYTES = 1 << 30  # several times the largest L3 cache of a socket that we know
SIZES = (1024, 2048)  # of the matrices; which is faster depends on the library and the caches
SECONDS = 0.15  # of each measurement


def best_rate(amount: float, operation: Callable[[], object]) -> float:
    """Calls `operation` several times. Returns the rate of the fastest call: `amount` divided by its seconds.

    amount: the work of one call, such as the number of bytes that it reads.
    """
    operation()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        operation()
        best = min(best, time.perf_counter() - start)
    return amount / best


def measure(numbers: torch.Tensor) -> dict[str, float | dict[str, float]]:
    """Returns the memory bandwidth in bytes/s and the operations/s of matrix products by dtype: the fields of
    `bound.MachineRates`. numbers: a tensor, larger than the caches, that is read from memory.
    """
    rates = dict.fromkeys(("bf16", "fp32", "int8"), 0.0)
    for size in SIZES:
        matrix = torch.randn(size, size)
        narrow, small = matrix.bfloat16(), matrix.to(torch.int8)
        products: dict[str, Callable[[], object]] = {
            "bf16": partial(torch.mm, narrow, narrow),
            "fp32": partial(torch.mm, matrix, matrix),
            "int8": partial(torch._int_mm, small, small),
        }
        for name, product in products.items():
            rates[name] = max(rates[name], best_rate(2.0 * size**3, product))
    return {"bandwidth": best_rate(numbers.nbytes, numbers.sum), "operations": rates}


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    numbers = torch.ones(READ_BYTES // 4)
    for _ in sys.stdin:
        print(json.dumps(measure(numbers)), flush=True)


if __name__ == "__main__":
    main()
