"""The settings that may name a model on a hub: CHECKPOINT_PATH and TOKENIZER_PATH.

Imports huggingface_hub only if one of them names a model, since that import takes longer than the rest of the doctor.
"""

from pathlib import Path

from rtp_llm.config import Config
from rtp_llm.hub.name import ModelName


def model_names(config: Config) -> list[ModelName]:
    """Returns the models that CHECKPOINT_PATH and TOKENIZER_PATH name, without duplicates."""
    names = map(ModelName.parse, (config.checkpoint_path, config.tokenizer_path))
    return list(dict.fromkeys(name for name in names if name))


def missing_models(config: Config) -> list[ModelName]:
    """Returns the models that CHECKPOINT_PATH and TOKENIZER_PATH name and that are not complete in the cache."""
    return [name for name in model_names(config) if not _snapshot(name)]


def localized(config: Config) -> Config:
    """Returns the settings with the path of the model's cache folder in place of its name, in CHECKPOINT_PATH and
    TOKENIZER_PATH. Leaves a name as it is if the model is not complete in the cache.
    """
    changes = {}
    for field in ("checkpoint_path", "tokenizer_path"):
        name = ModelName.parse(getattr(config, field))
        if name and (snapshot := _snapshot(name)):
            changes[field] = str(snapshot)
    return config.model_copy(update=changes) if changes else config


def _snapshot(name: ModelName) -> Path | None:
    from rtp_llm.hub.cache import cached_snapshot

    return cached_snapshot(name)
