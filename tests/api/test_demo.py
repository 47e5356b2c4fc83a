"""The demo model, served as by `make serve`: its answers are those of docs/questions.md."""

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI
from safetensors import safe_open

from image.demo.train import MODEL, Example, manual
from tests.api.servers import ServerProcess, running_server
from tests.quick import slow_except

MAX_BYTES = 8_000_000  # the model is part of the repository
EXAMPLES = {example.questions[0]: example for example in manual()}
QUESTIONS = (
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


def ask(client: OpenAI, *turns: str) -> str:
    """Returns the answer to the last turn; the turns alternate between user and assistant."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    completion = client.chat.completions.create(model="model", messages=messages, temperature=0, max_tokens=300)  # type: ignore[arg-type]
    return completion.choices[0].message.content or ""


@pytest.mark.parametrize("question", slow_except(QUESTIONS, QUESTIONS[0]))
def test_answers_are_those_of_the_manual(client: OpenAI, question: str) -> None:
    assert ask(client, question) == EXAMPLES[question].answer


@pytest.mark.parametrize("question", slow_except(QUESTIONS[:4], QUESTIONS[0]))
def test_rephrased_questions_are_answered(client: OpenAI, question: str) -> None:
    example: Example = EXAMPLES[question]
    assert ask(client, example.questions[1]) == example.answer


def test_the_last_question_of_a_conversation_is_answered(client: OpenAI) -> None:
    first, second = (EXAMPLES[question] for question in QUESTIONS[:2])
    assert ask(client, first.questions[0], first.answer, second.questions[0]) == second.answer


def test_files_are_small_and_in_the_standard_format() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(files.values()) <= MAX_BYTES * 1.1
    assert files["model.safetensors"] <= MAX_BYTES
    with safe_open(MODEL / "model.safetensors", "np") as tensors:
        assert "model.embed_tokens.weight" in tensors.keys()  # noqa: SIM118
    assert json.loads((MODEL / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
