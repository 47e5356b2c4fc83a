"""A part in a memory cgroup that is smaller than the KV cache which its settings allow."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.parallel.parts import Part
from tests.ports import free_start_port

LIMIT_BYTES = 768 << 20  # so little that the KV cache is not populated before it is used
BYTES_LEFT = 380 << 20
NUM_STREAMS, PROMPT_TOKENS = 32, 2000  # whose KV cache takes 256 MiB
OOM_FOLDER = Path(__file__).with_name("oom")
ENTER = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"')

pytestmark = pytest.mark.slow


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A new memory cgroup (v1 or v2) with a limit of LIMIT_BYTES."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    root, limit_name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if not root.exists():
        root, limit_name = Path("/sys/fs/cgroup"), "memory.max"
    path = root / own.get("memory", own.get("", "/")).strip("/") / f"rtp-test-{secrets.token_hex(4)}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be created at {path}: {error}")
    try:
        (path / limit_name).write_text(str(LIMIT_BYTES))
    except OSError as error:
        path.rmdir()
        pytest.skip(f"{path} cannot limit memory: {error}")
    yield path
    with suppress(OSError):  # processes that a failed test left behind
        path.rmdir()


def body(number: int) -> dict[str, Any]:
    """Returns a request whose prompt shares no block with those of other numbers."""
    prompt = [3 + (number * 31 + 7 * position) % 1000 for position in range(PROMPT_TOKENS)]
    return {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}


def complete_all(part: Part) -> list[str]:
    def complete(number: int) -> str:
        url = f"http://127.0.0.1:{part.port}/v1/completions"
        request = Request(url, json.dumps(body(number)).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=240) as response:  # requests wait until others have ended
            text: str = json.load(response)["choices"][0]["text"]
            return text

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(complete, range(NUM_STREAMS)))


@contextmanager
def occupied(cgroup: Path, num_bytes_left: int) -> Iterator[None]:
    """A process that the kernel does not choose to kill takes the memory of the cgroup, but for `num_bytes_left`."""
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    is_v1 = (cgroup / "memory.usage_in_bytes").exists()
    used = int((cgroup / ("memory.usage_in_bytes" if is_v1 else "memory.current")).read_text())
    cached = sum(int(stat[f"{'total_' if is_v1 else ''}{kind}_file"]) for kind in ("active", "inactive"))
    script = (
        "import sys; open('/proc/self/oom_score_adj', 'w').write('-1000'); taken = bytearray(b'1') * int(sys.argv[1]);"
        " print(flush=True); sys.stdin.read()"
    )
    size = LIMIT_BYTES - (used - cached) - num_bytes_left
    command = [*ENTER, os.fspath(cgroup), sys.executable, "-c", script, str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline(), f"{size} bytes could not be taken"
        yield
        assert process.poll() is None
        process.stdin.close()


def test_requests_are_preempted_where_the_kernel_would_kill(settings: dict[str, str], memory_cgroup: Path) -> None:
    env = {**settings, "CONCURRENCY_LIMIT": str(NUM_STREAMS), "REUSE_CACHE": "0", "RTP_DOCTOR": "off"}
    # Without a spare, which takes memory when it imports torch: at some time after the rest of it has been measured.
    env |= {"ACT_TYPE": "fp32", "KV_CACHE_MEM_MB": "300", "RTP_RECOVERY": "restart"}
    del env["TEST_BLOCK_NUM"]
    port = free_start_port()
    with Part({**env, "START_PORT": str(port)}, port=port) as part:
        expected = complete_all(part.wait_healthy())
    port = free_start_port()
    with Part({**env, "START_PORT": str(port)}, port=port, inside=(*ENTER, os.fspath(memory_cgroup))) as part:
        part.inside = ()  # the client stays outside
        epoch = part.wait_healthy().epoch
        with occupied(memory_cgroup, BYTES_LEFT):
            assert complete_all(part) == expected
        assert part.epoch == epoch, f"a rank was lost\n{part.log}"


def test_a_step_that_runs_out_of_memory_on_one_rank_is_repeated_smaller(settings: dict[str, str]) -> None:
    """Rank 0 waits for rank 1 in a collective of the step, so it must be told to leave it."""
    env = {**settings, "MAX_BATCH_TOKENS_SIZE": "64", "TEST_BLOCK_NUM": "256"}
    request = {**body(0), "prompt": body(0)["prompt"][:200]}
    port = free_start_port()
    with Part({**env, "START_PORT": str(port)}, port=port) as part:
        expected = part.wait_healthy().complete(request)
    port = free_start_port(2)
    env |= {"START_PORT": str(port), "TP_SIZE": "2", "WORLD_SIZE": "2", "PYTHONPATH": str(OOM_FOLDER)}
    with Part(env, port=port, ranks=2) as part:
        epoch = part.wait_healthy().epoch
        assert part.complete(request) == expected
        assert "rank 1 ran out of memory in a step" in part.log
        assert "a step computes at most 32 tokens" in part.log
        assert part.complete(request) == expected
        assert part.epoch == epoch + 1
        assert part.log.count("MB of weights in") == 2, "each rank has read its weights once"
