"""No event holds a character at which a reader of lines splits it, whatever the client and the model write."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtp_llm.api.compact_json import compact_json
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput

BREAKS = "a\u0085b\u2028c\u2029d"
MESSAGES = [{"role": "user", "content": BREAKS}]
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": BREAKS, "echo": True},
    "/v1/responses": {"input": BREAKS, "instructions": BREAKS, "metadata": {BREAKS: BREAKS}},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    "/": {"prompt": BREAKS},
}


@given(st.recursive(st.text() | st.text("\u0085\u2028\u2029\ud800\\u"), lambda v: st.dictionaries(st.text(), v)))
def test_json_is_one_line_of_utf8(value: Any) -> None:
    text = compact_json(value)
    assert text.encode().decode().splitlines() == [text]
    assert json.loads(text) == value


@pytest.mark.parametrize("path", STREAMS)
def test_events_are_lines_for_every_reader(start_api: StartApi, byte_model: ByteModel, path: str) -> None:
    api = start_api(lambda submission: [ScriptedOutput(byte_model.tokens(BREAKS), "length")])
    raw = api.stream(path, {**STREAMS[path], "stream": True}).decode()
    assert "\\u2028" in raw
    assert raw.splitlines() == re.split("\r?\n", raw)[:-1]


def test_an_echoed_unpaired_surrogate_is_escaped(start_api: StartApi, byte_model: ByteModel) -> None:
    api = start_api(lambda submission: [ScriptedOutput(byte_model.tokens("a"), "length")])
    with api.client() as client:
        for stream in (False, True):
            body = json.dumps({"input": "Hi", "metadata": {"key": "\ud800"}, "stream": stream})
            assert '"key":"\\ud800"' in client.post("/v1/responses", content=body).text
