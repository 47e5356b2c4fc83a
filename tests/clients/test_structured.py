"""Structured output of the demo model, which knows nothing of schemas: what clients return is valid all the same."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from image.demo.train import MODEL
from tests.api.servers import ServerProcess, running_server
from tests.sdk_clients import openai_client

pytestmark = pytest.mark.slow


class Report(BaseModel):
    """What the demo model has to fill in."""

    severity: Literal["low", "high"]
    ports: list[Literal[80, 443]]
    is_fixed: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    output = tmp_path_factory.mktemp("structured") / "output"
    with running_server(MODEL, output, TEST_BLOCK_NUM="256") as started:
        yield started


def test_openai_parses_a_model(server: ServerProcess) -> None:
    with openai_client(server.url) as client:
        completion = client.chat.completions.parse(
            model="any", messages=[{"role": "user", "content": "Report."}], response_format=Report, max_tokens=200
        )
    assert isinstance(completion.choices[0].message.parsed, Report)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # langchain's, of its own stream
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("streams", [False, True])
def test_langchain_returns_a_model(server: ServerProcess, method: str, streams: bool) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="not installed: make test-clients")
    chat = langchain_openai.ChatOpenAI(
        model="any", base_url=f"{server.url}/v1", api_key="none", max_retries=0, max_tokens=200
    )
    structured: Any = chat.with_structured_output(Report, method=method, strict=True)  # else the model adds keys
    result = list(structured.stream("Report."))[-1] if streams else structured.invoke("Report.")
    assert isinstance(result, Report)
