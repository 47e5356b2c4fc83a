"""Writes checkpoints with random weights and the sizes of a known model, so that a benchmark needs no download.

Writing takes seconds. An engine runs such a checkpoint as fast as the known model.
"""

import json
import math
import string
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file

from rtp_llm.errors import ConfigError

_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1e6, "rms_norm_eps": 1e-6}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 5e5, "rms_norm_eps": 1e-5}


_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size"),
)


def _shape(family: dict[str, Any], *sizes: int) -> dict[str, Any]:
    """Returns a config.json. sizes: in the order of _SIZES."""
    return {
        **family,
        **dict(zip(_SIZES, sizes, strict=True)),
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": sizes[-1] - 3,
        "eos_token_id": sizes[-1] - 1,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _shape(_QWEN2, 896, 4864, 24, 14, 2, 64, 151936),
    "qwen2.5-1.5b": _shape(_QWEN2, 1536, 8960, 28, 12, 2, 128, 151936),
    "qwen3-0.6b": _shape(_QWEN3, 1024, 3072, 28, 16, 8, 128, 151936),
    "llama-3.2-1b": _shape(_LLAMA, 2048, 8192, 16, 32, 8, 64, 128256),
    "tiny": _shape(_QWEN2, 128, 384, 2, 4, 2, 32, 1024),
}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the last ids of the vocabulary
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def find_shape(name: str) -> dict[str, Any]:
    """Returns the content of config.json for a shape: a name such as "qwen3-0.6b" that stands for the sizes of a model.

    Raises ConfigError if the name is not one of SHAPES.
    """
    if name not in SHAPES:
        raise ConfigError(f"--shape {name}: unknown; allowed: {', '.join(SHAPES)}")
    return SHAPES[name]


def write_checkpoint(folder: Path, shape: str, seed: int = 0) -> None:
    """Creates the folder and writes a bf16 checkpoint with random weights and a tokenizer into it.

    Raises ConfigError if the shape is not one of SHAPES.
    """
    config = find_shape(shape)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_config = {
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIALS[2],
        "model_max_length": config["max_position_embeddings"],
        "pad_token": SPECIALS[0],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation_config = {key: config[key] for key in ("bos_token_id", "eos_token_id")} | {"do_sample": False}
    files = {
        "config.json": config,
        "generation_config.json": generation_config,
        "tokenizer_config.json": tokenizer_config,
        "tokenizer.json": make_tokenizer(config["vocab_size"]),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2 if name != "tokenizer.json" else None))
    source = np.random.default_rng(seed)
    weights = {name: _bf16(source, size, scale, mean) for name, size, scale, mean in tensor_shapes(config)}
    specs = {
        name: TensorSpec(dtype="bfloat16", shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes)
        for name, bits in weights.items()  # which must live until the file is written
    }
    serialize_file(specs, folder / "model.safetensors", {"format": "pt"})


def make_tokenizer(vocab_size: int) -> dict[str, Any]:
    """Returns the content of a tokenizer.json (byte-level BPE) with exactly `vocab_size` tokens: the 256 bytes, then
    made-up words, then the special tokens SPECIALS.

    Each word is a shorter word plus a letter, so the tokenizer merges letters from left to right, and every id has a
    visible text.
    """
    alphabet = _byte_characters()
    merges = list(islice(_merges(), vocab_size - len(alphabet) - len(SPECIALS)))
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    first_special = len(tokens)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": first_special + number, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for number, text in enumerate(SPECIALS)
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate([*tokens, *SPECIALS])},
            "merges": [list(pair) for pair in merges],
        },
    }


def _byte_characters() -> list[str]:
    """Returns the characters for the 256 bytes in GPT-2's byte-level BPE; printable ones represent themselves."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: 256 + number for number, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]


def _merges() -> Iterator[tuple[str, str]]:
    """Yields merges without end: a letter or the space (`Ġ`) with a letter, then each word so far with a letter."""
    words = ["Ġ", *string.ascii_lowercase]
    while True:
        longer = []
        for word in words:
            for letter in string.ascii_lowercase:
                longer.append(word + letter)
                yield word, letter
        words = longer


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Yields (name, shape, half width, mean) of each tensor of a model with this config.json. Its random values are
    uniformly distributed in mean ± half width, chosen so that activations neither vanish nor explode.
    """
    hidden, intermediate, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads, model_type = config["num_attention_heads"], config["num_key_value_heads"], config["model_type"]
    matrices = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (kv_heads * head, hidden),
        "self_attn.v_proj": (kv_heads * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden), 0.05, 0.0
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, size in matrices.items():
            yield f"{prefix}.{name}.weight", size, math.sqrt(3 / size[1]), 0.0
            if model_type == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                yield f"{prefix}.{name}.bias", size[:1], 0.1, 0.0
        yield f"{prefix}.input_layernorm.weight", (hidden,), 0.25, 1.0
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,), 0.25, 1.0
        if model_type == "qwen3":
            yield f"{prefix}.self_attn.q_norm.weight", (head,), 0.25, 1.0
            yield f"{prefix}.self_attn.k_norm.weight", (head,), 0.25, 1.0
    yield "model.norm.weight", (hidden,), 0.25, 1.0


def _bf16(source: np.random.Generator, size: tuple[int, ...], scale: float, mean: float) -> NDArray[np.uint16]:
    """Returns uniform numbers in mean ± scale as bf16, the upper half of a float32."""
    numbers = source.random(size, np.float32)
    numbers *= np.float32(2 * scale)
    numbers += np.float32(mean - scale)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)
