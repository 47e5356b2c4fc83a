"""The demo model, served as `make serve` serves it: what it says is what docs/questions.md says."""

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI
from safetensors import safe_open

from image.demo.train import MODEL, Example, manual
from tests.api.servers import ServerProcess, running_server

LARGEST = 8_000_000  # bytes; it is in the repository
LESSONS = {lesson.questions[0]: lesson for lesson in manual()}
ASKED = (
    "How do I fix a bus error?",
    "How do I start it?",
    "How do I use several machines?",
    "Which ports are used?",
    "What does exit code 75 mean?",
    "What happens when a rank dies?",
    "How do I run it in Kubernetes?",
    "What is the capital of France?",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    output = tmp_path_factory.mktemp("demo") / "output"
    with running_server(MODEL, output, TP_SIZE="2", WORLD_SIZE="2", TEST_BLOCK_NUM="256") as started:
        yield started


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


def ask(client: OpenAI, *said: str) -> str:
    """The answer to the last of what was said, the user's and the model's turns by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    made = client.chat.completions.create(model="model", messages=messages, temperature=0, max_tokens=300)  # type: ignore[arg-type]
    return made.choices[0].message.content or ""


@pytest.mark.parametrize("question", ASKED)
def test_it_answers_as_the_manual_does(client: OpenAI, question: str) -> None:
    assert ask(client, question) == LESSONS[question].answer


@pytest.mark.parametrize("question", ASKED[:4])
def test_in_other_words_too(client: OpenAI, question: str) -> None:
    lesson: Example = LESSONS[question]
    assert ask(client, lesson.questions[1]) == lesson.answer


def test_the_last_question_of_a_conversation_is_answered(client: OpenAI) -> None:
    first, second = (LESSONS[question] for question in ASKED[:2])
    assert ask(client, first.questions[0], first.answer, second.questions[0]) == second.answer


def test_it_is_small_and_of_the_usual_form() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(files.values()) <= LARGEST * 1.1
    assert files["model.safetensors"] <= LARGEST
    with safe_open(MODEL / "model.safetensors", "np") as tensors:
        assert "model.embed_tokens.weight" in tensors.keys()  # noqa: SIM118
    assert json.loads((MODEL / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
