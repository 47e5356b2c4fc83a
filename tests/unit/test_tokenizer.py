"""Compares the tokenizer with transformers' AutoTokenizer of the same directory; tests the errors of invalid files."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rtp_llm.errors import CheckpointError
from rtp_llm.text.tokenizer import Tokenizer
from tests.unit.tokenizer_files import FAMILIES, declare, llama_like, qwen_like, write

SENTENCES = [
    "",
    " ",
    "the cat",
    "  two  spaces ",
    "the\n\n\tcat's 123 hats",
    "naïve café — 中文 🙂👩‍👩‍👧",
    "e\u0301 decomposed",
    "<s>the</s> <|im_start|>user\nthe<|im_end|>",
    "a<tool_call>b</tool_call>",
    "<0x41> literal",
    "word [PAD] <extra>",
]


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    directory = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    return Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def qwen(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(qwen_like(tmp_path))


@pytest.fixture
def llama(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(llama_like(tmp_path))


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", SENTENCES)
def test_ids_and_text_are_those_of_transformers(
    tokenizers: tuple[Tokenizer, Any], text: str, add_special_tokens: bool
) -> None:
    tokenizer, hf_tokenizer = tokenizers
    ids = tokenizer.encode(text, add_special_tokens)
    assert ids == hf_tokenizer.encode(text, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == hf_tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text_and_any_ids_agree_with_transformers(tokenizers: tuple[Tokenizer, Any], data: st.DataObject) -> None:
    tokenizer, hf_tokenizer = tokenizers
    text = data.draw(st.text())
    assert tokenizer.encode(text) == hf_tokenizer.encode(text)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=20))
    assert tokenizer.decode(ids) == hf_tokenizer.decode(ids, skip_special_tokens=True)


def test_sizes_and_special_ids_are_those_of_transformers(tokenizers: tuple[Tokenizer, Any]) -> None:
    tokenizer, hf_tokenizer = tokenizers
    assert tokenizer.vocab_size == len(hf_tokenizer)
    assert tokenizer.token_id(tokenizer.special_tokens.get("bos_token", "")) == hf_tokenizer.bos_token_id
    assert hf_tokenizer.eos_token_id in tokenizer.eos_ids
    assert set(hf_tokenizer.all_special_ids) <= tokenizer.special_ids
    assert tokenizer.special_tokens == hf_tokenizer.special_tokens_map


def test_eos_ids_are_the_union_of_three_files(qwen: Tokenizer) -> None:
    end_of_text, im_end = qwen.token_id("<|endoftext|>"), qwen.token_id("<|im_end|>")
    assert qwen.eos_ids == {7, end_of_text, im_end}


def test_a_prompt_never_begins_with_two_bos_tokens(tmp_path: Path) -> None:
    """A rendered chat that a client sends as a prompt begins with the bos token, which the checkpoint adds, too."""
    tokenizer = Tokenizer.load(llama_like(tmp_path))
    assert tokenizer.encode("<s>the") == [1, *tokenizer.encode("<s>the", add_special_tokens=False)]
    assert tokenizer.encode_prompt("<s>the") == tokenizer.encode("<s>the", add_special_tokens=False)
    assert tokenizer.encode_prompt("the") == tokenizer.encode("the")
    ids, tokens, offsets = tokenizer.encode_with_offsets("<s>the")
    assert (ids, tokens, offsets) == (tokenizer.encode_prompt("<s>the"), ["<s>", "the"], [(0, 3), (3, 6)])
    without_bos = Tokenizer.load(llama_like(tmp_path, bos=False))
    assert without_bos.encode_prompt("<s><s>") == [1, 1]  # as the client wants it


def test_bos_follows_the_post_processor(tmp_path: Path) -> None:
    assert Tokenizer.load(llama_like(tmp_path, bos=True)).encode("the")[0] == 1
    assert Tokenizer.load(llama_like(tmp_path, bos=False)).encode("the")[0] != 1


def test_offsets_are_characters_and_tokens_are_text(qwen: Tokenizer, llama: Tokenizer) -> None:
    text = "the cat é"
    ids, tokens, offsets = qwen.encode_with_offsets(text)
    assert ids == qwen.encode(text)
    assert tokens == ["the", " cat", " ", "é"]
    assert [text[start:end] for start, end in offsets] == tokens
    assert llama.encode_with_offsets(text)[1] == ["<s>", " the", " cat", " ", "é"]
    assert llama.encode_with_offsets(text, add_special_tokens=False)[1][0] == " the"


def test_bytes_of_byte_level_tokens(qwen: Tokenizer) -> None:
    ids = qwen.encode("the 中🙂<|im_end|>")
    assert b"".join(map(qwen.token_bytes, ids)) == "the 中🙂<|im_end|>".encode()
    partial_character = qwen.token_id("ä\u00b8")
    assert partial_character is not None
    assert (qwen.token_bytes(partial_character), qwen.token_text(partial_character)) == (b"\xe4\xb8", "\ufffd")
    every_byte = [qwen.token_bytes(token_id) for token_id in range(256)]
    assert sorted(every_byte) == [bytes([value]) for value in range(256)]


def test_bytes_of_sentencepiece_tokens(llama: Tokenizer) -> None:
    assert llama.token_bytes(3 + 0xE4) == b"\xe4"
    assert llama.token_bytes(1) == b"<s>"
    assert llama.token_bytes(llama.token_id("▁the") or 0) == b" the"
    assert llama.token_bytes(llama.token_id("中") or 0) == "中".encode()
    assert len(llama.byte_ids) == 256
    assert not llama.byte_level


def test_added_tokens_are_literal_text(tmp_path: Path) -> None:
    """An added token such as <é> is decoded to its own text. Byte-level decoding would change it: é stands for the byte
    0xE9 there."""
    qwen_like(tmp_path)
    declare(tmp_path, "<é>")
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("a<é>")
    assert len(ids) == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<é>"


def test_a_special_token_keeps_sentencepieces_space_character(tmp_path: Path) -> None:
    llama_like(tmp_path)
    declare(tmp_path, "<end▁of▁turn>")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.token_text(tokenizer.token_id("<end▁of▁turn>") or 0) == "<end▁of▁turn>"


def test_ids_outside_the_vocabulary_have_no_text(qwen: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer in (qwen, llama):
        assert tokenizer.token_bytes(tokenizer.vocab_size + 10) == b""
        assert tokenizer.decode([tokenizer.vocab_size + 10]) == ""


def test_an_unpaired_surrogate_is_a_value_error(qwen: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        qwen.encode("half of a pair: \ud83d")


def test_template_files_override_the_config(tmp_path: Path) -> None:
    qwen_like(tmp_path)
    assert Tokenizer.load(tmp_path).templates == {}
    write(tmp_path, "tokenizer_config.json", {"chat_template": "plain"})
    assert Tokenizer.load(tmp_path).templates == {"default": "plain"}
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert Tokenizer.load(tmp_path).templates == {"default": "D", "tool_use": "T"}
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert Tokenizer.load(tmp_path).templates == {"default": "file", "tool_use": "T", "rag": "R"}


def test_missing_directory_error_names_the_variable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*TOKENIZER_PATH"):
        Tokenizer.load(tmp_path / "nowhere")


def test_missing_tokenizer_json_error_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model.*AutoTokenizer.*save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1", "not valid JSON.*LFS"),
        ("tokenizer.json", b'{"model": ', "not valid JSON"),
        ("tokenizer.json", b"[]", "JSON list, not an object"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "not a usable tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b'{"chat_template": [{"template": "x"}]}', "chat_template must be"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template must be"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "tokens in an unknown format"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"one": {}}}', "tokens in an unknown format"),
        ("tokenizer_config.json", b'{"extra_special_tokens": 3}', "tokens in an unknown format"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "eos_token_id is '</s>'"),
        ("config.json", b'{"eos_token_id": [1, null]}', "eos_token_id"),
    ],
)
def test_error_names_the_invalid_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    qwen_like(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}.*{message}"):
        Tokenizer.load(tmp_path)


def test_error_names_the_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()  # root can read files without read permission
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json: Is a directory"):
        Tokenizer.load(tmp_path)


def test_text_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, rtp_llm.text.detokenizer, rtp_llm.text.stop, rtp_llm.text.template\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False).returncode == 0
