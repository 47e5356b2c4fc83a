"""The prompt format of a reranker, and the start of long texts."""

from functools import partial
from pathlib import Path

import pytest

from rtp_llm.errors import CheckpointError
from rtp_llm.text.rerank_format import RerankFormat
from rtp_llm.text.tokenizer import Tokenizer
from rtp_llm.text.truncation import encode_start, encode_truncated
from tests import random_model
from tests.api.byte_model import ByteModel
from tests.api.pooling_checkpoints import write_embedding


def test_a_tokenizer_without_the_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"TASK_TYPE=RERANKER.*<\|im_start\|>.*Qwen3-Reranker"):
        RerankFormat.of(ByteModel(tmp_path).tokenizer)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 100, 5000])
def test_the_start_of_a_text_has_the_tokens_of_the_whole(max_tokens: int, tmp_path: Path) -> None:
    random_model.write(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    for text in ("", "a", "the matrices 数据 " * 1000, " " * 5000, "\n" * 1000 + "ab" * 1000):
        assert encode_start(encode, text, max_tokens) == encode(text)[:max_tokens]


def test_a_cut_text_keeps_its_special_tokens(tmp_path: Path) -> None:
    """An embedding is the state of the last one."""
    write_embedding(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    whole = tokenizer.encode("the matrices " * 10)
    assert encode_truncated(tokenizer, "the matrices " * 10, 1000) == whole
    assert encode_truncated(tokenizer, "the matrices " * 10, 8) == [*whole[:7], whole[-1]]
    assert tokenizer.token_bytes(whole[-1]).decode() == random_model.END_OF_TEXT
