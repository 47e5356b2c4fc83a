"""Reasoning is split from what follows, whoever opens it: the prompt, the model, or nobody."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtp_llm.text.output import ContentParser
from rtp_llm.text.reasoning import REASONING_FORMATS, ReasoningParser, ReasoningState, detect
from rtp_llm.text.tool_formats import TOOL_FORMATS
from tests.text.answers import Call, Sum, parse, stream

QWEN3 = REASONING_FORMATS["qwen3"]
CASES: list[tuple[ReasoningState, str, Sum]] = [
    ("inside", "\nA plan.\n</think>\n\nDone.\n", Sum("Done.\n", "A plan.")),
    ("inside", "<think>\nA plan.</think>Done.", Sum("Done.", "A plan.")),
    ("inside", "A plan", Sum("", "A plan")),
    ("inside", "a </think> b </think> c", Sum("b </think> c", "a")),
    ("inside", "</think>Done.", Sum("Done.")),
    ("optional", "<think>\nA plan.\n</think>\n\nDone.", Sum("Done.", "A plan.")),
    ("optional", "\n<think>a\n\nb</thi", Sum("", "a\n\nb</thi")),
    ("optional", "Done.", Sum("Done.")),
    ("optional", " \n", Sum(" \n")),
    ("optional", " <thin", Sum(" <thin")),
    ("optional", "Done. <think>x</think>", Sum("Done. <think>x</think>")),
]


@pytest.mark.parametrize(("state", "text", "expected"), CASES)
def test_reasoning_is_split_off(state: ReasoningState, text: str, expected: Sum) -> None:
    assert parse(ReasoningParser(QWEN3, state, ContentParser()), [text]) == expected
    assert parse(ReasoningParser(QWEN3, state, ContentParser()), text) == expected


PIECES = st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", '<tool_call>{"name": "f"}'])


@given(st.sampled_from(["inside", "optional"]), st.lists(PIECES, max_size=10), st.integers(1, 5))
def test_no_split_changes_the_sum(state: ReasoningState, pieces: list[str], size: int) -> None:
    def parser() -> ReasoningParser:
        return ReasoningParser(QWEN3, state, TOOL_FORMATS["hermes"].parser([]))

    text = "".join(pieces)
    whole = parse(parser(), [text])
    assert parse(parser(), [text[i : i + size] for i in range(0, len(text), size)]) == whole


def test_calls_follow_the_reasoning_and_none_are_in_it() -> None:
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    parser = ReasoningParser(QWEN3, "optional", TOOL_FORMATS["hermes"].parser([]))
    answer = parse(parser, f"<think>{call}</think>I look.\n{call}")
    assert answer == Sum("I look.", call, [Call("now", "{}")])


def test_reasoning_comes_as_it_is_written() -> None:
    lines = stream(ReasoningParser(QWEN3, "inside", ContentParser()), "\na b\n</think>\n\nc")
    assert lines == ["reasoning a", "reasoning  b", "content c"]


@pytest.mark.parametrize(
    ("name", "prompt", "prefill", "state"),
    [
        ("qwen3", "<|im_start|>assistant\n", None, "optional"),
        ("qwen3", "<|im_start|>assistant\n<think>\n", None, "inside"),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", None, None),
        ("deepseek_r1", "<|Assistant|>", None, "inside"),
        ("deepseek_r1", "<|Assistant|></think>", None, None),
        ("mistral", "[INST]Hi[/INST]", None, "optional"),
        ("qwen3", "<|im_start|>assistant\n<think>\nA pl", "<think>\nA pl", "inside"),
        ("qwen3", "<|im_start|>assistant\n<think>a</think>Do", "<think>a</think>Do", None),
        ("qwen3", "<|im_start|>assistant\nDo", "Do", None),
    ],
)
def test_the_prompt_says_where_an_answer_begins(name: str, prompt: str, prefill: str | None, state: object) -> None:
    assert REASONING_FORMATS[name].state(prompt, prefill) == state


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ content.split('</think>')[-1] }}<|im_start|>assistant", "qwen3"),
        ("{{ content.split('</think>')[-1] }}<\uff5cAssistant\uff5c>", "deepseek_r1"),
        ("[THINK]{{ reasoning }}[/THINK]", "mistral"),
        ("<|im_start|>assistant", None),
    ],
)
def test_the_template_says_which_format(template: str, name: str | None) -> None:
    found = detect(template)
    assert (found.name if found else None) == name
