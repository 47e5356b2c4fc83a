"""`docker compose up`, with no file edited: the demo, and a gang of two parts."""

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.container.engine import Project, docker

SHORT = {"prompt": "A large language model is", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def demo(image: str) -> Iterator[Project]:
    with Project() as project:
        yield project


def test_it_serves_and_answers_an_openai_client(demo: Project) -> None:
    client = OpenAI(base_url=f"http://127.0.0.1:{demo.port}/v1", api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=16, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_two_ranks_serve(demo: Project) -> None:
    metrics = demo.fetch("/metrics")[1]
    assert 'rtp_llm_gang_member_up{world_rank="1"} 1.0' in metrics
    report = json.loads(demo.fetch("/doctor")[1])
    assert (report["verdict"], report["node"]["runtime"]) == ("ok", "compose")


def test_two_parts_say_what_one_rank_says(demo: Project) -> None:
    with Project(env={"TP_SIZE": "1"}) as alone:
        expected = alone.complete(SHORT)
    assert demo.complete(SHORT) == expected
    with Project("gang") as gang:
        assert gang.complete(SHORT) == expected
        # Its own doctor, from inside the running part.
        out = gang.compose("exec", "-T", "part1", "rtp-llm-doctor", "gang", "-o", "json")
        report = json.loads(out[out.index("{") :])
        assert report["verdict"] in ("ok", "warn"), out
        assert len(report["members"]) == 2


def test_every_profile_is_valid() -> None:
    for profile in ("cpu", "gpu", "gang", "monitoring"):
        docker("compose", "--profile", profile, "config", "--quiet")
