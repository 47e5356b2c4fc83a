"""The sampling defaults of generation_config.json."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from rtp_llm.api.sampling_defaults import FILE_NAME, SamplingDefaults
from rtp_llm.config import Config
from rtp_llm.errors import ConfigError


def defaults(folder: Path, content: Any = None, **settings: Any) -> SamplingDefaults:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / FILE_NAME).write_text(text)
    return SamplingDefaults.from_config(Config(checkpoint_path=str(folder), **settings))


NOTHING = SamplingDefaults.model_validate({})


def test_what_transformers_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, eos_token_id=[1, 2]
    ).save_pretrained(tmp_path)
    expected = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    assert defaults(tmp_path).model_dump(exclude_none=True) == expected
    assert any("'temperature': 0.6" in r.getMessage() and FILE_NAME in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    ("content", "temperature"),
    [
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.6}, 0.0),
        ({"temperature": 0.6}, 0.6),
        ({"do_sample": None, "temperature": 0.6}, 0.6),
        ({"do_sample": True}, None),
        ({}, None),
    ],
)
def test_the_default_temperature(content: dict[str, Any], temperature: float | None, tmp_path: Path) -> None:
    """do_sample counts only where it is false in so many words, although transformers takes it for false if absent."""
    assert defaults(tmp_path, content).default_temperature == temperature


def test_which_file_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert defaults(tmp_path) == NOTHING
    assert not caplog.records, "there is no file"
    assert defaults(tmp_path, {"top_k": 3}, generation_config="none") == NOTHING
    other = tmp_path / "other"
    other.mkdir()
    (other / FILE_NAME).write_text('{"top_k": 7}')
    for path in (other, other / FILE_NAME):
        assert defaults(tmp_path, generation_config_path=str(path)).top_k == 7
    assert defaults(tmp_path, generation_config_path=str(other), generation_config="none") == NOTHING


@pytest.mark.parametrize(
    ("content", "substring"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "dictionary"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": "high"}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ('{"top_p": NaN}', "top_p"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_invalid_file(content: Any, substring: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GENERATION_CONFIG=none") as caught:
        defaults(tmp_path, content)
    assert substring in str(caught.value)
    assert str(tmp_path / FILE_NAME) in str(caught.value)


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        defaults(tmp_path, generation_config_path=str(tmp_path / "missing.json"))
