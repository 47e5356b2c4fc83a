"""Chat templates against transformers' apply_chat_template, the choice between them, and the sentences for errors."""

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

# Whitespace rules, loop controls, scopes, a macro that takes text or parts, and variables nobody passes.
ODDITIES = """\
{% macro text_of(content) %}
{% if content is string %}{{ content }}{% else %}{% for part in content %}{{ part.text }}{% endfor %}{% endif %}
{% endmacro %}
{# a comment #}
  {% set seen = 0 %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
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
    "prefill": [USER, ANSWER],
}

Make = Callable[..., tuple[Tokenizer, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A tokenizer with the given templates and special tokens, and transformers' own of the same folder."""

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


def outcome(render: Callable[[], str]) -> tuple[str | None, str | None]:
    """The text, or what the error says."""
    try:
        return render(), None
    except (jinja2.TemplateError, TemplateError, TypeError) as error:
        return None, str(error)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_that_of_transformers(make: Make, template: str, conversation: str, tools: Any) -> None:
    ours, theirs = make(TEMPLATES[template])
    messages = CONVERSATIONS[conversation]
    chosen = ChatTemplate.select(ours, explicit=None)
    for variables in ({}, {"enable_thinking": False, "date_string": "today", "bos_token": "<other>"}):
        for prompt in (True, False):
            options = {"tools": tools, "add_generation_prompt": prompt, **variables}
            expected, refused = outcome(partial(theirs.apply_chat_template, messages, tokenize=False, **options))
            text, error = outcome(partial(chosen.render, messages, **options))
            assert text == expected
            assert (refused or "") in (error or "")
            assert bool(refused) == bool(error)


def test_most_of_those_prompts_are_no_errors(make: Make) -> None:
    """Guards the comparison above: two errors also agree."""
    rendered = 0
    for source in TEMPLATES.values():
        chosen = ChatTemplate.select(make(source)[0], explicit=None)
        for messages in CONVERSATIONS.values():
            try:
                rendered += bool(chosen.render(messages))
            except TemplateError:
                continue
    assert rendered >= 0.8 * len(TEMPLATES) * len(CONVERSATIONS)


def test_tools_have_a_template_of_their_own_where_there_is_one(make: Make) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    ours, theirs = make(named)
    chosen = ChatTemplate.select(ours, explicit=None)
    assert chosen.render([USER]) == "plain" == theirs.apply_chat_template([USER], tokenize=False)
    assert chosen.render([USER], tools=TOOLS) == "tools"
    assert chosen.render([USER], tools=[]) == "plain"
    assert ChatTemplate.select(ours, explicit=None, default_key="tool_use").render([USER]) == "tools"
    assert ChatTemplate.select(ours, explicit=None, tool_key="none such").render([USER], tools=TOOLS) == "plain"


def test_forced_goes_before_the_checkpoints_own(make: Make, tmp_path: Path) -> None:
    ours, _ = make([{"name": "default", "template": "own"}, {"name": "tool_use", "template": "tools"}])
    path = tmp_path / "mine.jinja"
    path.write_text("mine {{ messages[0].content }}", encoding="utf-8")
    assert ChatTemplate.select(ours, explicit=str(path)).render([USER], tools=TOOLS) == "mine " + USER["content"]
    chatml = ChatTemplate.select(ours, explicit="qwen")
    assert chatml.name == "built-in 'chatml'"
    assert chatml.render([USER]) == f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"


def test_a_forced_name_that_is_nothing_lists_the_names(make: Make) -> None:
    with pytest.raises(TemplateError, match=r"MODEL_TEMPLATE_TYPE=gpt9 .*chatml, llama2"):
        ChatTemplate.select(make()[0], explicit="gpt9")


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
def test_a_checkpoint_without_template_gets_its_familys(make: Make, model_type: str, name: str) -> None:
    ours, _ = make()
    chosen = ChatTemplate.select(ours, explicit=None, model_type=model_type)
    assert chosen.name == f"built-in {name!r}"
    assert chosen.render([SYSTEM, USER]) == ChatTemplate.select(ours, explicit=name).render([SYSTEM, USER])


def test_llama_generations_are_told_apart_by_their_tokens(make: Make) -> None:
    ours, _ = make(tokens=("<s>", "</s>", "<|start_header_id|>"))
    assert ChatTemplate.select(ours, explicit=None, model_type="llama").name == "built-in 'llama3'"


def test_having_no_template_says_what_to_do(make: Make) -> None:
    chosen = ChatTemplate.select(make()[0], explicit=None, model_type="gpt_neox")
    assert chosen.name == "none"
    with pytest.raises(TemplateError, match=r"MODEL_TEMPLATE_TYPE.*chatml.*/v1/completions"):
        chosen.render([USER])


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
def test_built_in_templates(make: Make, name: str) -> None:
    chosen = ChatTemplate.select(make()[0], explicit=name)
    turns = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C")]
    assert chosen.render([{"role": role, "content": content} for role, content in turns]) == BUILT_IN[name]


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_built_in_templates_of_turns_refuse_another_order(make: Make, name: str) -> None:
    with pytest.raises(TemplateError, match="must alternate"):
        ChatTemplate.select(make()[0], explicit=name).render([USER, USER])


def test_built_in_chatml_with_tools(make: Make) -> None:
    chosen = ChatTemplate.select(make()[0], explicit="chatml")
    results = [{"role": "tool", "content": "9 °C"}, {"role": "tool", "content": "8 °C"}]
    call = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
    text = chosen.render([SYSTEM, USER, call, *results], tools=TOOLS)
    assert text.startswith("<|im_start|>system\n You are terse. \n\n# Tools")
    assert text.count("<|im_start|>system") == 1
    assert "<tools>\n" + json.dumps(TOOLS[0], ensure_ascii=False) + "\n</tools>" in text
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich <1>"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{one}\n{one}<|im_end|>\n" in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n9 °C\n</tool_response>\n<tool_response>\n8 °C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_parts_are_joined_for_templates_that_know_only_text(make: Make) -> None:
    chosen = ChatTemplate.select(make()[0], explicit="mistral")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chosen.render([{"role": "user", "content": parts}]) == "<s>[INST] ab [/INST]"


def test_parts_reach_templates_that_loop_over_them(make: Make) -> None:
    loop = (
        "{% for part in messages[0]['content'] | selectattr('type', 'equalto', 'text') %}[{{ part.text }}]{% endfor %}"
    )
    chosen = ChatTemplate.select(make(loop)[0], explicit=None)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chosen.render([{"role": "user", "content": parts}]) == "[a][b]"
    assert chosen.render([{"role": "user", "content": "ab"}]) == "[ab]"  # such a template would render nothing of a str


def test_text_stays_text_for_templates_that_ask_which_it_is(make: Make) -> None:
    loop = "{% for part in messages[0].content %}part{% endfor %}"
    both = "{% if messages[0].content is string %}text{% else %}" + loop + "{% endif %}"
    chosen = ChatTemplate.select(make(both)[0], explicit=None)
    assert chosen.render([{"role": "user", "content": "a"}]) == "text"
    assert chosen.render([{"role": "user", "content": [{"type": "text", "text": "a"}]}]) == "part"


@pytest.mark.parametrize("template", [MISTRAL_STYLE, ODDITIES], ids=["text", "parts"])
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "http://x"}}, "'image_url'"),
        ({"type": "input_audio"}, "'input_audio'"),
        ({"type": "video_url"}, "'video_url'"),
        ({"text": "no type"}, "None"),
        ("bare", "'str'"),
        ({"type": "text"}, '"text"'),
    ],
)
def test_parts_that_are_not_text_are_refused_by_name(make: Make, template: str, part: Any, said: str) -> None:
    chosen = ChatTemplate.select(make(template)[0], explicit=None)
    with pytest.raises(TemplateError, match=said):
        chosen.render([{"role": "user", "content": [{"type": "text", "text": "see"}, part]}])


def test_null_content_is_empty_text_except_where_the_template_asks_for_null(make: Make) -> None:
    null = [{"role": "assistant", "content": None}]
    assert ChatTemplate.select(make("<{{ messages[0]['content'] }}>")[0], explicit=None).render(null) == "<>"
    asks = "{{ 'null' if messages[0]['content'] is none else 'text' }}"
    assert ChatTemplate.select(make(asks)[0], explicit=None).render(null) == "null"


def test_arguments_sent_as_json_text_reach_the_template_as_an_object(make: Make) -> None:
    def call(arguments: str) -> list[dict[str, Any]]:
        return [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    chosen = ChatTemplate.select(make(CHATML_WITH_TOOLS)[0], explicit=None)
    assert '"arguments": {"a": "é"}}' in chosen.render(call('{"a":"\\u00e9"}'))
    for broken in ("{broken", "[" * 100_000, '{"a":' + "1" * 5000 + "}"):
        assert f'"arguments": {json.dumps(broken)}}}' in chosen.render(call(broken))
    joins = "{{ 'json ' + messages[1].tool_calls[0]['function']['arguments'] + '!' }}"
    assert ChatTemplate.select(make(joins)[0], explicit=None).render(call('{"a":1}')) == 'json {"a":1}!'


def test_a_message_that_is_no_object_is_refused(make: Make) -> None:
    chosen = ChatTemplate.select(make("{{ messages }}")[0], explicit=None)
    messages: Any = ["hello"]
    with pytest.raises(TemplateError, match="must be an object"):
        chosen.render(messages)


def test_rendering_leaves_the_messages_alone(make: Make) -> None:
    chosen = ChatTemplate.select(make(CHATML_WITH_TOOLS)[0], explicit=None)
    text = '{"city":"Bern"}'
    messages: list[dict[str, Any]]
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": text}}]}]
    before = json.dumps(messages)
    chosen.render(messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('no cats') }}", "does not accept these messages: no cats"),
        ("{{ messages[0].content + 1 }}", "failed on these messages: .*str"),
        ("{{ nothing.at.all }}", "failed on these messages: 'nothing' is undefined"),
        ("{{ messages.append(1) }}", "failed on these messages: .*unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "failed on these messages: .*unsafe"),
    ],
)
def test_a_failing_template_is_one_sentence(make: Make, source: str, said: str) -> None:
    with pytest.raises(TemplateError, match=said) as raised:
        ChatTemplate.select(make(source)[0], explicit=None).render([USER])
    assert "Traceback" not in str(raised.value)


def test_a_syntax_error_is_found_when_the_template_is_chosen(make: Make) -> None:
    with pytest.raises(TemplateError, match=r"'default'.*line 2.*MODEL_TEMPLATE_TYPE"):
        ChatTemplate.select(make("\n{% if %}")[0], explicit=None)
