"""What a checkpoint is served for: TASK_TYPE, and sentence-transformers' files."""

import json
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.config import Config, load
from rtp_llm.errors import CheckpointError, ConfigError
from rtp_llm.model.checkpoint import Checkpoint
from rtp_llm.model.task import embedding_info, task_type
from rtp_llm.parallel.part_spec import EmbeddingInfo
from tests import random_model
from tests.api.pooling_checkpoints import QUERY_PROMPT, write_embedding, write_steps


@pytest.mark.parametrize(
    ("settings", "has_modules", "task"),
    [
        ({}, False, "LANGUAGE_MODEL"),
        ({}, True, "DENSE_EMBEDDING"),
        ({"embedding_model": True}, False, "DENSE_EMBEDDING"),
        ({"task_type": "LANGUAGE_MODEL"}, True, "LANGUAGE_MODEL"),
        ({"task_type": "RERANKER"}, True, "RERANKER"),
    ],
)
def test_task(settings: dict[str, Any], has_modules: bool, task: str, tmp_path: Path) -> None:
    if has_modules:
        write_steps(tmp_path)
    assert task_type(Config(checkpoint_path=str(tmp_path), **settings)) == task


def test_other_tasks_of_upstream_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match="LANGUAGE_MODEL, DENSE_EMBEDDING, RERANKER"):
        load([], {"TASK_TYPE": "SPARSE_EMBEDDING"})


def test_sentence_transformers_files(tmp_path: Path) -> None:
    write_embedding(tmp_path, default_prompt="query")
    prompts = {"query": QUERY_PROMPT, "document": ""}
    assert embedding_info(tmp_path, 8) == EmbeddingInfo(8, True, prompts, "query")
    write_steps(tmp_path, ("Transformer", "Pooling"))
    assert not embedding_info(tmp_path, 8).normalize


def test_without_files_as_qwen3_embedding(tmp_path: Path) -> None:
    assert embedding_info(tmp_path, 8) == EmbeddingInfo(8, normalize=True)


@pytest.mark.parametrize(
    ("steps", "pooling", "words"),
    [
        (("Transformer", "Pooling", "Dense"), "lasttoken", ("modules.json", "'Dense'", "Normalize")),
        (
            ("Transformer", "Pooling"),
            "mean_tokens",
            ("1_Pooling", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"),
        ),
        (("Transformer", "Pooling"), "cls_token", ("pooling_mode_cls_token",)),
    ],
)
def test_other_steps_are_refused(steps: tuple[str, ...], pooling: str, words: list[str], tmp_path: Path) -> None:
    """A server that pools in another way would give wrong embeddings in silence."""
    write_steps(tmp_path, steps, pooling)
    with pytest.raises(CheckpointError) as error:
        embedding_info(tmp_path, 8)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("modules.json", "{", ("malformed",)),
        ("modules.json", "{}", ("array",)),
        ("config_sentence_transformers.json", "[]", ("object",)),
        ("config_sentence_transformers.json", '{"prompts": {"a": 1}}', ("texts",)),
        ("config_sentence_transformers.json", json.dumps({"default_prompt_name": "x"}), ("'x'", "prompts")),
    ],
)
def test_damaged_files_are_named(file: str, content: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError) as error:
        embedding_info(tmp_path, 8)
    assert all(word in str(error.value) for word in (file, *words))


def test_embeddings_need_no_output_head(tmp_path: Path) -> None:
    """So the memory of an untied one is not counted, let alone read."""
    random_model.write(tmp_path)
    for task, is_tied in (("DENSE_EMBEDDING", True), ("RERANKER", False), ("LANGUAGE_MODEL", False)):
        config = load([], {"TASK_TYPE": task, "CHECKPOINT_PATH": str(tmp_path)}).config
        assert Checkpoint.open(config).spec(config).tie_embeddings == is_tied
