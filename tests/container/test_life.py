"""A container's life: refused, served, hurt, given up, stopped under load; and the codes that Docker is given."""

import json
import threading

import pytest

from tests.container.engine import Container, docker, until

TWO = {"TP_SIZE": "2", "RTP_THREADS": "1", "WARM_UP": "0", "TEST_BLOCK_NUM": "256"}
SHORT = {"prompt": "A large language model is", "max_tokens": 12, "temperature": 0}
LONG = {"prompt": "A large language model is", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}


def test_too_little_shared_memory_is_refused(image: str) -> None:
    with Container("--shm-size=2m", env=TWO) as container:
        assert container.wait_end() == 75
        assert "S-01 /dev/shm has 2.0 MiB" in container.log
        assert "docker run --shm-size=2g" in container.log


@pytest.mark.parametrize(
    ("env", "code", "said"),
    [
        ({"START_PORT": "tcp://10.96.0.7:80"}, 64, "enableServiceLinks: false"),
        ({"TP_SIZE": "0"}, 64, "TP_SIZE='0': not valid; allowed: an integer from 1"),
        ({"CHECKPOINT_PATH": "/etc"}, 65, "/etc/config.json: cannot be read: No such file or directory"),
    ],
)
def test_what_it_was_given_wrong_is_its_exit_code(image: str, env: dict[str, str], code: int, said: str) -> None:
    with Container(env=env) as container:
        assert container.wait_end() == code
        assert said in container.log


def test_it_takes_as_many_files_as_it_may(image: str) -> None:
    """Docker's own first limit is often 1024, which a thousand clients spend."""
    with Container("--ulimit=nofile=1024:4096", env=TWO) as container:
        metrics = container.wait_healthy().fetch("/metrics")[1]
        for program in ('program="api",rank=""', 'program="rank1",rank="1"'):
            assert f"rtp_llm_process_max_fds{{{program}}} 4096.0" in metrics


def test_a_rank_killed_inside_is_replaced_and_nothing_is_lost(image: str) -> None:
    with Container(env=TWO) as container:
        container.wait_healthy()
        before = container.complete(SHORT)
        container.kill_rank(1)
        assert container.complete(SHORT) == before
        container.wait_healthy()
        assert "restarting group ranks in" in container.log
        assert container.python("import os; print(os.listdir('/dev/shm'))") == "[]"


def test_a_spent_budget_ends_the_container_with_70(image: str) -> None:
    with Container(env={**TWO, "RESTART_LIMIT": "1"}) as container:
        container.wait_healthy()
        container.kill_rank(0)
        until(lambda: "restarting group ranks in" in container.log, "the first restart")
        container.wait_healthy()
        container.kill_rank(0)
        assert container.wait_end() == 70
        assert "the budget of 1 restarts in 10 minutes is spent" in container.log


def test_a_stop_under_load_loses_no_request(image: str) -> None:
    """Every request that was accepted before SIGTERM gets its whole answer; the code is 0."""
    answers: list[tuple[int, str]] = []
    with Container(env={**TWO, "CONCURRENCY_LIMIT": "4"}) as container:
        container.wait_healthy()
        threads = [
            threading.Thread(target=lambda: answers.append(container.fetch("/v1/completions", LONG))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        until(lambda: 'rtp_llm_num_requests_running{model_name="model"} 4.0' in container.fetch("/metrics")[1], "load")
        container.stop()
        for thread in threads:
            thread.join(60)
        assert container.state["ExitCode"] == 0
        assert [status for status, _ in answers] == [200] * 6
        for _, text in answers:
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            assert events[-1]["choices"][0]["finish_reason"] == "length", text[-500:]
            assert text.rstrip().endswith("data: [DONE]")


def test_log_lines_can_be_json(image: str) -> None:
    with Container(env={**TWO, "LOG_FORMAT": "json"}) as container:
        container.wait_healthy()
        events = [json.loads(line) for line in container.log.splitlines()]
        assert {"start_server", "part0 rank0", "part0 rank1", "part0 api"} <= {event["who"] for event in events}


@pytest.mark.parametrize(
    ("option", "id", "remedy"),
    [
        ("--pids-limit=30", "L-03", "--pids-limit=-1"),
        ("--memory=256m", "L-05", "docker run --memory=2g"),
        ("--ulimit=nofile=200:200", "L-02", "--ulimit nofile=1048576:1048576"),
    ],
)
def test_limits_that_docker_sets_are_found(image: str, option: str, id: str, remedy: str) -> None:
    out = docker(
        "run", "--rm", option, *(f"--env={n}={v}" for n, v in TWO.items()), image, "rtp-llm-doctor", check=False
    )
    assert f"× {id} " in out  # noqa: RUF001
    assert out.count("×") == 2, out  # noqa: RUF001  # the category and the check
    assert remedy in out
