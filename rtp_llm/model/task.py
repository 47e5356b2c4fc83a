"""The task that a checkpoint is served for, and the sentence-transformers files that define its embeddings. No torch.

sentence-transformers (sbert.net) lists the decoder and the modules after it in modules.json.
config_sentence_transformers.json has named prompts, texts that are put before the client's text.
"""

import json
from pathlib import Path
from typing import Any

from rtp_llm import files
from rtp_llm.config import Config, TaskType
from rtp_llm.errors import CheckpointError
from rtp_llm.parallel.part_spec import EmbeddingInfo

_STEPS = ("Transformer", "Pooling", "Normalize")


def task_type(config: Config) -> TaskType:
    """Returns the setting TASK_TYPE. If it is unset, returns DENSE_EMBEDDING if EMBEDDING_MODEL is on or the checkpoint
    has sentence-transformers' modules.json, else LANGUAGE_MODEL.
    """
    is_embedding = config.embedding_model or (Path(config.checkpoint_path) / "modules.json").exists()
    return config.task_type or ("DENSE_EMBEDDING" if is_embedding else "LANGUAGE_MODEL")


def embedding_info(path: Path, hidden_size: int) -> EmbeddingInfo:
    """Returns how the checkpoint in the directory `path` turns texts into embeddings. Without modules.json, uses the
    normalized hidden state of the last token, as Qwen3-Embedding does.

    Raises CheckpointError, which names the file, if a file of sentence-transformers is invalid or requires an
    unsupported module or pooling.
    """
    steps = _read(path / "modules.json", list)
    names = [str(step.get("type", "")).rpartition(".")[2] for step in steps or [] if isinstance(step, dict)]
    other = next((name for name in names if name not in _STEPS), None)
    if other is not None:
        raise CheckpointError(
            f"{path / 'modules.json'}: the module {other!r} is not supported; allowed: {', '.join(_STEPS)}; if"
            " this is not an embedding model, set TASK_TYPE=LANGUAGE_MODEL or RERANKER"
        )
    for step in (step for step, name in zip(steps or [], names, strict=True) if name == "Pooling"):
        _check_pooling(path / str(step.get("path", "")) / "config.json")
    config = _read(path / "config_sentence_transformers.json", dict) or {}
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(
            f"{path / 'config_sentence_transformers.json'}: prompts must be a JSON object whose values are texts"
        )
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(
            f"{path / 'config_sentence_transformers.json'}: default_prompt_name={default!r} is not in prompts"
        )
    return EmbeddingInfo(hidden_size, not names or "Normalize" in names, prompts, default or "")


def _check_pooling(path: Path) -> None:
    """Raises CheckpointError unless the pooling takes the last token's hidden state and includes the prompt."""
    config = _read(path, dict) or {}
    modes = sorted(name for name, value in config.items() if name.startswith("pooling_mode_") and value is True)
    mode = config.get("pooling_mode")  # the newer spelling
    modes += [f"pooling_mode={mode}"] if isinstance(mode, str) and mode != "lasttoken" else []
    if not set(modes) <= {"pooling_mode_lasttoken"}:
        raise CheckpointError(f"{path}: {', '.join(modes)}: not supported; allowed: pooling_mode_lasttoken")


def _read(path: Path, kind: type) -> Any:
    """Returns the JSON value in a file; None if there is no such file. Raises CheckpointError."""
    if not path.exists():
        return None
    try:
        value = json.loads(files.read(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: malformed JSON: {error}") from None
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: must hold a JSON {'array' if kind is list else 'object'}")
    return value
