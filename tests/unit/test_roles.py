"""Roles that a chat template does not know: mapped, never lost, and never moved past another turn."""

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from rtp_llm.text.built_in_templates import BUILT_IN
from rtp_llm.text.roles import Roles
from rtp_llm.text.template import ChatTemplate, TemplateError
from rtp_llm.text.tokenizer import Tokenizer
from tests.unit import chat_templates
from tests.unit.tokenizer_files import llama_like

STYLES = ("CHATML", "QWEN3", "GEMMA", "MISTRAL", "DEEPSEEK_R1", "HARMONY", "DEVELOPER")
FAMILIES = {name: getattr(chat_templates, name) for name in STYLES} | BUILT_IN


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTemplate]:
    tokenizer = Tokenizer.load(llama_like(tmp_path_factory.mktemp("roles")))
    return {name: ChatTemplate(name, source, None, tokenizer) for name, source in FAMILIES.items()}


def turns(*pairs: str) -> list[dict[str, Any]]:
    """Returns messages from "role: content"."""
    return [dict(zip(("role", "content"), pair.split(": "), strict=True)) for pair in pairs]


def text_of(template: ChatTemplate, *pairs: str) -> str:
    return template.render(turns(*pairs)).text


def test_the_log_says_which_roles_a_template_gets_as_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ChatTemplate("CHATML", FAMILIES["CHATML"], None, Tokenizer.load(llama_like(tmp_path)))
    [message] = [r.getMessage() for r in caplog.records if "roles" in r.getMessage()]
    assert "CHATML" in message
    assert "developer as system" in message


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("HARMONY", "DEVELOPER")])
def test_developer_is_system_where_the_template_does_not_know_it(templates: dict[str, ChatTemplate], name: str) -> None:
    """A template that writes any role's name does not know it: the model has never seen it."""
    developer = text_of(templates[name], "developer: Be terse.", "user: Hi")
    assert developer == text_of(templates[name], "system: Be terse.", "user: Hi")
    assert "Be terse." in developer
    assert "developer" not in developer


def test_a_template_that_knows_developer_gets_it(templates: dict[str, ChatTemplate]) -> None:
    assert text_of(templates["DEVELOPER"], "developer: A", "user: C") == "<developer>A<user>C"
    assert (
        text_of(templates["DEVELOPER"], "developer: A", "developer: B", "user: C") == "<developer>A<developer>B<user>C"
    )


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("HARMONY", "DEVELOPER")])
def test_leading_system_and_developer_turns_merge(templates: dict[str, ChatTemplate], name: str) -> None:
    merged = text_of(templates[name], "system: A\n\nB\n\nC", "user: Hi")
    assert text_of(templates[name], "system: A", "developer: B", "developer: C", "user: Hi") == merged
    if name in ("MISTRAL", "GEMMA", "DEEPSEEK_R1", "llama2", "mistral"):  # these lose or refuse the second one
        assert text_of(templates[name], "system: A", "system: B", "system: C", "user: Hi") == merged


def test_a_system_turn_becomes_part_of_the_first_question_where_it_is_refused(
    templates: dict[str, ChatTemplate],
) -> None:
    assert (
        text_of(templates["GEMMA"], "system: Be terse.", "user: Hi")
        == "<s><start_of_turn>user\nBe terse.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CHATML", "<|im_start|>system\nNew rule<|im_end|>\n<|im_start|>user\nC<|im_end|>"),
        ("QWEN3", "<|im_start|>system\nNew rule<|im_end|>\n<|im_start|>user\nC<|im_end|>"),
        ("GEMMA", "<start_of_turn>user\nNew rule\n\nC<end_of_turn>"),
        ("MISTRAL", "[INST]New rule\n\nC[/INST]"),
        ("DEEPSEEK_R1", "<|User|>New rule<|User|>C"),
        ("HARMONY", "# Instructions\nNew rule<|end|><|start|>user<|message|>C<|end|>"),
        ("mistral", "[INST] New rule\n\nC [/INST]"),
        ("llama2", "[INST] New rule\n\nC [/INST]"),
    ],
)
@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_later_system_turn_stays_in_its_place(
    templates: dict[str, ChatTemplate], name: str, expected: str, role: str
) -> None:
    before = ("user: A", "assistant: B")
    text = text_of(templates[name], *before, f"{role}: New rule", "user: C")
    assert expected in text
    if name != "QWEN3":  # which takes the reasoning out of earlier answers
        assert text.startswith(templates[name].render(turns(*before), add_generation_prompt=False).text)


@pytest.mark.parametrize("role", ["tool", "function", "observation"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_result_is_lost(templates: dict[str, ChatTemplate], name: str, role: str) -> None:
    call: dict[str, Any] = {"id": "call_1234567890", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": role, "content": "9 degrees", "tool_call_id": "call_1234567890", "name": "f"},
        {"role": role, "content": "8 degrees", "tool_call_id": "call_1234567890", "name": "f"},
    ]
    text = templates[name].render(messages).text
    assert "9 degrees" in text
    assert "8 degrees" in text
    if role != "tool":
        as_tool = [{**message, "role": "tool"} if message["role"] == role else message for message in messages]
        assert text == templates[name].render(as_tool).text


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(list(FAMILIES)),
    roles=st.lists(st.sampled_from(["system", "developer", "user", "assistant"]), min_size=1, max_size=7),
)
def test_every_text_is_in_the_prompt_once_and_in_order(
    templates: dict[str, ChatTemplate], name: str, roles: list[str]
) -> None:
    """The template may still refuse an order of user and assistant turns; then the request fails, visibly."""
    contents = [f"text{index}." for index in range(len(roles))]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    note(f"{name}: {roles}")
    try:
        text = templates[name].render(messages).text
    except TemplateError:
        assert FAMILIES[name].count("raise_exception")
        return
    positions = [text.find(content) for content in contents]
    assert min(positions) >= 0
    assert positions == sorted(positions)
    assert all(text.count(content) == 1 for content in contents)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_turn_alone_is_not_lost(templates: dict[str, ChatTemplate], name: str) -> None:
    assert "Be terse." in text_of(templates[name], "system: Be terse.")


def test_turns_that_clients_send_as_they_are_do_not_merge(templates: dict[str, ChatTemplate]) -> None:
    with pytest.raises(TemplateError, match="must alternate"):
        text_of(templates["GEMMA"], "user: A", "user: B")
    two = text_of(templates["CHATML"], "system: A", "system: B", "user: C")
    assert two.startswith("<|im_start|>system\nA<|im_end|>\n<|im_start|>system\nB<|im_end|>\n")


def test_contents_in_parts_merge(templates: dict[str, ChatTemplate]) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": [{"type": "text", "text": "A"}]},
        {"role": "developer", "content": "B"},
        {"role": "developer", "content": None},
        {"role": "user", "content": "C"},
    ]
    assert templates["CHATML"].render(messages).text.startswith("<|im_start|>system\nA\n\nB\n\n<|im_end|>\n")


def test_a_template_that_needs_more_than_messages_is_left_alone(templates: dict[str, ChatTemplate]) -> None:
    def render(messages: Any, tools: Any) -> str:
        raise TemplateError("which city?")

    messages = turns("developer: A", "user: B", "tool: C")
    assert Roles(render).adapt(messages) == messages


def test_a_slow_template_is_not_tried_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    num_renders = 0

    def render(messages: Any, tools: Any) -> str:
        nonlocal num_renders
        num_renders += 1
        monkeypatch.setattr("rtp_llm.text.roles.time.monotonic", lambda: 1e12)
        return "".join(message["content"] for message in messages)

    roles = Roles(render)
    assert num_renders <= 20
    assert roles.leading_system
    assert roles.later_system
