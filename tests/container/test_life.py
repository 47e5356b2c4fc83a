"""Tests the life cycle of a container: rejected start, lost rank, spent restart budget, stop under load, exit codes."""

import json
import threading

import pytest

from tests.container.engine import Container, docker, wait_until

pytestmark = pytest.mark.slow

TWO_RANKS = {"TP_SIZE": "2", "RTP_THREADS": "1", "WARM_UP": "0", "TEST_BLOCK_NUM": "256"}
SHORT = {"prompt": "A large language model is", "max_tokens": 12, "temperature": 0}
LONG = {"prompt": "A large language model is", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}


def test_too_little_shared_memory_exits_75(image: str) -> None:
    with Container("--shm-size=2m", env=TWO_RANKS) as container:
        assert container.wait_exit() == 75
        assert "S-01 /dev/shm has 2.0 MiB" in container.log
        assert "docker run --shm-size=2g" in container.log


@pytest.mark.parametrize(
    ("env", "code", "message"),
    [
        ({"START_PORT": "tcp://10.96.0.7:80"}, 64, "enableServiceLinks: false"),
        ({"TP_SIZE": "0"}, 64, "TP_SIZE='0': not valid; allowed: an integer from 1"),
        ({"CHECKPOINT_PATH": "/etc"}, 65, "/etc/config.json: cannot be read: No such file or directory"),
    ],
)
def test_invalid_input_sets_exit_code(image: str, env: dict[str, str], code: int, message: str) -> None:
    with Container(env=env) as container:
        assert container.wait_exit() == code
        assert message in container.log


def test_open_files_limit_is_raised_to_the_hard_limit(image: str) -> None:
    """Docker's default soft limit is often 1024, which a thousand clients exhaust."""
    with Container("--ulimit=nofile=1024:4096", env=TWO_RANKS) as container:
        metrics = container.wait_healthy().fetch("/metrics")[1]
        for program in ('program="api",rank=""', 'program="rank1",rank="1"'):
            assert f"rtp_llm_process_max_fds{{{program}}} 4096.0" in metrics


def test_killed_rank_is_replaced_and_no_request_is_lost(image: str) -> None:
    with Container(env=TWO_RANKS) as container:
        container.wait_healthy()
        before = container.complete(SHORT)
        container.kill_rank(1)
        assert container.complete(SHORT) == before
        container.wait_healthy()
        assert "lost rank1 (killed by a signal); restarting it in" in container.log
        assert container.python("import os; print(os.listdir('/dev/shm'))") == "[]"


def test_spent_restart_budget_exits_70(image: str) -> None:
    with Container(env={**TWO_RANKS, "RESTART_LIMIT": "1"}) as container:
        container.wait_healthy()
        container.kill_rank(0)
        wait_until(lambda: "lost rank0 (killed by a signal); restarting it in" in container.log, "the first restart")
        container.wait_healthy()
        container.kill_rank(0)
        assert container.wait_exit() == 70
        assert "the budget of 1 restarts in 10 minutes is spent" in container.log


def test_stop_under_load_loses_no_request(image: str) -> None:
    """Every request that was accepted before SIGTERM gets its complete response; the exit code is 0."""
    responses: list[tuple[int, str]] = []
    with Container(env={**TWO_RANKS, "CONCURRENCY_LIMIT": "4"}) as container:
        container.wait_healthy()
        threads = [
            threading.Thread(target=lambda: responses.append(container.fetch("/v1/completions", LONG)))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        wait_until(
            lambda: 'rtp_llm_num_requests_running{model_name="model"} 4.0' in container.fetch("/metrics")[1], "load"
        )
        container.stop()
        for thread in threads:
            thread.join(60)
        assert container.state["ExitCode"] == 0
        assert [status for status, _ in responses] == [200] * 6
        for _, text in responses:
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            assert events[-1]["choices"][0]["finish_reason"] == "length", text[-500:]
            assert text.rstrip().endswith("data: [DONE]")


def test_log_lines_can_be_json(image: str) -> None:
    with Container(env={**TWO_RANKS, "LOG_FORMAT": "json"}) as container:
        container.wait_healthy()
        events = [json.loads(line) for line in container.log.splitlines()]
        assert {"start_server", "part0 rank0", "part0 rank1", "part0 api"} <= {event["who"] for event in events}


@pytest.mark.parametrize(
    ("option", "id", "fix"),
    [
        ("--pids-limit=30", "L-03", "--pids-limit=-1"),
        ("--memory=256m", "L-05", "docker run --memory=2g"),
        ("--ulimit=nofile=200:200", "L-02", "--ulimit nofile=1048576:1048576"),
    ],
)
def test_doctor_finds_limits_that_docker_sets(image: str, option: str, id: str, fix: str) -> None:
    out = docker(
        "run", "--rm", option, *(f"--env={n}={v}" for n, v in TWO_RANKS.items()), image, "rtp-llm-doctor", check=False
    )
    assert f"× {id} " in out  # noqa: RUF001
    assert out.count("×") == 2, out  # noqa: RUF001  # the category and the check
    assert fix in out
