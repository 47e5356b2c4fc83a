"""The parsers of tool calls: what each format's texts mean, that no split of a text changes it, and that nothing in a
text makes a parser fail.
"""

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtp_llm.text.tool_formats import TOOL_FORMATS, detect
from rtp_llm.text.tools import Tool
from tests.text.answers import Call, Sum, parse, stream

TOOLS = [
    Tool(
        "search",
        {
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "limit": {"type": "integer"},
                "exact": {"type": "boolean"},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
                "where": {"type": "object"},
                "after": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "kind": {"enum": ["page", 7]},
            },
            "$defs": {"tag": {"type": "string"}},
        },
    ),
    Tool("now", {}),
]
ARGUMENTS = {
    "query": 'naïve "q\\uotes"\n\tof 日本 🙂 </tool_call> {',
    "limit": -12,
    "exact": True,
    "tags": ["a, b", "c]"],
    "where": {"site": None, "n": [1.5, {"x": "y}"}]},
    "after": "null and void",
}


def parsed(name: str, text: str, **options: Any) -> Sum:
    return parse(TOOL_FORMATS[name].parser(TOOLS, **options), [text])


@dataclass(frozen=True)
class Sample:
    """Two calls of `search` and `now` with text before them, as a model of a format writes it."""

    text: str
    content: str = "I look it up."


def python_call(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def xml_call(name: str, arguments: dict[str, Any]) -> str:
    values = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments.items()}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def json_call(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


CALLS = [("search", ARGUMENTS), ("now", {})]
SAMPLES = {
    "hermes": [
        Sample("I look it up.\n" + "\n".join(f"<tool_call>\n{json_call(*call)}\n</tool_call>" for call in CALLS)),
        Sample("I look it up. " + "".join(f"<tool_call>{json_call(*call)}</tool_call>" for call in CALLS) + "\n"),
        Sample(  # arguments first, then as a JSON text, then a key that nobody needs
            "I look it up.<tool_call>"
            + json.dumps({"arguments": ARGUMENTS, "name": "search"})
            + "</tool_call>"
            + json.dumps({"id": 1, "name": "now", "arguments": "{}"}).join(("<tool_call>", "</tool_call>"))
        ),
        Sample(  # a brace too many, and one too few
            f"I look it up.\n<tool_call>\n{json_call('search', ARGUMENTS)}}}\n</tool_call>\n"
            '<tool_call>\n{"name": "now", "arguments": {}\n</tool_call>'
        ),
        Sample(f'I look it up.<tool_call>{json_call(*CALLS[0])}</tool_call><tool_call>{{"name": "now"}}</tool_call>'),
    ],
    "qwen3_coder": [
        Sample("I look it up.\n\n" + "\n".join(xml_call(*call) for call in CALLS)),
        Sample("I look it up.\n\n" + "\n".join(xml_call(*call)[12:] for call in CALLS)),  # without <tool_call>
        Sample("I look it up.\n" + "".join(xml_call(*call).replace("\n</parameter>", "") for call in CALLS)),
    ],
    "llama3_json": [
        Sample("; ".join(json_call(*call, key="parameters") for call in CALLS), content=""),
        Sample("<|python_tag|>" + ";".join(json_call(*call, key="parameters") for call in CALLS), content=""),
        Sample("I look it up.\n" + "\n".join(json_call(*call, key="parameters") for call in CALLS)),
        Sample("I look it up.<|python_tag|>" + ", ".join(json_call(*call) for call in CALLS)),
        Sample(
            '{"type": "function", ' + ",".join(json_call(*call, key="parameters") for call in CALLS)[1:], content=""
        ),
    ],
    "pythonic": [
        Sample(f"[{', '.join(python_call(*call) for call in CALLS)}]", content=""),
        Sample(f"I look it up.\n[{','.join(python_call(*call) for call in CALLS)}]\n"),
        Sample(
            f"I look it up.<|python_start|>[ {' , '.join(python_call(*call) for call in CALLS)} ]<|python_end|>",
        ),
        Sample(f"[{python_call(*CALLS[0])}]\n[now( )]", content=""),
    ],
    "mistral": [
        Sample(f"I look it up.[TOOL_CALLS] [{', '.join(json_call(*call) for call in CALLS)}]"),
        Sample(f"I look it up.[TOOL_CALLS]search{json.dumps(ARGUMENTS)}[TOOL_CALLS]now{{}}"),
        Sample(f"I look it up.[TOOL_CALLS]search[ARGS]{json.dumps(ARGUMENTS)}[TOOL_CALLS]now[ARGS]{{}}"),
        Sample(
            f"I look it up.[TOOL_CALLS]search[CALL_ID]abcdefghi[ARGS]{json.dumps(ARGUMENTS)}"
            "[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}"
        ),
    ],
}
SAMPLE_LIST = [
    pytest.param(name, sample, id=f"{name}-{i}") for name in SAMPLES for i, sample in enumerate(SAMPLES[name])
]


@pytest.mark.parametrize(("name", "sample"), SAMPLE_LIST)
def test_calls_and_the_text_before_them(name: str, sample: Sample) -> None:
    answer = parsed(name, sample.text)
    assert answer.content == sample.content
    assert [call.name for call in answer.calls] == ["search", "now"]
    assert [json.loads(call.arguments) for call in answer.calls] == [ARGUMENTS, {}]


def test_every_format_has_samples() -> None:
    assert SAMPLES.keys() == TOOL_FORMATS.keys()


# Pieces of which texts are made that look like calls.
FRAGMENTS = {
    "hermes": ["<tool_call>", "</tool_call>", '{"name": ', '"arguments": ', "<tool"],
    "qwen3_coder": [
        "<tool_call>",
        "<function=",
        "search",
        "<parameter=",
        "limit",
        ">",
        "\n</parameter>",
        "</function>",
    ],
    "llama3_json": ["<|python_tag|>", '{"name": ', '"parameters": ', ";"],
    "pythonic": ["<|python_start|>", "search(", "query=", "'", "\\", "True", "(", ")", "<|python_end|>", "\\u00e9"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", '{"name": "f", ', '"arguments": '],
}
COMMON = ["{", "}", "[", "]", '"', ",", ":", " ", "\n", "x", "1", "\\", "null", '"now"', "now", "\\n", "é"]


@st.composite
def format_and_text(draw: st.DrawFn) -> tuple[str, str]:
    name = draw(st.sampled_from(sorted(SAMPLES)))
    samples = [sample.text for sample in SAMPLES[name]]
    if draw(st.booleans()):  # a sample with a wound
        sample = draw(st.sampled_from(samples))
        start = draw(st.integers(0, len(sample)))
        end = draw(st.integers(start, min(len(sample), start + 3)))
        middle = draw(st.sampled_from(["", *FRAGMENTS[name], *COMMON]))
        return name, sample[:start] + middle + sample[end:]
    pieces = st.sampled_from([*FRAGMENTS[name], *COMMON, *samples]) | st.text(max_size=3)
    return name, "".join(draw(st.lists(pieces, max_size=12)))


@st.composite
def pieces_of(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(st.data(), format_and_text(), st.booleans())
def test_no_split_changes_the_sum(data: st.DataObject, sample: tuple[str, str], hide: bool) -> None:
    name, text = sample
    hidden = TOOL_FORMATS[name].markers if hide else ()
    whole = parsed(name, text, hidden=hidden)
    for pieces in (data.draw(pieces_of(text)), list(text)):
        assert parse(TOOL_FORMATS[name].parser(TOOLS, hidden=hidden), pieces) == whole


@given(format_and_text())
def test_text_without_a_call_is_returned_as_it_is(sample: tuple[str, str]) -> None:
    name, text = sample
    answer = parsed(name, text)
    if not answer.calls:
        assert answer.content == text


MALFORMED = {
    "hermes": [
        "<tool_call>",
        "<tool_call>\nsearch(query)\n</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call> x',
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{"}',
        "a </tool_call> b",
    ],
    "qwen3_coder": ["<tool_call>\n{}", "<function=", "<function=>x", "<function=a\nb>", "<functions=a>"],
    "llama3_json": [
        '{"name": "Ann", "age": 7}',
        '{"name": "Ann", "parameters": 7}',
        '{"name": "Ann"}',
        'The call is {"name": "f", "parameters": {}}',
        "{\n  {",
        '<|python_tag|>brave_search.call(query="x")',
    ],
    "pythonic": ["[1, 2]", "[see](http://x)", "[see(2024)]", "[f(x", "a [f()]", "[[f()]]", "<|python_start|>print(1)"],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS] {}", "[TOOL_CALLS]f", "[TOOL_CALLS][]", "[TOOL_CALLS]f[ARGS][1]"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in MALFORMED for text in MALFORMED[name]])
def test_a_malformed_call_is_text(name: str, text: str) -> None:
    assert parsed(name, text) == Sum(content=text)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in MALFORMED for text in MALFORMED[name]])
def test_content_does_not_show_markers_that_are_special_tokens(name: str, text: str) -> None:
    markers = TOOL_FORMATS[name].markers
    expected = re.sub("|".join(map(re.escape, markers)), "", f"x{text}x{' '.join(markers)}x")
    answer = parsed(name, f"x{text}x{' '.join(markers)}x", hidden=markers)
    assert answer.content.split() == expected.split()
    assert not answer.calls


@pytest.mark.parametrize(("name", "sample"), SAMPLE_LIST)
def test_a_call_that_is_cut_off_keeps_what_it_has(name: str, sample: Sample) -> None:
    """The answer has a part of the content, then of the calls, and incomplete arguments do not look complete."""
    whole = parsed(name, sample.text)
    for end in range(len(sample.text)):
        answer = parsed(name, sample.text[:end])
        for call, complete in zip(answer.calls, whole.calls, strict=False):
            assert call.name == complete.name
            if name != "qwen3_coder":  # where the part of a closing tag belongs to a value that has no end
                assert complete.arguments.startswith(call.arguments)
            assert call == complete or not is_json(call.arguments)
        if answer.calls:
            assert answer.content == whole.content or len(answer.calls) == 1 < len(whole.calls)


GOLDEN = {
    "hermes": (
        'Hi.\n<tool_call>\n{"name": "search", "arguments": {"query": "ab"}}\n</tool_call>\n',
        [*("content H", "content i", "content .", "0 search {"), *(f"0  {char}" for char in '"query": "ab"}')],
    ),
    "qwen3_coder": (
        '<tool_call>\n<function=search>\n<parameter=query>\na"b\n</parameter>\n<parameter=limit>\n12\n</parameter>\n',
        ["0 search ", '0  {"query": ', '0  "', "0  a", '0  \\"', "0  b", '0  "', '0  , "limit": ', "0  12"],
    ),
    "llama3_json": ('{"name": "now", "parameters": {}}', ["0 now {", "0  }"]),
    "pythonic": (
        "[search(query='a\\'é', exact=True), now()]",
        ['0 search {"query": ', '0  "a', "0  '", "0  é", '0  "', '0  , "exact": ', "0  true}", "1 now {}"],
    ),
    "mistral": ('[TOOL_CALLS]now[ARGS]{"a": 1}', ["0 now {", *(f"0  {char}" for char in '"a": 1}')]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_arguments_come_as_they_are_written(name: str) -> None:
    text, expected = GOLDEN[name]
    assert stream(TOOL_FORMATS[name].parser(TOOLS), text) == expected


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("query", "12", "12"),
        ("query", "  a\n\nb ", "  a\n\nb "),
        ("query", '{"a": [1]}', '{"a": [1]}'),
        ("query", "[1, 2]", "[1, 2]"),
        ("query", '"quoted"', '"quoted"'),
        ("query", "null", "null"),
        ("query", "true", "true"),
        ("query", "03106", "03106"),
        ("limit", "12", 12),
        ("limit", "twelve", "twelve"),
        ("exact", "True", True),
        ("where", '{"a": [1]}', {"a": [1]}),
        ("after", "null", None),
        ("after", "12", "12"),
        ("after", '"x"', '"x"'),
        ("kind", "7", 7),
        ("kind", "page", "page"),
        ("unknown", "[1]", [1]),
        ("unknown", "one", "one"),
        ("limit", "NaN", "NaN"),
    ],
)
def test_qwen3_coder_takes_the_type_of_a_value_from_the_schema(key: str, text: str, value: object) -> None:
    answer = parsed("qwen3_coder", xml_call("search", {key: text}))
    assert json.loads(answer.calls[0].arguments) == {key: value}


def test_unknown_names_are_calls() -> None:
    """As in OpenAI's API: the client answers that there is no such function, and the model goes on."""
    assert parsed("hermes", f"<tool_call>{json_call('f', {})}</tool_call>").calls == [Call("f", "{}")]


def test_a_string_that_a_model_forgot_to_end_ends_with_its_call() -> None:
    bad = '<tool_call>\n{"name": "search", "arguments": {"query": "a}}\n</tool_call>\n'
    answer = parsed("hermes", f"{bad}<tool_call>\n{json_call('now', {})}\n</tool_call>")
    assert answer.calls == [Call("search", '{"query": "a}}\n'), Call("now", "{}")]


@pytest.mark.parametrize(("name", "fragment"), [(n, f) for n in FRAGMENTS for f in [*FRAGMENTS[n], *COMMON]])
def test_the_work_is_proportional_to_the_text(name: str, fragment: str) -> None:
    assert num_calls(name, fragment * 400) < 5 * num_calls(name, fragment * 100)


def num_calls(name: str, text: str) -> int:
    """Returns the number of Python calls that parsing a text takes, character by character."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(trace)
    try:
        parse(TOOL_FORMATS[name].parser(TOOLS), text)
    finally:
        sys.setprofile(None)
    return count


# How the families' chat templates write an assistant's calls; `\\"` as in Jinja's strings.
TEMPLATES = {
    "hermes": '{% for c in calls %}\n<tool_call>\n{"name": "{{ c.name }}", "arguments": '
    "{{ c.arguments | tojson }}}\n</tool_call>{% endfor %}",
    "qwen3_coder": "{% for c in calls %}{{ '\n<tool_call>\n<function=' ~ c.name ~ '>\n' }}"
    "{% for k, v in c.arguments.items() %}{{ '<parameter=' ~ k ~ '>\n' }}"
    "{{ v if v is string else v | tojson }}{{ '\n</parameter>\n' }}{% endfor %}"
    "{{ '</function>\n</tool_call>' }}{% endfor %}",
    "llama3_json": '{# <|start_header_id|> #}{{- "{\\"name\\": \\"" ~ calls[0].name ~ "\\", \\"parameters\\": " }}'
    "{{- calls[0].arguments | tojson }}{{- '}' }}",
    "pythonic": "{# in the format of [func_name1(params_name1=params_value1, params_name2=params_value2...)] #}"
    "[{% for c in calls %}{{ c.name }}({% for k, v in c.arguments.items() %}{{ k }}={{ v | repr }}"
    "{{ ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]",
    "mistral": "[TOOL_CALLS] [{% for c in calls %}{{ c | tojson }}{{ ', ' if not loop.last }}{% endfor %}]",
}


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_rendered_call_is_parsed_back(name: str) -> None:
    """Also by the format that is found from the template."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"tojson": lambda value: json.dumps(value, ensure_ascii=False), "repr": repr}
    calls = [{"name": called, "arguments": arguments} for called, arguments in CALLS]
    calls = calls[:1] if name == "llama3_json" else calls
    found = detect(TEMPLATES[name])
    assert found is TOOL_FORMATS[name]
    answer = parse(found.parser(TOOLS), environment.from_string(TEMPLATES[name]).render(calls=calls))
    assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in answer.calls] == calls
    assert not answer.content


@pytest.mark.parametrize(
    "template",
    [
        "<|im_start|>{{ message.content }}",
        "<tool_call>{{ name }}\n<arg_key>{{ k }}</arg_key>\n<arg_value>{{ arguments }}</arg_value></tool_call>",  # GLM
        "<｜tool▁calls▁begin｜>{{ arguments }}",  # noqa: RUF001 - DeepSeek
    ],
)
def test_other_templates_have_no_format_that_is_known(template: str) -> None:
    assert detect(template) is None
