"""Messages cannot spell control tokens: only the chat template writes them.

The judge is transformers, with `split_special_tokens` for the text of a turn; what hypothesis writes is joined from
control tokens, parts of them and words.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from rtp_llm.text.template import ChatTemplate, TemplateError
from rtp_llm.text.tokenizer import Tokenizer
from tests.unit.tokenizer_files import FAMILIES, declare, llama_like, qwen_like, write

# Fields of one message and of several stand side by side, stripped and not, in JSON and not.
JOINING = """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ message.name ~ '\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{{ part.text }}{{ part.text | trim }}{% endfor %}{% endif %}
{%- for call in message.tool_calls %}{{ '<tool_call>' ~ call.function.name ~ (call.function.arguments | tojson) }}
{%- for key, value in call.function.arguments.items() %}{{ key ~ value ~ (value | trim) }}{% endfor %}
{{- '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- for tool in tools or [] %}{{ tool.function.name ~ tool.function.description }}{% endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"

PIECES = ["<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>", "<|im_", "end|>", "<", "|", "|>", ">", "im_end"]
TEXT = st.lists(st.sampled_from([*PIECES, "the", " ", "\n", "7", "é", '"']), max_size=6).map("".join)


@pytest.fixture(scope="module", params=["qwen", "llama", "llama-legacy"])
def joining(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, ChatTemplate]:
    """A tokenizer with ChatML's control tokens, and a template that joins the fields of messages."""
    directory = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    if request.param != "qwen":
        config = json.loads((directory / "tokenizer_config.json").read_text())
        tags = [AddedToken(tag, special=False, normalized=False) for tag in ("<tool_call>", "</tool_call>")]
        backend = Backend.from_file(str(directory / "tokenizer.json"))
        backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        backend.add_tokens(tags)
        backend.save(str(directory / "tokenizer.json"))
        write(directory, "tokenizer_config.json", config)
    tokenizer = Tokenizer.load(directory)
    return tokenizer, ChatTemplate("test", JOINING, None, tokenizer)


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in tokenizer.added_tokens]


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(TEXT | st.lists(TEXT, min_size=1, max_size=3), min_size=1, max_size=3),
    name=TEXT,
    arguments=st.dictionaries(TEXT, TEXT, max_size=2),
    description=TEXT,
)
def test_the_control_tokens_of_a_prompt_are_the_templates(
    joining: tuple[Tokenizer, ChatTemplate],
    contents: list[str | list[str]],
    name: str,
    arguments: dict[str, str],
    description: str,
) -> None:
    tokenizer, template = joining

    def chat(harmless: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        def spell(text: str) -> str:
            return "x" if harmless else text

        call = {"function": {"name": spell(name), "arguments": {spell(k): spell(v) for k, v in arguments.items()}}}
        turns: list[dict[str, Any]] = [
            {
                "role": "user",
                "name": spell(name),
                "content": spell(content)
                if isinstance(content, str)
                else [{"type": "text", "text": spell(text)} for text in content],
            }
            for content in contents
        ]
        tools = [{"type": "function", "function": {"name": spell(name), "description": spell(description)}}]
        return [*turns, {"role": "assistant", "content": "", "tool_calls": [call]}, *turns], tools

    messages, tools = chat(harmless=False)
    prompt = template.render(messages, tools=tools)
    ids = template.encode(prompt)
    harmless_messages, harmless_tools = chat(harmless=True)
    harmless_ids = template.encode(template.render(harmless_messages, tools=harmless_tools))
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, harmless_ids)
    assert prompt.text == template.render(messages, tools=tools, allow_special_tokens=True).text
    if tokenizer.byte_level:
        assert tokenizer.decode(ids, skip_special_tokens=False) == prompt.text


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTemplate, Any]:
    """A template, and transformers' tokenizer of the same files, in which all control tokens are special."""
    directory = qwen_like(tmp_path_factory.mktemp("split"))
    hf_tokenizer = AutoTokenizer.from_pretrained(directory)
    hf_tokenizer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=True)
    return ChatTemplate("test", PLAIN + "{# <tool_call></tool_call> #}", None, Tokenizer.load(directory)), hf_tokenizer


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(st.text() | TEXT, min_size=1, max_size=3))
def test_spelled_tokens_are_encoded_as_transformers_splits_them(
    split: tuple[ChatTemplate, Any], contents: list[str]
) -> None:
    template, hf_tokenizer = split
    start, end = hf_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    expected = []
    for text in contents:
        turn = hf_tokenizer.encode(f"user\n{text}", add_special_tokens=False, split_special_tokens=True)
        expected += [start, *turn, end]
    assert ids_of(template, *({"role": "user", "content": text} for text in contents)) == expected


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTemplate, Any]:
    directory = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    (directory / "chat_template.jinja").write_text("{{ bos_token }}" + PLAIN)
    return ChatTemplate.select(Tokenizer.load(directory), explicit=None), AutoTokenizer.from_pretrained(directory)


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(st.text(), min_size=1, max_size=3))
def test_without_spelled_tokens_the_ids_are_those_of_transformers(
    plain: tuple[ChatTemplate, Any], contents: list[str]
) -> None:
    template, hf_tokenizer = plain
    messages = [{"role": "user", "content": text} for text in contents]
    assert ids_of(template, *messages) == hf_tokenizer.apply_chat_template(messages, return_dict=False)


def ids_of(template: ChatTemplate, *messages: dict[str, Any], **options: Any) -> list[int]:
    return template.encode(template.render(messages, **options))


@pytest.fixture
def qwen(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(qwen_like(tmp_path))


def test_allowed_control_tokens_are_tokens(qwen: Tokenizer) -> None:
    template = ChatTemplate("test", PLAIN, None, qwen)
    message = {"role": "user", "content": "a<|im_end|>b"}
    end = qwen.token_id("<|im_end|>")
    assert ids_of(template, message).count(end or 0) == 1
    assert ids_of(template, message, allow_special_tokens=True).count(end or 0) == 2


def test_tags_of_the_template_are_tokens_in_the_assistants_words_only(qwen: Tokenizer) -> None:
    """Clients send back what the assistant said, with the tags that they saw; special tokens they never see."""
    template = ChatTemplate("test", PLAIN + "{{ '<tool_call>' if tools }}", None, qwen)
    tag, end = qwen.token_id("<tool_call>"), qwen.token_id("<|im_end|>")
    for role, num_tags in (("user", 0), ("system", 0), ("tool", 0), ("assistant", 1)):
        ids = ids_of(template, {"role": role, "content": "<tool_call><|im_end|>"})
        assert (ids.count(tag or 0), ids.count(end or 0)) == (num_tags, 1)


def test_added_words_that_the_template_does_not_write_are_tokens(qwen: Tokenizer) -> None:
    template = ChatTemplate("test", PLAIN, None, qwen)
    assert qwen.token_id("<tool_call>") in ids_of(template, {"role": "user", "content": "<tool_call>"})


def test_special_tokens_of_request_variables_are_text_but_for_the_named_tokens(qwen: Tokenizer) -> None:
    template = ChatTemplate("test", "{{ eos_token }}{{ documents[0].text }}{{ hint }}", None, qwen)
    end = qwen.token_id("<|im_end|>") or 0
    documents = [{"text": "a<|im_end|>"}]
    assert ids_of(template, {"role": "user"}, documents=documents, hint="<|im_end|>").count(end) == 1


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("{{ '<|im_' ~ messages[0].content }}", "end|>"),
        ("{{ messages[0].content ~ 'end|>' }}", "<|im_"),
        ("{{ '<|im_' ~ (messages[0].content | trim) }}", " end|> "),
        ("{{ (messages[0].content | trim) ~ 'end|>' }}", " <|im_\n"),
    ],
)
def test_a_string_does_not_complete_a_token_with_the_templates_text(qwen: Tokenizer, source: str, content: str) -> None:
    template = ChatTemplate("test", source, None, qwen)
    assert template.render([{"role": "user", "content": content}]).text == "<|im_end|>"
    assert qwen.token_id("<|im_end|>") not in ids_of(template, {"role": "user", "content": content})


def test_errors_and_texts_show_messages_without_marks(qwen: Tokenizer) -> None:
    source = "{% if tools %}{{ raise_exception('no: ' ~ messages[0].content) }}{% endif %}" + PLAIN
    template = ChatTemplate("test", source, None, qwen)
    message = {"role": "user", "content": "7<|im_end|>7 and <|im_"}
    assert template.render([message]).text == "<|im_start|>user\n7<|im_end|>7 and <|im_<|im_end|>"
    with pytest.raises(TemplateError, match=r"no: 7<\|im_end\|>7 and <\|im_$"):
        template.render([message], tools=[{"type": "function"}])


def test_a_token_that_only_normalized_text_spells_is_text(tmp_path: Path) -> None:
    """NFKC makes ASCII of full-width letters, and tokens may be searched for after that."""
    backend = Backend(models.BPE(vocab={chr(code): code for code in range(128)}, merges=[]))
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken("<|im_end|>", normalized=True), AddedToken("<|im_start|>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    template = ChatTemplate("test", PLAIN, None, tokenizer)
    end = tokenizer.token_id("<|im_end|>") or 0
    wide = "".join(chr(ord(character) + 0xFEE0) for character in "<|im_end|>")
    assert tokenizer.encode(wide) == [end]
    for text in (wide, f"a {wide} b", wide[:4] + "_end|>", "<|im_\uff45nd|>", "<|im_end|>"):
        ids = ids_of(template, {"role": "user", "content": text})
        assert ids.count(end) == 1
        assert ids[6:-1] == [ord(c) for c in text.translate({ord(c): ord(c) - 0xFEE0 for c in wide})]


@pytest.mark.parametrize("model", ["words", "unigram"])
def test_a_control_token_that_is_a_word_too_is_cut(tmp_path: Path, model: str) -> None:
    if model == "words":
        vocab = {"<unk>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "user": 3, "a": 4}
        backend = Backend(models.WordLevel(vocab=vocab, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        pieces = [
            ("<unk>", 0.0),
            ("<|im_start|>", -1.0),
            ("<|im_end|>", -1.0),
            *((c, -2.0) for c in "<|im_end>user\na"),
        ]
        backend = Backend(models.Unigram([*dict(pieces).items()], unk_id=0, byte_fallback=False))
        backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens(["<unk>", "<|im_start|>", "<|im_end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    template = ChatTemplate("test", PLAIN, None, tokenizer)
    ids = ids_of(template, {"role": "user", "content": "a <|im_end|> a"})
    assert (ids.count(2), min(ids)) == (1, 0)
    if model == "unigram":
        wide = "".join(chr(ord(character) + 0xFEE0) for character in "<|im_end|>")
        for text in (wide, f"<|im_end|>{wide}"):
            assert ids_of(template, {"role": "user", "content": text}).count(2) == 1


def test_a_pickled_template_encodes_the_same(tmp_path: Path) -> None:
    template = ChatTemplate("test", JOINING, None, Tokenizer.load(declare_end(llama_like(tmp_path))))
    prompt = template.render([{"role": "user", "content": "a</s>b<end>"}])
    assert pickle.loads(pickle.dumps(template)).encode(prompt) == template.encode(prompt)


def declare_end(directory: Path) -> Path:
    declare(directory, "<end>")
    return directory
