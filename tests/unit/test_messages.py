"""Messages as clients send them, in the format that a template reads. Transformers is the judge of what it renders."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rtp_llm.text.template import ChatTemplate, TemplateError
from rtp_llm.text.tokenizer import Tokenizer
from tests.unit import chat_templates
from tests.unit.tokenizer_files import llama_like

USER: dict[str, Any] = {"role": "user", "content": "Weather?"}
STYLES = ("CHATML", "QWEN3", "GEMMA", "MISTRAL", "DEEPSEEK_R1", "HARMONY")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    directory = llama_like(tmp_path_factory.mktemp("messages"))
    return Tokenizer.load(directory), PreTrainedTokenizerFast.from_pretrained(directory)


def template_of(tokenizers: tuple[Tokenizer, Any], source: str) -> ChatTemplate:
    return ChatTemplate("test", source, None, tokenizers[0])


# The last turn goes on


@pytest.mark.parametrize("content", ["The answer is", " The answer ", "A\n", "a <|im_", "<s>"])
@pytest.mark.parametrize("style", STYLES)
def test_a_continued_turn_ends_as_in_transformers(tokenizers: tuple[Tokenizer, Any], style: str, content: str) -> None:
    source = getattr(chat_templates, style)
    messages = [USER, {"role": "assistant", "content": content}]
    expected = tokenizers[1].apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True
    )
    template = template_of(tokenizers, source)
    prompt = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt.text == expected
    assert prompt.text.rstrip().endswith(content.strip())
    harmless = template.render(
        [USER, {"role": "assistant", "content": "x"}], add_generation_prompt=False, continue_final_message=True
    )
    num_control_tokens = [
        len([token_id for token_id in template.encode(rendered) if token_id in tokenizers[0].added_tokens])
        for rendered in (prompt, harmless)
    ]
    assert num_control_tokens[0] == num_control_tokens[1]


@settings(max_examples=100, deadline=None)
@given(content=st.text(min_size=1), parts=st.booleans())
def test_any_text_is_continued_as_in_transformers(tokenizers: tuple[Tokenizer, Any], content: str, parts: bool) -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    expected = tokenizers[1].apply_chat_template(
        [USER, {"role": "assistant", "content": content}],
        chat_template=source,
        tokenize=False,
        continue_final_message=True,
    )
    sent = [{"type": "text", "text": content}] if parts else content
    template = template_of(tokenizers, source)
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": sent}]
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True).text == expected


def test_a_turn_from_which_the_template_takes_the_reasoning_goes_on(tokenizers: tuple[Tokenizer, Any]) -> None:
    """Transformers refuses it, since it does not find all of the content in the text."""
    messages = [USER, {"role": "assistant", "content": "<think>Hm.</think> so"}]
    prompt = template_of(tokenizers, chat_templates.DEEPSEEK_R1).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert prompt.text == "<s><|User|>Weather?<|Assistant|> so"


@pytest.mark.parametrize("last", [{"role": "assistant", "content": ""}, {"role": "assistant", "tool_calls": [{}]}])
def test_a_turn_without_text_cannot_be_continued(tokenizers: tuple[Tokenizer, Any], last: dict[str, Any]) -> None:
    with pytest.raises(TemplateError, match="content to continue"):
        template_of(tokenizers, chat_templates.CHATML).render([USER, last], continue_final_message=True)


def test_a_turn_whose_end_the_template_drops_cannot_be_continued(tokenizers: tuple[Tokenizer, Any]) -> None:
    template = template_of(tokenizers, "{% for m in messages %}{{ m.content[:3] }}{% endfor %}")
    with pytest.raises(TemplateError, match="leaves out the end"):
        template.render([USER], continue_final_message=True)


# Reasoning, refusals, parts


@pytest.mark.parametrize("sent", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("read", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_has_the_name_that_the_template_reads(
    tokenizers: tuple[Tokenizer, Any], sent: str, read: str
) -> None:
    source = "{% for m in messages %}[{{ m." + read + " }}]{{ m.content }}{% endfor %}"
    messages = [{"role": "assistant", "content": "A", sent: "B"}]
    assert template_of(tokenizers, source).render(messages).text == "[B]A"
    null: dict[str, Any] = {name: None for name in ("reasoning", "reasoning_content", "thinking")}
    assert template_of(tokenizers, source).render([{**null, **messages[0]}]).text == "[B]A"


def test_reasoning_reaches_templates_of_families(tokenizers: tuple[Tokenizer, Any]) -> None:
    for style, sent in (("QWEN3", "reasoning"), ("HARMONY", "reasoning_content"), ("QWEN3", "reasoning_content")):
        messages = [USER, {"role": "assistant", "content": "Rain.", sent: "Clouds."}]
        assert "Clouds." in template_of(tokenizers, getattr(chat_templates, style)).render(messages).text


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "No."}],
        [{"type": "input_text", "text": "No."}],
        [{"type": "output_text", "text": "No.", "annotations": []}],
        [{"type": "refusal", "refusal": "No."}],
        [{"type": "text", "text": "N"}, {"type": "refusal", "refusal": "o."}],
    ],
    ids=lambda content: "+".join(part["type"] for part in content),
)
def test_parts_are_text_under_every_name(tokenizers: tuple[Tokenizer, Any], content: list[dict[str, Any]]) -> None:
    as_text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    as_parts = "{% for m in messages %}{% for p in m.content %}{{ p.text if p.type == 'text' }}{% endfor %}{% endfor %}"
    for source in (as_text, as_parts):
        assert template_of(tokenizers, source).render([{"role": "assistant", "content": content}]).text == "No."


def test_a_refusal_is_the_text_of_a_turn_without_content(tokenizers: tuple[Tokenizer, Any]) -> None:
    template = template_of(tokenizers, "{% for m in messages %}{{ m.content }}{{ m.refusal }}{% endfor %}")
    assert template.render([{"role": "assistant", "content": None, "refusal": "No."}]).text == "No."
    assert template.render([{"role": "assistant", "content": "Yes.", "refusal": None}]).text == "Yes."


# Tool calls

CONCATENATES = (
    "{% for m in messages %}{% for c in m.tool_calls %}{{ 'f' + c.function.arguments }}{% endfor %}{% endfor %}"
)
ITERATES = """\
{%- for m in messages %}{% for c in m.tool_calls %}f
{%- for key, value in c.function.arguments.items() %}{{ key }}={{ value }};{% endfor %}{% endfor %}{% endfor %}"""
SERIALIZES = (
    "{% for m in messages %}{% for c in m.tool_calls %}f{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ({}, {}),
        ({"arguments": None}, {}),
        ({"arguments": ""}, {}),
        ({"arguments": " "}, {}),
        ({"arguments": "null"}, {}),
        ({"arguments": "{}"}, {}),
        ({"arguments": {}}, {}),
        ({"arguments": {"city": "Bern"}}, {"city": "Bern"}),
        ({"arguments": '{"city": "Bern"}'}, {"city": "Bern"}),
    ],
    ids=str,
)
def test_arguments_as_clients_send_them(
    tokenizers: tuple[Tokenizer, Any], function: dict[str, Any], arguments: dict[str, Any]
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", **function}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]

    def rendered(source: str) -> str:
        return template_of(tokenizers, source).render(messages).text

    assert json.loads(rendered(CONCATENATES)[1:]) == arguments
    assert rendered(ITERATES) == "f" + "".join(f"{key}={value};" for key, value in arguments.items())
    assert json.loads(rendered(SERIALIZES)[1:]) == arguments


def test_arguments_that_are_no_object_reach_the_template(tokenizers: tuple[Tokenizer, Any]) -> None:
    """A model can write any text as arguments."""
    for arguments in ("{broken", "[1]", '"text"', "7"):
        call = {"function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "assistant", "tool_calls": [call]}]
        assert template_of(tokenizers, CONCATENATES).render(messages).text == "f" + arguments
        assert json.loads(template_of(tokenizers, SERIALIZES).render(messages).text[1:]) == arguments


@pytest.mark.parametrize("calls", [[], None])
def test_no_tool_calls_is_no_key(tokenizers: tuple[Tokenizer, Any], calls: Any) -> None:
    template = template_of(tokenizers, "{{ 'tool_calls' in messages[0] }}")
    assert template.render([{"role": "assistant", "content": "A", "tool_calls": calls}]).text == "False"


def test_a_function_call_of_the_first_api_is_a_tool_call(tokenizers: tuple[Tokenizer, Any]) -> None:
    message = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    assert template_of(tokenizers, SERIALIZES).render([message]).text == 'f{"a": 1}'


def test_ids_of_calls_fit_mistrals_templates(tokenizers: tuple[Tokenizer, Any]) -> None:
    """They need nine letters and digits. A result still names its call, and an id that fits is kept."""
    template = template_of(tokenizers, chat_templates.MISTRAL)

    def text(call_id: str) -> str:
        call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        return template.render(
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "9", "tool_call_id": call_id},
            ]
        ).text

    assert text("abc123DEF").count("abc123DEF") == 2
    first, second = text("call_A7-long-0001"), text("call_A7-long-0002")
    assert first != second
    short_id = first.split("[/TOOL_RESULTS]")[0][-9:]
    assert first.count(short_id) == 2


def test_the_judge_renders_the_same(tokenizers: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    """What needs no change is rendered as transformers renders it, for every style."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"city": "Bern"}}}
    chats: list[list[dict[str, Any]]] = [
        [USER, {"role": "assistant", "content": "Rain."}, USER],
        [{"role": "system", "content": "S"}, USER],
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "9", "tool_call_id": "abcdefghi"},
        ],
        [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nRain."}, USER],
    ]
    num_compared = 0
    for style in STYLES:
        source = getattr(chat_templates, style)
        for chat in chats:
            try:
                expected = tokenizers[1].apply_chat_template(
                    chat, chat_template=source, tokenize=False, add_generation_prompt=True
                )
            except Exception:  # the style refuses a role
                continue
            assert template_of(tokenizers, source).render(chat).text == expected
            num_compared += 1
    assert num_compared >= 20
