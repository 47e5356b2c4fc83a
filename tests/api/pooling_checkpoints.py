"""Random checkpoints with the files and names that Qwen3-Embedding and Qwen3-Reranker have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests import random_model
from tests.api.byte_model import ByteModel

QUERY_PROMPT = "Instruct: Given a question, retrieve the answer\nQuery:"
STEPS = ("Transformer", "Pooling", "Normalize")


def write_embedding(directory: Path, default_prompt: str | None = None) -> None:
    """Writes a model without an output head, as AutoModel saves it, sentence-transformers' files, and a tokenizer that
    ends each text with a special token.
    """
    random_model.write(directory)
    config = json.loads((directory / "config.json").read_text()) | {"architectures": ["Qwen3Model"]}
    _write_json(directory / "config.json", config)
    weights = load_file(directory / "model.safetensors")
    renamed = {name.removeprefix("model."): w for name, w in weights.items() if name != "lm_head.weight"}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    end = random_model.END_OF_TEXT
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    write_steps(directory)
    prompts = {"query": QUERY_PROMPT, "document": ""}
    _write_json(
        directory / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": default_prompt}
    )


def write_steps(directory: Path, steps: tuple[str, ...] = STEPS, pooling: str = "lasttoken") -> None:
    """Writes modules.json and the configuration of the pooling."""
    paths = ["" if step == "Transformer" else f"{index}_{step}" for index, step in enumerate(steps)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{step}"}
        for index, (step, path) in enumerate(zip(steps, paths, strict=True))
    ]
    _write_json(directory / "modules.json", modules)
    modes = ("cls_token", "mean_tokens", "max_tokens", "weightedmean_tokens", "lasttoken")
    (directory / "1_Pooling").mkdir(exist_ok=True)
    _write_json(
        directory / "1_Pooling/config.json",
        {f"pooling_mode_{mode}": mode == pooling for mode in modes} | {"word_embedding_dimension": random_model.HIDDEN},
    )


def write_reranker(directory: Path) -> None:
    """Writes a language model whose tokenizer has the tokens "yes" and "no"."""
    random_model.write(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    words = [word for word in ("yes", "no") if tokenizer.token_to_id(word) is None]
    tokenizer.add_tokens(words)
    tokenizer.save(str(directory / "tokenizer.json"))
    vocab_size = random_model.VOCAB + len(words)
    config = json.loads((directory / "config.json").read_text()) | {"vocab_size": vocab_size}
    _write_json(directory / "config.json", config)
    weights = load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = np.concatenate([weights[name], -weights[name][: len(words)]])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


class RerankTokens(ByteModel):
    """A model directory for a fake engine whose tokenizer has the tokens of a reranker."""

    def __init__(self, directory: Path):
        write_reranker(directory)
        self.directory = directory


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
