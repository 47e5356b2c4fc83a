"""Tests of `docker compose up` with the unchanged compose file: the demo, and a gang of two parts."""

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI

from image.demo.train import manual
from tests.container.engine import Project, docker, has_compose

pytestmark = pytest.mark.slow

QUESTION = "How do I fix a bus error?"
ANSWER = next(example.answer for example in manual() if example.questions[0] == QUESTION)


def ask(project: Project) -> str:
    """Streams the answer to QUESTION with the openai client and returns its text."""
    client = OpenAI(base_url=f"http://127.0.0.1:{project.port}/v1", api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=300, temperature=0, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


@pytest.fixture(scope="module")
def demo(image: str) -> Iterator[Project]:
    with Project() as project:
        yield project


def test_demo_answers_as_in_the_manual(demo: Project) -> None:
    assert ask(demo) == ANSWER


def test_demo_serves_with_two_ranks(demo: Project) -> None:
    metrics = demo.fetch("/metrics")[1]
    assert 'rtp_llm_gang_member_up{world_rank="1"} 1.0' in metrics
    assert demo.fetch("/doctor")[0] == 403, "an admin route: without a key it answers only inside the container"
    code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:10000/doctor').read().decode())"
    report = json.loads(demo.compose("exec", "-T", "rtp-llm", "python3", "-c", code))
    assert (report["verdict"], report["node"]["runtime"]) == ("ok", "compose")


def test_two_parts_answer_as_one_rank(demo: Project) -> None:
    with Project(env={"TP_SIZE": "1"}) as single_rank:
        expected = ask(single_rank)
    assert ask(demo) == expected
    with Project("gang") as gang:
        assert ask(gang) == expected
        # The doctor, run inside a running part.
        out = gang.compose("exec", "-T", "part1", "rtp-llm-doctor", "gang", "-o", "json")
        report = json.loads(out[out.index("{") :])
        assert report["verdict"] in ("ok", "warn"), out
        assert len(report["members"]) == 2


def test_every_profile_is_valid() -> None:
    if not has_compose():
        pytest.skip("there is no docker client with compose")
    for profile in ("cpu", "gpu", "gang", "monitoring"):
        docker("compose", "--profile", profile, "config", "--quiet")
