"""Compares streamed text with transformers' decode of all ids, for any split of the ids."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rtp_llm.text.detokenizer import Detokenizer
from rtp_llm.text.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
WORDS = ["▁", "▁▁", "▁the", "▁Hello", "world", "a", ".", "中", "\ufffd", "é"]
ADDED = ["<think>", "two▁words"]


def byte_level() -> Backend:
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [token for token, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("the 中 🙂")]
    backend = Backend(models.BPE(vocab={t: n for n, t in enumerate([*characters, *tokens, "Ġthe", "ðŁ"])}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece() -> Backend:
    backend = Backend(models.BPE(vocab={t: n for n, t in enumerate([*BYTES, *WORDS])}, merges=[], byte_fallback=True))
    strip = decoders.Strip(content=" ", left=1, right=0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return backend


def metaspace() -> Backend:
    backend = Backend(models.BPE(vocab={t: n for n, t in enumerate(WORDS)}, merges=[]))
    backend.decoder = decoders.Metaspace()
    return backend


FAMILIES = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    backend = FAMILIES[request.param]()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(ADDED)
    folder = tmp_path_factory.mktemp(request.param)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder), PreTrainedTokenizerFast(tokenizer_object=backend)


def load(folder: Path, backend: Backend) -> Tokenizer:
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.fixture
def bpe(tmp_path: Path) -> Tokenizer:
    return load(tmp_path, byte_level())


@pytest.fixture
def spm(tmp_path: Path) -> Tokenizer:
    return load(tmp_path, sentencepiece())


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.token_id(token) for token in tokens]
    assert None not in ids
    return [token_id for token_id in ids if token_id is not None]


def as_bytes(text: str) -> list[str]:
    return [f"<0x{value:02X}>" for value in text.encode()]


def byte_by_byte(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of `text` in a byte-level vocabulary, one per byte."""
    return [next(n for n in range(256) if tokenizer.token_bytes(n) == bytes([value])) for value in text.encode()]


def stream(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    texts = [detokenizer.push(ids[start:end]) for start, end in pairwise(edges)]
    return [*texts, detokenizer.flush()]


# The same ids are used for every family, modulo its vocabulary size + 2, so that ids outside it occur too.
IDS = st.lists(st.integers(0, 2**16), max_size=24)


@settings(max_examples=250, deadline=None)
@given(ids=IDS, prompt=IDS, cuts=st.lists(st.integers(0, 24)), skip=st.booleans())
@example(ids=[256, 258], prompt=[258], cuts=[1], skip=True)
@example(ids=[0xC3, 0xA9, 0xFF, 260], prompt=[], cuts=[1, 2, 3], skip=True)
def test_stream_is_the_text_of_all_ids_without_the_prompts(
    tokenizers: tuple[Tokenizer, Any], ids: list[int], prompt: list[int], cuts: list[int], skip: bool
) -> None:
    tokenizer, oracle = tokenizers
    size = tokenizer.vocab_size + 2
    ids, prompt = [n % size for n in ids], [n % size for n in prompt]
    before = oracle.decode(prompt, skip_special_tokens=skip)
    full_text = oracle.decode(prompt + ids, skip_special_tokens=skip)
    text = "".join(stream(Detokenizer(tokenizer, skip, prompt), ids, cuts))
    if full_text.startswith(before):
        assert text == full_text[len(before) :]
    else:  # the ids changed the prompt's last character, which is the only text that is returned again
        assert full_text.endswith(text)
        assert len(full_text) - len(text) <= len(before)


@settings(max_examples=100, deadline=None)
@given(ids=IDS, cuts=st.lists(st.integers(0, 24)))
def test_later_ids_do_not_change_pushed_text(
    tokenizers: tuple[Tokenizer, Any], ids: list[int], cuts: list[int]
) -> None:
    tokenizer, _ = tokenizers
    ids = [n % tokenizer.vocab_size for n in ids]
    for end in range(len(ids)):
        pushed_text = "".join(stream(Detokenizer(tokenizer), ids[:end], cuts)[:-1])
        assert tokenizer.decode(ids).startswith(pushed_text)


def test_a_character_is_buffered_until_it_is_complete(bpe: Tokenizer, spm: Tokenizer) -> None:
    detokenizer = Detokenizer(bpe)
    assert [detokenizer.push([byte_id]) for byte_id in byte_by_byte(bpe, "🙂")] == ["", "", "", "🙂"]
    detokenizer = Detokenizer(spm)
    ids = ids_of(spm, *as_bytes("🙂"), "a")
    assert [detokenizer.push([token_id]) for token_id in ids] == ["", "", "", "", "🙂a"]


def test_flush_returns_replacement_characters_for_incomplete_ones(bpe: Tokenizer, spm: Tokenizer) -> None:
    for tokenizer, ids in (
        (bpe, ids_of(bpe, "Ġthe", "ðŁ")),
        (spm, ids_of(spm, "▁Hello", "▁the", "<0xF0>")),
    ):
        detokenizer = Detokenizer(tokenizer)
        assert detokenizer.push(ids).endswith(" the")
        assert detokenizer.flush() == "\ufffd"
        assert detokenizer.flush() == ""


def test_flush_returns_a_pending_run_of_byte_tokens(spm: Tokenizer) -> None:
    detokenizer = Detokenizer(spm)
    assert detokenizer.push(ids_of(spm, *as_bytes("中"))) == ""
    assert detokenizer.flush() == "中"


def test_leading_space_is_stripped_only_at_the_start_of_a_text(spm: Tokenizer) -> None:
    ids = ids_of(spm, "▁Hello", "▁Hello")
    assert Detokenizer(spm).push(ids) == "Hello Hello"
    assert Detokenizer(spm, prompt_ids=ids_of(spm, "<s>")).push(ids) == "Hello Hello"
    assert Detokenizer(spm, prompt_ids=ids_of(spm, "<s>", "▁the", "</s>")).push(ids) == " Hello Hello"
    assert Detokenizer(spm, False, ids_of(spm, "<s>")).push(ids) == " Hello Hello"
    assert Detokenizer(spm, prompt_ids=ids_of(spm, "a", *as_bytes("🙂"))).push(ids) == " Hello Hello"


def test_the_prompts_last_character_is_repeated_only_if_incomplete(bpe: Tokenizer, spm: Tokenizer) -> None:
    complete_ids = ids_of(spm, "a", *as_bytes("🙂"))
    assert Detokenizer(spm, prompt_ids=complete_ids).push(ids_of(spm, *as_bytes("é"), "a")) == "éa"
    assert Detokenizer(spm, prompt_ids=complete_ids[:-1]).push([complete_ids[-1], *ids_of(spm, "a")]) == "🙂a"
    byte_ids = byte_by_byte(bpe, "🙂")
    for incomplete, rest in ((ids_of(bpe, "Ġthe", "ðŁ"), byte_ids[2:]), (byte_ids[:3], byte_ids[3:])):
        assert Detokenizer(bpe, prompt_ids=incomplete).push(rest) == "🙂"
        assert Detokenizer(bpe, prompt_ids=incomplete).push(ids_of(bpe, "Ġthe")) == " the"


def test_skip_special_tokens(spm: Tokenizer) -> None:
    ids = ids_of(spm, "a", "</s>", "a")
    assert Detokenizer(spm).push(ids) == "aa"
    assert Detokenizer(spm, skip_special_tokens=False).push(ids) == "a</s>a"


def test_decoding_takes_constant_time_per_token(spm: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded_lengths: list[int] = []

    def decode(ids: list[int], skip_special_tokens: bool = True) -> str:
        decoded_lengths.append(len(ids))
        return Tokenizer.decode(spm, ids, skip_special_tokens)

    monkeypatch.setattr(spm, "decode", decode)
    ids = ids_of(spm, "▁the", *as_bytes("中🙂"), "▁Hello") * 50
    detokenizer = Detokenizer(spm, prompt_ids=ids)
    text = "".join(detokenizer.push([token_id]) for token_id in ids)
    assert text == " the中🙂 Hello" * 50
    assert sum(decoded_lengths) <= 3 * len(ids)
