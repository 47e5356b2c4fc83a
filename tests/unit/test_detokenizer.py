"""The stream of text against one decode of everything, by transformers, however the ids are split."""

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
    pieces = [token for token, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("the 中 🙂")]
    backend = Backend(models.BPE(vocab={t: n for n, t in enumerate([*characters, *pieces, "Ġthe", "ðŁ"])}, merges=[]))
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
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
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
def bytes_tokenizer(tmp_path: Path) -> Tokenizer:
    return load(tmp_path, byte_level())


@pytest.fixture
def sp(tmp_path: Path) -> Tokenizer:
    return load(tmp_path, sentencepiece())


def spell(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.token_id(token) for token in tokens]
    assert None not in ids
    return [token_id for token_id in ids if token_id is not None]


def as_bytes(text: str) -> list[str]:
    return [f"<0x{value:02X}>" for value in text.encode()]


def byte_by_byte(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text` in a byte-level vocabulary, one a byte."""
    return [next(n for n in range(256) if tokenizer.token_bytes(n) == bytes([value])) for value in text.encode()]


def stream(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    pieces = [detokenizer.push(ids[start:end]) for start, end in pairwise(edges)]
    return [*pieces, detokenizer.flush()]


# One draw of ids serves every family: a draw beyond a vocabulary wraps round, its last two ids included.
IDS = st.lists(st.integers(0, 2**16), max_size=24)


@settings(max_examples=250, deadline=None)
@given(ids=IDS, prompt=IDS, cuts=st.lists(st.integers(0, 24)), skip=st.booleans())
@example(ids=[256, 258], prompt=[258], cuts=[1], skip=True)
@example(ids=[0xC3, 0xA9, 0xFF, 260], prompt=[], cuts=[1, 2, 3], skip=True)
def test_the_stream_is_the_text_of_everything_less_the_prompt(
    pair: tuple[Tokenizer, Any], ids: list[int], prompt: list[int], cuts: list[int], skip: bool
) -> None:
    tokenizer, oracle = pair
    size = tokenizer.vocab_size + 2
    ids, prompt = [n % size for n in ids], [n % size for n in prompt]
    before = oracle.decode(prompt, skip_special_tokens=skip)
    everything = oracle.decode(prompt + ids, skip_special_tokens=skip)
    text = "".join(stream(Detokenizer(tokenizer, skip, prompt), ids, cuts))
    if everything.startswith(before):
        assert text == everything[len(before) :]
    else:  # the ids have changed the prompt's last character: that one, and no other text, is given whole
        assert everything.endswith(text)
        assert len(everything) - len(text) <= len(before)


@settings(max_examples=100, deadline=None)
@given(ids=IDS, cuts=st.lists(st.integers(0, 24)))
def test_what_was_pushed_stands_whatever_follows(pair: tuple[Tokenizer, Any], ids: list[int], cuts: list[int]) -> None:
    tokenizer, _ = pair
    ids = [n % tokenizer.vocab_size for n in ids]
    for end in range(len(ids)):
        pushed = "".join(stream(Detokenizer(tokenizer), ids[:end], cuts)[:-1])
        assert tokenizer.decode(ids).startswith(pushed)


def test_a_character_is_held_until_it_is_whole(bytes_tokenizer: Tokenizer, sp: Tokenizer) -> None:
    detokenizer = Detokenizer(bytes_tokenizer)
    assert [detokenizer.push([part]) for part in byte_by_byte(bytes_tokenizer, "🙂")] == ["", "", "", "🙂"]
    detokenizer = Detokenizer(sp)
    ids = spell(sp, *as_bytes("🙂"), "a")
    assert [detokenizer.push([token_id]) for token_id in ids] == ["", "", "", "", "🙂a"]


def test_flush_gives_what_never_became_a_character(bytes_tokenizer: Tokenizer, sp: Tokenizer) -> None:
    for tokenizer, ids in (
        (bytes_tokenizer, spell(bytes_tokenizer, "Ġthe", "ðŁ")),
        (sp, spell(sp, "▁Hello", "▁the", "<0xF0>")),
    ):
        detokenizer = Detokenizer(tokenizer)
        assert detokenizer.push(ids).endswith(" the")
        assert detokenizer.flush() == "\ufffd"
        assert detokenizer.flush() == ""


def test_a_run_of_bytes_is_given_at_the_end_of_the_stream(sp: Tokenizer) -> None:
    detokenizer = Detokenizer(sp)
    assert detokenizer.push(spell(sp, *as_bytes("中"))) == ""
    assert detokenizer.flush() == "中"


def test_the_first_word_loses_its_space_only_at_the_start_of_a_text(sp: Tokenizer) -> None:
    ids = spell(sp, "▁Hello", "▁Hello")
    assert Detokenizer(sp).push(ids) == "Hello Hello"
    assert Detokenizer(sp, prompt_ids=spell(sp, "<s>")).push(ids) == "Hello Hello"
    assert Detokenizer(sp, prompt_ids=spell(sp, "<s>", "▁the", "</s>")).push(ids) == " Hello Hello"
    assert Detokenizer(sp, False, spell(sp, "<s>")).push(ids) == " Hello Hello"
    assert Detokenizer(sp, prompt_ids=spell(sp, "a", *as_bytes("🙂"))).push(ids) == " Hello Hello"


def test_a_prompts_last_character_is_not_said_again_unless_it_was_unfinished(
    bytes_tokenizer: Tokenizer, sp: Tokenizer
) -> None:
    whole = spell(sp, "a", *as_bytes("🙂"))
    assert Detokenizer(sp, prompt_ids=whole).push(spell(sp, *as_bytes("é"), "a")) == "éa"
    assert Detokenizer(sp, prompt_ids=whole[:-1]).push([whole[-1], *spell(sp, "a")]) == "🙂a"
    parts = byte_by_byte(bytes_tokenizer, "🙂")
    for half, rest in ((spell(bytes_tokenizer, "Ġthe", "ðŁ"), parts[2:]), (parts[:3], parts[3:])):
        assert Detokenizer(bytes_tokenizer, prompt_ids=half).push(rest) == "🙂"
        assert Detokenizer(bytes_tokenizer, prompt_ids=half).push(spell(bytes_tokenizer, "Ġthe")) == " the"


def test_special_tokens_are_shown_on_request(sp: Tokenizer) -> None:
    ids = spell(sp, "a", "</s>", "a")
    assert Detokenizer(sp).push(ids) == "aa"
    assert Detokenizer(sp, skip_special_tokens=False).push(ids) == "a</s>a"


def test_the_work_per_token_does_not_grow(sp: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def decode(ids: list[int], skip_special_tokens: bool = True) -> str:
        decoded.append(len(ids))
        return Tokenizer.decode(sp, ids, skip_special_tokens)

    monkeypatch.setattr(sp, "decode", decode)
    ids = spell(sp, "▁the", *as_bytes("中🙂"), "▁Hello") * 50
    detokenizer = Detokenizer(sp, prompt_ids=ids)
    text = "".join(detokenizer.push([token_id]) for token_id in ids)
    assert text == " the中🙂 Hello" * 50
    assert sum(decoded) <= 3 * len(ids)
