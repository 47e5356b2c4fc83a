"""Compares chat templates with transformers' apply_chat_template; tests template selection and error messages."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from rtp_llm.text.template import ChatTemplate, TemplateError
from rtp_llm.text.tokenizer import Tokenizer

CHATML_WITH_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'Be helpful.' }}{%- endif %}
    {{- '\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(tools_seen=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- set ns.tools_seen = ns.tools_seen + 1 %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

LLAMA3_STYLE = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

Today: {{ date_string }}
{% if tools is not none %}
Tools:
    {% for tool in tools %}
{{ tool | tojson(indent=4) }}
    {% endfor %}
{% endif %}
{{ system }}<|eot_id|>
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('This model takes one tool call at a time.') }}
        {%- endif %}
        {{- '{"parameters": ' + message.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL_STYLE = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant!') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {% generation %}{{- " " + message["content"] + eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

# Whitespace rules, loop controls, scopes, a macro that accepts text or parts, and undefined variables.
ODDITIES = """\
{% macro text_of(content) %}
{% if content is string %}{{ content }}{% else %}{% for part in content %}{{ part.text }}{% endfor %}{% endif %}
{% endmacro %}
{# a comment #}
  {% set seen = 0 %}
{% for message in messages %}
    {% if message.name == 'hidden' %}{% continue %}{% endif %}
    {% if loop.index > 3 %}{% break %}{% endif %}
  {{ text_of(message.content) }}|
    {% generation %}
    {% set seen = seen + 1 %}
    {{ seen }} {{ loop.index }}
    {% endgeneration %}
  {{ seen }}
{% endfor %}
{{ undefined_thing }}{{ pad_token }}{{ documents }}{{ messages | length }}<&'{{ {'<b>': "é&中'"} | tojson }}
"""

TEMPLATES = {
    "chatml": CHATML_WITH_TOOLS,
    "llama3": LLAMA3_STYLE,
    "mistral": MISTRAL_STYLE,
    "oddities": ODDITIES,
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Wetter <für> einen Ort & "mehr" — 天气',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <1>"}}}
SYSTEM = {"role": "system", "content": " You are terse. "}
USER = {"role": "user", "content": "Wie ist's in Zürich? <b>&</b> 🙂"}
ANSWER = {"role": "assistant", "content": "Schön.\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "three turns": [SYSTEM, USER, ANSWER, USER],
    "nulls": [{**USER, "name": None, "tool_calls": None}, {**ANSWER, "tool_calls": None}, USER],
    "tool round": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "9 °C"},
    ],
    "two calls": [USER, {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}, USER],
    "wrong order": [USER, USER],
    "hidden": [USER, {**ANSWER, "name": "hidden"}, USER],
    "answer last": [USER, ANSWER],
}

# Transformers refuses the role of a tool's result, which we replace.
ADAPTED = {("mistral", "tool round")}

MakeTokenizers = Callable[..., tuple[Tokenizer, Any]]


@pytest.fixture
def make_tokenizers(tmp_path: Path) -> MakeTokenizers:
    """Returns a function that makes a Tokenizer with the templates and special tokens, and transformers' tokenizer of
    the same directory.
    """

    def build(templates: Any = None, tokens: tuple[str, ...] = ("<s>", "</s>")) -> tuple[Tokenizer, Any]:
        vocab = {token: n for n, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True) for token in tokens])
        backend.save(str(tmp_path / "tokenizer.json"))
        eos = {"__type": "AddedToken", "content": "</s>", "special": True}
        config = {"bos_token": "<s>", "eos_token": eos, "chat_template": templates}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return Tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)

    return build


def text_of(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> str:
    return template.render(messages, **options).text


def render_or_error(render: Callable[[], str]) -> tuple[str | None, str | None]:
    """Returns (text, None), or (None, error message)."""
    try:
        return render(), None
    except (jinja2.TemplateError, TemplateError, TypeError) as error:
        return None, str(error)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_that_of_transformers(
    make_tokenizers: MakeTokenizers, template: str, conversation: str, tools: Any
) -> None:
    tokenizer, hf_tokenizer = make_tokenizers(TEMPLATES[template])
    messages = CONVERSATIONS[conversation]
    chat_template = ChatTemplate.select(tokenizer, explicit=None)
    for variables in ({}, {"enable_thinking": False, "date_string": "today", "bos_token": "<other>"}):
        for prompt in (True, False):
            options = {"tools": tools, "add_generation_prompt": prompt, **variables}
            expected, expected_error = render_or_error(
                partial(hf_tokenizer.apply_chat_template, messages, tokenize=False, **options)
            )
            text, error = render_or_error(partial(text_of, chat_template, messages, **options))
            if error is None and (template, conversation) in ADAPTED:
                assert expected_error
                continue
            assert text == expected
            assert (expected_error or "") in (error or "")
            assert bool(expected_error) == bool(error)


def test_most_prompts_of_the_comparison_render(make_tokenizers: MakeTokenizers) -> None:
    """Most prompts of the comparison with transformers render. Without this test, the comparison would also pass if
    both sides failed."""
    num_rendered = 0
    for source in TEMPLATES.values():
        template = ChatTemplate.select(make_tokenizers(source)[0], explicit=None)
        for messages in CONVERSATIONS.values():
            try:
                num_rendered += bool(template.render(messages).text)
            except TemplateError:
                continue
    assert num_rendered >= 0.8 * len(TEMPLATES) * len(CONVERSATIONS)


def test_requests_with_tools_use_the_tool_template(make_tokenizers: MakeTokenizers) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer, hf_tokenizer = make_tokenizers(named)
    template = ChatTemplate.select(tokenizer, explicit=None)
    assert template.render([USER]).text == "plain" == hf_tokenizer.apply_chat_template([USER], tokenize=False)
    assert template.render([USER], tools=TOOLS).text == "tools"
    assert template.render([USER], tools=[]).text == "plain"
    assert ChatTemplate.select(tokenizer, explicit=None, default_key="tool_use").render([USER]).text == "tools"
    assert (
        ChatTemplate.select(tokenizer, explicit=None, tool_key="none such").render([USER], tools=TOOLS).text == "plain"
    )


def test_explicit_template_overrides_the_checkpoints(make_tokenizers: MakeTokenizers, tmp_path: Path) -> None:
    tokenizer, _ = make_tokenizers([{"name": "default", "template": "own"}, {"name": "tool_use", "template": "tools"}])
    path = tmp_path / "mine.jinja"
    path.write_text("mine {{ messages[0].content }}", encoding="utf-8")
    assert (
        ChatTemplate.select(tokenizer, explicit=str(path)).render([USER], tools=TOOLS).text == "mine " + USER["content"]
    )
    chatml = ChatTemplate.select(tokenizer, explicit="qwen")
    assert chatml.name == "built-in 'chatml'"
    assert chatml.render([USER]).text == f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"


def test_unknown_explicit_name_lists_the_built_in_names(make_tokenizers: MakeTokenizers) -> None:
    with pytest.raises(TemplateError, match=r"MODEL_TEMPLATE_TYPE=gpt9 .*chatml, llama2"):
        ChatTemplate.select(make_tokenizers()[0], explicit="gpt9")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen2", "chatml"),
        ("qwen3_moe", "chatml"),
        ("llama", "llama2"),
        ("llama-3", "llama3"),
        ("mixtral", "mistral"),
        ("internlm2", "internlm2"),
    ],
)
def test_checkpoint_without_template_gets_the_built_in_of_its_family(
    make_tokenizers: MakeTokenizers, model_type: str, name: str
) -> None:
    tokenizer, _ = make_tokenizers()
    template = ChatTemplate.select(tokenizer, explicit=None, model_type=model_type)
    assert template.name == f"built-in {name!r}"
    assert (
        template.render([SYSTEM, USER]).text
        == ChatTemplate.select(tokenizer, explicit=name).render([SYSTEM, USER]).text
    )


def test_llama_generation_is_detected_by_control_tokens(make_tokenizers: MakeTokenizers) -> None:
    tokenizer, _ = make_tokenizers(tokens=("<s>", "</s>", "<|start_header_id|>"))
    assert ChatTemplate.select(tokenizer, explicit=None, model_type="llama").name == "built-in 'llama3'"


def test_missing_template_error_names_the_fixes(make_tokenizers: MakeTokenizers) -> None:
    template = ChatTemplate.select(make_tokenizers()[0], explicit=None, model_type="gpt_neox")
    assert template.name == "none"
    with pytest.raises(TemplateError, match=r"MODEL_TEMPLATE_TYPE.*chatml.*/v1/completions"):
        template.render([USER])


BUILT_IN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n"
    "<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
    "internlm2": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n"
    "<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST] B </s><s>[INST] C [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] S\n\nA [/INST] B</s>[INST] C [/INST]",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(make_tokenizers: MakeTokenizers, name: str) -> None:
    template = ChatTemplate.select(make_tokenizers()[0], explicit=name)
    turns = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C")]
    assert template.render([{"role": role, "content": content} for role, content in turns]).text == BUILT_IN[name]


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_built_in_templates_require_alternating_turns(make_tokenizers: MakeTokenizers, name: str) -> None:
    with pytest.raises(TemplateError, match="must alternate"):
        ChatTemplate.select(make_tokenizers()[0], explicit=name).render([USER, USER])


def test_built_in_chatml_with_tools(make_tokenizers: MakeTokenizers) -> None:
    template = ChatTemplate.select(make_tokenizers()[0], explicit="chatml")
    results = [{"role": "tool", "content": "9 °C"}, {"role": "tool", "content": "8 °C"}]
    call_message = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
    text = template.render([SYSTEM, USER, call_message, *results], tools=TOOLS).text
    assert text.startswith("<|im_start|>system\n You are terse. \n\n# Tools")
    assert text.count("<|im_start|>system") == 1
    assert "<tools>\n" + json.dumps(TOOLS[0], ensure_ascii=False) + "\n</tools>" in text
    tool_call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich <1>"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{tool_call}\n{tool_call}<|im_end|>\n" in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n9 °C\n</tool_response>\n<tool_response>\n8 °C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_parts_are_joined_for_text_templates(make_tokenizers: MakeTokenizers) -> None:
    template = ChatTemplate.select(make_tokenizers()[0], explicit="mistral")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]).text == "<s>[INST] ab [/INST]"


def test_templates_that_iterate_content_get_parts(make_tokenizers: MakeTokenizers) -> None:
    loop_source = (
        "{% for part in messages[0]['content'] | selectattr('type', 'equalto', 'text') %}[{{ part.text }}]{% endfor %}"
    )
    template = ChatTemplate.select(make_tokenizers(loop_source)[0], explicit=None)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]).text == "[a][b]"
    assert (
        template.render([{"role": "user", "content": "ab"}]).text == "[ab]"
    )  # iterating over a str would render nothing


def test_templates_that_test_for_string_get_text_unchanged(make_tokenizers: MakeTokenizers) -> None:
    loop_source = "{% for part in messages[0].content %}part{% endfor %}"
    source = "{% if messages[0].content is string %}text{% else %}" + loop_source + "{% endif %}"
    template = ChatTemplate.select(make_tokenizers(source)[0], explicit=None)
    assert template.render([{"role": "user", "content": "a"}]).text == "text"
    assert template.render([{"role": "user", "content": [{"type": "text", "text": "a"}]}]).text == "part"


@pytest.mark.parametrize("source", [MISTRAL_STYLE, ODDITIES], ids=["text", "parts"])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "http://x"}}, "'image_url'"),
        ({"type": "input_audio"}, "'input_audio'"),
        ({"type": "video_url"}, "'video_url'"),
        ({"text": "no type"}, "None"),
        ("bare", "'str'"),
        ({"type": "text"}, '"text"'),
    ],
)
def test_unsupported_parts_are_rejected_with_their_type(
    make_tokenizers: MakeTokenizers, source: str, part: Any, message: str
) -> None:
    template = ChatTemplate.select(make_tokenizers(source)[0], explicit=None)
    with pytest.raises(TemplateError, match=message):
        template.render([{"role": "user", "content": [{"type": "text", "text": "see"}, part]}])


def test_null_content_is_empty_text_unless_the_template_tests_for_null(make_tokenizers: MakeTokenizers) -> None:
    null_message = [{"role": "assistant", "content": None}]
    assert (
        ChatTemplate.select(make_tokenizers("<{{ messages[0]['content'] }}>")[0], explicit=None)
        .render(null_message)
        .text
        == "<>"
    )
    source = "{{ 'null' if messages[0]['content'] is none else 'text' }}"
    assert ChatTemplate.select(make_tokenizers(source)[0], explicit=None).render(null_message).text == "null"


def test_arguments_sent_as_json_text_reach_the_template_as_an_object(make_tokenizers: MakeTokenizers) -> None:
    def call_message(arguments: str) -> list[dict[str, Any]]:
        return [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    template = ChatTemplate.select(make_tokenizers(CHATML_WITH_TOOLS)[0], explicit=None)
    assert '"arguments": {"a": "é"}}' in template.render(call_message('{"a":"\\u00e9"}')).text
    for broken in ("{broken", "[" * 100_000, '{"a":' + "1" * 5000 + "}"):
        assert f'"arguments": {json.dumps(broken)}}}' in template.render(call_message(broken)).text
    source = "{{ 'json ' + messages[1].tool_calls[0]['function']['arguments'] + '!' }}"
    assert (
        ChatTemplate.select(make_tokenizers(source)[0], explicit=None).render(call_message('{"a":1}')).text
        == 'json {"a":1}!'
    )


def test_a_message_that_is_not_an_object_is_rejected(make_tokenizers: MakeTokenizers) -> None:
    template = ChatTemplate.select(make_tokenizers("{{ messages }}")[0], explicit=None)
    messages: Any = ["hello"]
    with pytest.raises(TemplateError, match="must be an object"):
        template.render(messages)


def test_render_does_not_modify_the_messages(make_tokenizers: MakeTokenizers) -> None:
    template = ChatTemplate.select(make_tokenizers(CHATML_WITH_TOOLS)[0], explicit=None)
    text = '{"city":"Bern"}'
    messages: list[dict[str, Any]]
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": text}}]}]
    before = json.dumps(messages)
    template.render(messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no cats') }}", "does not accept these messages: no cats"),
        ("{{ messages[0].content + 1 }}", "failed on these messages: .*str"),
        ("{{ nothing.at.all }}", "failed on these messages: 'nothing' is undefined"),
        ("{{ messages.append(1) }}", "failed on these messages: .*unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "failed on these messages: .*unsafe"),
    ],
)
def test_error_of_a_failing_template_has_no_traceback(
    make_tokenizers: MakeTokenizers, source: str, message: str
) -> None:
    with pytest.raises(TemplateError, match=message) as error_info:
        ChatTemplate.select(make_tokenizers(source)[0], explicit=None).render([USER])
    assert "Traceback" not in str(error_info.value)


def test_syntax_error_is_raised_by_select(make_tokenizers: MakeTokenizers) -> None:
    with pytest.raises(TemplateError, match=r"'default'.*line 2.*MODEL_TEMPLATE_TYPE"):
        ChatTemplate.select(make_tokenizers("\n{% if %}")[0], explicit=None)
