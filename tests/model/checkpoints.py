"""Small random checkpoints, written by transformers: one for each difference between the supported models.

transformers initialises biases to zero and norms to one, which hides a missing bias or norm. Here every parameter is
random, and large enough that logits are far from uniform and greedy output does not repeat itself.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TRAINED_LENGTH = 32  # tokens; length before rope scaling, shorter than the longest prompts
Json = dict[str, Any]
FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
# Sizes that TP sizes do not divide: 211 rows of vocabulary, 11 x 16 MLP columns, 6 query heads on 2 KV heads.
SIZES: Json = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class CheckpointCase:
    """One checkpoint: its family, its config keys besides SIZES, and changes to the saved files."""

    name: str
    family: str
    config: Json = field(default_factory=dict)
    rewrite: tuple[Callable[[Path], None], ...] = ()
    shard_size: str = "1GB"

    def __str__(self) -> str:
        return self.name


def make_model(case: CheckpointCase, seed: int) -> PreTrainedModel:
    """Returns the model in memory, from which `tests.model.oracle` computes the expected output."""
    config_class, model_class = FAMILIES[case.family]
    # A copy, because transformers adds keys to `rope_parameters` in place.
    model = model_class(config_class(**json.loads(json.dumps(SIZES | case.config)))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_parameter(name, parameter, generator))
    return model


def _random_parameter(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    # A tied embedding is also the output head: with a larger gain the model would only repeat its input.
    gain = 2.0 if any(infix in name for infix in ("embed_tokens", "lm_head", "q_proj")) else 1.5
    return gain / math.sqrt(like.shape[1]) * noise


def save_checkpoint(model: PreTrainedModel, case: CheckpointCase, directory: Path) -> None:
    model.save_pretrained(directory, max_shard_size=case.shard_size)
    for rewrite in case.rewrite:
        rewrite(directory)


def edit_config(directory: Path, edit: Callable[[Json], Json]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def rewrite_as_older_config(directory: Path) -> None:
    """Rewrites config.json to the format of transformers 4, which most checkpoints on the Hugging Face hub have."""
    edit_config(directory, _older_config)


def _older_config(config: Json) -> Json:
    rope = config.pop("rope_parameters")
    config["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind} | rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)  # early versions of transformers 4 have max_window_layers only
    return config


_INTERNLM2_NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def rewrite_as_internlm2(directory: Path) -> None:
    """Rewrites a llama checkpoint with InternLM2's tensor names and fused layout.

    transformers has no InternLM2. Its computation equals llama's, so the original llama gives the expected output.
    """
    rewrite_as_older_config(directory)
    config = json.loads((directory / "config.json").read_text())
    bias = {"bias": config.pop("attention_bias")}
    names = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    (directory / "config.json").write_text(json.dumps(config | names | bias))
    tensors = load_file(directory / "model.safetensors")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    fused = {}
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            key, value = (tensors[name.replace("q_proj", infix)] for infix in ("k_proj", "v_proj"))
            wqkv = _fuse(tensor, key, value, heads // kv_heads, kv_heads)
            fused[name.replace("self_attn.q_proj", "attention.wqkv")] = wqkv
        else:
            fused[_internlm2_name(name)] = tensor
    save_file(fused, directory / "model.safetensors", metadata={"format": "pt"})


def _fuse(query: Tensor, key: Tensor, value: Tensor, group_size: int, kv_heads: int) -> Tensor:
    """Returns wqkv: for each KV head its query heads, its key and its value."""
    dim = len(key) // kv_heads
    rows = []
    for head in range(kv_heads):
        start = head * group_size * dim
        rows += [query[start : start + group_size * dim], *(t[head * dim : (head + 1) * dim] for t in (key, value))]
    return torch.cat(rows)


def _internlm2_name(name: str) -> str:
    for llama, internlm2 in _INTERNLM2_NAMES.items():
        name = name.replace(llama, internlm2)
    return name


def _rope(kind: str, **values: Any) -> Json:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | values}


_YARN: Json = {"factor": 8.0, "original_max_position_embeddings": TRAINED_LENGTH, "beta_fast": 8.0, "beta_slow": 0.5}
_LLAMA3: Json = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED_LENGTH,
}
_DYNAMIC = _rope("dynamic", factor=2.0) | {"max_position_embeddings": TRAINED_LENGTH}
_BIAS: Json = {"attention_bias": True, "mlp_bias": True}

# The quick tests use these: each family, biases, norms of queries and keys, a window, fused tensors, two kinds of rope.
QUICK = ("llama", "rope-yarn", "mistral-window", "qwen2-14-heads", "qwen3-bias-older", "internlm2-dynamic-bias")
CASES = [
    CheckpointCase("llama", "llama"),
    # At TP 3 a rank has two query heads of one KV head and one of the next, which is padded to two.
    CheckpointCase(
        "llama-biases", "llama", _BIAS | {"num_attention_heads": 8, "num_key_value_heads": 4}, shard_size="200KB"
    ),
    CheckpointCase(
        "llama-mha-older",
        "llama",
        _rope("default", rope_theta=5e5) | {"num_key_value_heads": 6},
        (rewrite_as_older_config,),
    ),
    CheckpointCase("llama-mqa-one-layer", "llama", {"num_key_value_heads": 1, "num_hidden_layers": 1}),
    CheckpointCase("llama-tied", "llama", {"tie_word_embeddings": True}),
    CheckpointCase(
        "llama-tied-older-sharded", "llama", {"tie_word_embeddings": True}, (rewrite_as_older_config,), "100KB"
    ),
    CheckpointCase("rope-linear", "llama", _rope("linear", factor=4.0)),
    CheckpointCase("rope-linear-older", "llama", _rope("linear", factor=2.5), (rewrite_as_older_config,)),
    CheckpointCase("rope-dynamic", "llama", _DYNAMIC),
    CheckpointCase("rope-dynamic-older", "llama", _DYNAMIC, (rewrite_as_older_config,)),
    CheckpointCase("rope-llama3", "llama", _rope("llama3", **_LLAMA3)),
    CheckpointCase("rope-llama3-older", "llama", _rope("llama3", **_LLAMA3), (rewrite_as_older_config,)),
    CheckpointCase("rope-yarn", "llama", _rope("yarn", **_YARN)),
    CheckpointCase(
        "rope-yarn-older",
        "llama",
        _rope("yarn", factor=4.0, original_max_position_embeddings=64),
        (rewrite_as_older_config,),
    ),
    CheckpointCase("rope-yarn-attention-factor", "llama", _rope("yarn", **_YARN, attention_factor=0.7)),
    CheckpointCase("rope-yarn-mscale", "llama", _rope("yarn", **_YARN, mscale=2.0, mscale_all_dim=0.5)),
    CheckpointCase("rope-yarn-untruncated", "llama", _rope("yarn", **_YARN, truncate=False)),
    CheckpointCase("mistral-window", "mistral", {"sliding_window": 20}),
    CheckpointCase("mistral-head-dim", "mistral", {"sliding_window": None, "head_dim": 24}),
    CheckpointCase("mistral-window-older", "mistral", {"sliding_window": 7, "head_dim": 8}, (rewrite_as_older_config,)),
    CheckpointCase(
        "qwen2-14-heads",
        "qwen2",
        {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 112, "vocab_size": 509},
    ),
    CheckpointCase(
        "qwen2-window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    CheckpointCase(
        "qwen2-window-older",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2, "num_hidden_layers": 3},
        (rewrite_as_older_config,),
    ),
    CheckpointCase("qwen3", "qwen3", {"head_dim": 32}),
    CheckpointCase("qwen3-bias-older", "qwen3", {"head_dim": 20, "attention_bias": True}, (rewrite_as_older_config,)),
    CheckpointCase("internlm2", "llama", {}, (rewrite_as_internlm2,)),
    CheckpointCase("internlm2-dynamic-bias", "llama", _DYNAMIC | {"attention_bias": True}, (rewrite_as_internlm2,)),
]
