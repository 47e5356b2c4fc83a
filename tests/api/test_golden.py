"""Compares the exact bytes of streams with golden files, for the OpenAI API and the native API (that of
alibaba/rtp-llm).

A fake engine sends known tokens, so the result does not depend on a model, a CPU or a tokenizer's training. Ids and
times are masked. After an intended change, regenerate the files and review the difference:

    REGENERATE_GOLDEN=1 python -m pytest tests/api/test_golden.py && git diff tests/api/golden
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.contract.engine_output import FinishReason, Logprob
from rtp_llm.text.tool_formats import TOOL_FORMATS
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.api.sse import split_events

GOLDEN_DIR = Path(__file__).parent / "golden"
MASKS = (
    (rb'"id":"(chatcmpl|cmpl)-[0-9a-f]{24}"', rb'"id":"\1-MASKED"'),
    (rb'"id":"(call_[0-9a-f]{24}|[0-9A-Za-z]{9})"', rb'"id":"call_MASKED"'),
    (rb'"created":\d{10}\b', rb'"created":0'),
    (rb'"(cost_time|first_token_cost_time)":\d+(\.\d+)?(e-\d+)?', rb'"\1":0.0'),
)
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "seed": 1}
COMPLETION: dict[str, Any] = {"prompt": "Once", "stream": True, "seed": 1}
NATIVE: dict[str, Any] = {"prompt": "Once", "generate_config": {"random_seed": 1}}
USAGE = {"stream_options": {"include_usage": True}}


def mask_variable_parts(raw: bytes) -> bytes:
    for pattern, mask in MASKS:
        raw = re.sub(pattern, mask, raw)
    return raw


def assert_matches_golden(name: str, raw: bytes) -> None:
    """Compares with the golden file `name`, or writes it with REGENERATE_GOLDEN=1."""
    path = GOLDEN_DIR / f"{name}.sse"
    if os.environ.get("REGENERATE_GOLDEN"):
        path.write_bytes(mask_variable_parts(raw))
    assert path.exists(), f"no {path}: see this file's first lines"
    assert mask_variable_parts(raw) == path.read_bytes()


def scripted_outputs(
    model: ByteModel, *texts: str | bytes, finish: FinishReason | None = "stop", **last: Any
) -> list[ScriptedOutput]:
    """Returns one output per text. The last output has the finish reason `finish`; if it is "stop", that is an
    additional output with the end-of-sequence token."""
    outputs = [ScriptedOutput(model.tokens(text)) for text in texts]
    if finish == "stop":
        return [*outputs, ScriptedOutput([model.end], finish, **last)]
    return [*outputs[:-1], ScriptedOutput(outputs[-1].tokens, finish, **last)]


def with_logprobs(model: ByteModel, text: str, top: int) -> list[ScriptedOutput]:
    """Returns one output per token, with decreasing logprobs. Besides the token itself, its top logprobs contain "a"
    and "b"."""
    other_tokens = [(model.tokens(letter)[0], -3.5) for letter in "ab"]

    def logprob(position: int, token: int) -> Logprob:
        value = -0.5 * (position + 1)
        return (value, 0, [(token, value), *other_tokens][:top])

    outputs = [ScriptedOutput([token], None, [logprob(i, token)]) for i, token in enumerate(model.tokens(text))]
    return [*outputs, ScriptedOutput([model.end], "stop", [logprob(9, model.end)])]


SCRIPTED: dict[str, tuple[str, dict[str, Any], Callable[[ByteModel], list[ScriptedOutput]]]] = {
    "chat": ("/v1/chat/completions", CHAT, lambda m: scripted_outputs(m, "Hello", " wor", "ld")),
    "chat-usage": (
        "/v1/chat/completions",
        {**CHAT, **USAGE},
        lambda m: scripted_outputs(m, b"na\xc3", b"\xafve \xf0\x9f", b"\x9a", b"\x80", finish="length"),
    ),
    "chat-logprobs": (
        "/v1/chat/completions",
        {**CHAT, "logprobs": True, "top_logprobs": 2},
        lambda m: with_logprobs(m, "né", 2),
    ),
    "chat-stop-string": (
        "/chat/completions",
        {**CHAT, **USAGE, "stop": ["END", "never"]},
        lambda m: scripted_outputs(m, "one EN", "ough E", "N", "D two", " three"),
    ),
    "chat-error": (
        "/v1/chat/completions",
        CHAT,
        lambda m: [ScriptedOutput(m.tokens("Hel")), ScriptedOutput([], "error", error="the engine fell over")],
    ),
    "completion": (
        "/v1/completions",
        COMPLETION,
        lambda m: scripted_outputs(m, " upon", " a", " time", finish="length"),
    ),
    "completion-echo-logprobs": (
        "/v1/completions",
        {**COMPLETION, **USAGE, "echo": True, "logprobs": 1},
        lambda m: _with_prompt_logprobs(with_logprobs(m, " é", 1), m),
    ),
    "completion-echo-only": (
        "/v1/completions",
        {**COMPLETION, **USAGE, "echo": True, "max_tokens": 0},
        lambda m: scripted_outputs(m, "x", finish="length"),
    ),
    "native-yield-generator": (
        "/",
        {**NATIVE, "yield_generator": True},
        lambda m: scripted_outputs(m, "upon", " a", " time", finish="stop"),
    ),
    "native-stream": ("/", {**NATIVE, "stream": True}, lambda m: scripted_outputs(m, "upon", " a", finish="length")),
    "native-incremental": (
        "/",
        {**NATIVE, "yield_generator": True, "return_incremental": True, "return_output_ids": True},
        lambda m: scripted_outputs(m, "up", "on", finish="length"),
    ),
    "native-error": (
        "/",
        {**NATIVE, "yield_generator": True},
        lambda m: [ScriptedOutput(m.tokens("up")), ScriptedOutput([], "error", error="the engine fell over")],
    ),
}


def _with_prompt_logprobs(outputs: list[ScriptedOutput], model: ByteModel) -> list[ScriptedOutput]:
    """Adds the logprobs of all prompt tokens but the first to the first output."""
    first = outputs[0]
    prompt_logprobs: list[Logprob] = [(-4.0 - i, 0, [(token, -1.0)]) for i, token in enumerate(model.tokens("nce"))]
    return [ScriptedOutput(first.tokens, first.finish, first.logprobs, prompt_logprobs), *outputs[1:]]


@pytest.mark.parametrize("name", SCRIPTED)
def test_stream_of_one_sequence(name: str, start_api: StartApi, byte_model: ByteModel) -> None:
    path, body, script = SCRIPTED[name]
    assert_matches_golden(name, start_api(lambda submission: script(byte_model)).stream(path, body))


# Tool calls, as each format writes them.

CALLS = {
    "hermes": '<tool_call>\n{"name": "now", "arguments": {"zone": "Zürich"}}\n</tool_call>',
    "llama3_json": '{"name": "now", "parameters": {"zone": "Zürich"}}',
    "mistral": '[TOOL_CALLS][{"name": "now", "arguments": {"zone": "Zürich"}}]',
    "pythonic": '[now(zone="Zürich")]',
    "qwen3_coder": "<tool_call>\n<function=now>\n<parameter=zone>\nZürich\n</parameter>\n</function>\n</tool_call>",
}
NOW: dict[str, Any] = {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_stream_of_a_tool_call(name: str, start_api: StartApi, byte_model: ByteModel) -> None:
    text = f"I look.\n{CALLS[name]}"
    steps = [text[start : start + 9] for start in range(0, len(text), 9)]
    api = start_api(lambda submission: scripted_outputs(byte_model, *steps), tool_call_parser=name)
    body = {**CHAT, **USAGE, "tools": [{"type": "function", "function": NOW}]}
    assert_matches_golden(f"chat-call-{name}", api.stream("/v1/chat/completions", body))


# Several sequences. The test sends each output after it has read the events of the last one, which fixes their order.


class InterleavedStream:
    """The events of one stream, and its sequences in the order of their submission."""

    def __init__(self, api: ApiServer, stream: Iterator[bytes], num_sequences: int):
        self.api, self.stream = api, stream
        self.sequences: list[Submission] = []
        self.num_sequences = num_sequences
        self.read = b""

    def read_events(self, num_events: int) -> None:
        for _ in range(num_events):
            self.read += next(self.stream)

    def send_and_read(self, *outputs: tuple[int, ScriptedOutput], num_events: int) -> None:
        """Sends the outputs in one frame and reads `num_events` events. Each output is a pair: (index of its sequence,
        output)."""
        if not self.sequences:
            self.sequences = [self.api.engine.next_submission() for _ in range(self.num_sequences)]
        self.api.engine.send_frame(*(output.for_request(self.sequences[i].id) for i, output in outputs))
        self.read_events(num_events)


def send_interleaved(stream: InterleavedStream, model: ByteModel, *, events_per_finish: int) -> None:
    """Sends interleaved outputs of two sequences. `events_per_finish`: number of events that the API sends for an
    output that has both text and a finish reason."""

    def output(text: str, finish: FinishReason | None = None) -> ScriptedOutput:
        return ScriptedOutput(model.tokens(text), finish)

    stream.send_and_read((0, output("a1")), (1, output("b1")), num_events=2)
    stream.send_and_read((1, output(" b2")), num_events=1)
    stream.send_and_read((1, output(" b3", "length")), (0, output(" a2")), num_events=events_per_finish + 1)
    stream.send_and_read((0, ScriptedOutput([model.end], "stop")), num_events=1)
    stream.read += b"".join(stream.stream)


INTERLEAVED: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "chat-n2": (
        "/v1/chat/completions",
        {**CHAT, "n": 2, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        2,
        2,
    ),
    "completion-prompts": ("/v1/completions", {**COMPLETION, **USAGE, "prompt": ["One", "Two"]}, 0, 1),
    "native-batch": ("/", {"prompt_batch": ["One", "Two"], "random_seed": 1, "yield_generator": True}, 0, 1),
    "native-batch-incremental": (
        "/",
        {"prompt_batch": ["One", "Two"], "random_seed": 1, "yield_generator": True, "return_incremental": True},
        0,
        1,
    ),
    "native-return-sequences": (
        "/",
        {"prompt": "One", "random_seed": 1, "num_return_sequences": 2, "stream": True},
        0,
        1,
    ),
}


@pytest.mark.parametrize("name", INTERLEAVED)
def test_stream_of_two_sequences(name: str, start_api: StartApi, byte_model: ByteModel) -> None:
    path, body, num_initial_events, events_per_finish = INTERLEAVED[name]
    api = start_api()
    with api.open_stream(path, body) as response:
        stream = InterleavedStream(api, split_events(response.iter_raw()), 2)
        stream.read_events(num_initial_events)
        send_interleaved(stream, byte_model, events_per_finish=events_per_finish)
    assert_matches_golden(name, stream.read)


def test_every_file_has_a_test() -> None:
    calls = {f"chat-call-{name}" for name in TOOL_FORMATS}
    assert {path.stem for path in GOLDEN_DIR.glob("*.sse")} == SCRIPTED.keys() | INTERLEAVED.keys() | calls
