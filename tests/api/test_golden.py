"""The exact bytes of both APIs' streams, so that no change to them goes unnoticed.

A fake engine says known tokens, so nothing here depends on a model, a CPU or a tokenizer's training. Ids and times
are masked. After a change that is meant, write the files anew and read their difference:

    REGENERATE_GOLDEN=1 python -m pytest tests/api/test_golden.py && git diff tests/api/golden
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.contract.engine_output import FinishReason, Logprob
from tests.api.api_server import ApiServer
from tests.api.byte_model import ByteModel
from tests.api.conftest import StartApi
from tests.api.fake_engine import ScriptedOutput, Submission
from tests.api.sse import frames

FOLDER = Path(__file__).parent / "golden"
MASKS = (
    (rb'"id":"(chatcmpl|cmpl)-[0-9a-f]{24}"', rb'"id":"\1-MASKED"'),
    (rb'"created":\d{10}\b', rb'"created":0'),
    (rb'"(cost_time|first_token_cost_time)":\d+(\.\d+)?(e-\d+)?', rb'"\1":0.0'),
)
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "seed": 1}
COMPLETION: dict[str, Any] = {"prompt": "Once", "stream": True, "seed": 1}
NATIVE: dict[str, Any] = {"prompt": "Once", "generate_config": {"random_seed": 1}}
USAGE = {"stream_options": {"include_usage": True}}


def masked(raw: bytes) -> bytes:
    for pattern, mask in MASKS:
        raw = re.sub(pattern, mask, raw)
    return raw


def compare(name: str, raw: bytes) -> None:
    """With the file of that name, which is written where that is asked for."""
    path = FOLDER / f"{name}.sse"
    if os.environ.get("REGENERATE_GOLDEN"):
        path.write_bytes(masked(raw))
    assert path.exists(), f"no {path}: see this file's first lines"
    assert masked(raw) == path.read_bytes()


def spoken(
    model: ByteModel, *pieces: str | bytes, finish: FinishReason | None = "stop", **last: Any
) -> list[ScriptedOutput]:
    """An event per piece of text, and one that ends it: with "stop" by the end-of-sequence token."""
    said = [ScriptedOutput(model.tokens(piece)) for piece in pieces]
    if finish == "stop":
        return [*said, ScriptedOutput([model.end], finish, **last)]
    return [*said[:-1], ScriptedOutput(said[-1].tokens, finish, **last)]


def with_logprobs(model: ByteModel, text: str, top: int) -> list[ScriptedOutput]:
    """A token an event, each half as likely as the last; the other ones offered are "a" and "b"."""
    others = [(model.tokens(letter)[0], -3.5) for letter in "ab"]

    def record(place: int, token: int) -> Logprob:
        value = -0.5 * (place + 1)
        return (value, 0, [(token, value), *others][:top])

    said = [ScriptedOutput([token], None, [record(i, token)]) for i, token in enumerate(model.tokens(text))]
    return [*said, ScriptedOutput([model.end], "stop", [record(9, model.end)])]


SCRIPTED: dict[str, tuple[str, dict[str, Any], Callable[[ByteModel], list[ScriptedOutput]]]] = {
    "chat": ("/v1/chat/completions", CHAT, lambda m: spoken(m, "Hello", " wor", "ld")),
    "chat-usage": (
        "/v1/chat/completions",
        {**CHAT, **USAGE},
        lambda m: spoken(m, b"na\xc3", b"\xafve \xf0\x9f", b"\x9a", b"\x80", finish="length"),
    ),
    "chat-logprobs": (
        "/v1/chat/completions",
        {**CHAT, "logprobs": True, "top_logprobs": 2},
        lambda m: with_logprobs(m, "né", 2),
    ),
    "chat-stop-string": (
        "/chat/completions",
        {**CHAT, **USAGE, "stop": ["END", "never"]},
        lambda m: spoken(m, "one EN", "ough E", "N", "D two", " three"),
    ),
    "chat-error": (
        "/v1/chat/completions",
        CHAT,
        lambda m: [ScriptedOutput(m.tokens("Hel")), ScriptedOutput([], "error", error="the engine fell over")],
    ),
    "completion": ("/v1/completions", COMPLETION, lambda m: spoken(m, " upon", " a", " time", finish="length")),
    "completion-echo-logprobs": (
        "/v1/completions",
        {**COMPLETION, **USAGE, "echo": True, "logprobs": 1},
        lambda m: _first_with_prompt(with_logprobs(m, " é", 1), m),
    ),
    "completion-echo-only": (
        "/v1/completions",
        {**COMPLETION, **USAGE, "echo": True, "max_tokens": 0},
        lambda m: spoken(m, "x", finish="length"),
    ),
    "native-yield-generator": (
        "/",
        {**NATIVE, "yield_generator": True},
        lambda m: spoken(m, "upon", " a", " time", finish="stop"),
    ),
    "native-stream": ("/", {**NATIVE, "stream": True}, lambda m: spoken(m, "upon", " a", finish="length")),
    "native-incremental": (
        "/",
        {**NATIVE, "yield_generator": True, "return_incremental": True, "return_output_ids": True},
        lambda m: spoken(m, "up", "on", finish="length"),
    ),
    "native-error": (
        "/",
        {**NATIVE, "yield_generator": True},
        lambda m: [ScriptedOutput(m.tokens("up")), ScriptedOutput([], "error", error="the engine fell over")],
    ),
}


def _first_with_prompt(said: list[ScriptedOutput], model: ByteModel) -> list[ScriptedOutput]:
    """The first event also brings the logprobs of the prompt's second to last token."""
    first = said[0]
    records: list[Logprob] = [(-4.0 - i, 0, [(token, -1.0)]) for i, token in enumerate(model.tokens("nce"))]
    return [ScriptedOutput(first.tokens, first.finish, first.logprobs, records), *said[1:]]


@pytest.mark.parametrize("name", SCRIPTED)
def test_stream_of_one_sequence(name: str, start_api: StartApi, byte_model: ByteModel) -> None:
    path, body, script = SCRIPTED[name]
    compare(name, start_api(lambda submission: script(byte_model)).stream(path, body))


# Several sequences: each event is sent when the last one has been read, so that their order is the test's.


class Conversation:
    """The frames of one stream, and the sequences behind it in the order in which they were submitted."""

    def __init__(self, api: ApiServer, stream: Iterator[bytes], count: int):
        self.api, self.stream = api, stream
        self.sequences: list[Submission] = []
        self.count = count
        self.read = b""

    def hear(self, frames: int) -> None:
        for _ in range(frames):
            self.read += next(self.stream)

    def tell(self, *events: tuple[int, ScriptedOutput], frames: int) -> None:
        """One frame of the engine, and the frames that the client then reads."""
        if not self.sequences:
            self.sequences = [self.api.engine.next_submission() for _ in range(self.count)]
        self.api.engine.send_frame(*(said.for_request(self.sequences[i].id) for i, said in events))
        self.hear(frames)


def interleaved(talk: Conversation, model: ByteModel, *, ends_apart: int) -> None:
    """Two sequences; `ends_apart`: frames that a last event makes."""

    def said(text: str, finish: FinishReason | None = None) -> ScriptedOutput:
        return ScriptedOutput(model.tokens(text), finish)

    talk.tell((0, said("a1")), (1, said("b1")), frames=2)
    talk.tell((1, said(" b2")), frames=1)
    talk.tell((1, said(" b3", "length")), (0, said(" a2")), frames=ends_apart + 1)
    talk.tell((0, ScriptedOutput([model.end], "stop")), frames=1)
    talk.read += b"".join(talk.stream)


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
    path, body, opening, ends_apart = INTERLEAVED[name]
    api = start_api()
    with api.open_stream(path, body) as response:
        talk = Conversation(api, frames(response.iter_raw()), 2)
        talk.hear(opening)
        interleaved(talk, byte_model, ends_apart=ends_apart)
    compare(name, talk.read)


def test_every_file_has_a_test() -> None:
    assert {path.stem for path in FOLDER.glob("*.sse")} == SCRIPTED.keys() | INTERLEAVED.keys()
