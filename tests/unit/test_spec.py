"""Parsing of config.json: the formats of transformers 4 and 5 give the same ModelSpec; errors name key and value."""

import json
from typing import Any

import pytest

from rtp_llm.errors import CheckpointError, ConfigError
from rtp_llm.model.spec import ALIASES, ARCHITECTURES, FAMILIES, ModelSpec, spec_from_config

Json = dict[str, Any]
# In the format of transformers 4, which most checkpoints on the Hugging Face hub have.
LLAMA: Json = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN2: Json = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_size": 896,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 24,
}
LLAMA3_ROPE: Json = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_spec(config: Json, **overrides: Any) -> ModelSpec:
    original = json.dumps(config)
    spec = spec_from_config(config, **overrides)
    assert json.dumps(config) == original, "the caller's config was changed"
    return spec


def read_error(config: Json, error: type[Exception] = CheckpointError, **overrides: Any) -> str:
    with pytest.raises(error) as error_info:
        spec_from_config(config, **overrides)
    return str(error_info.value)


def without(config: Json, *keys: str) -> Json:
    return {key: value for key, value in config.items() if key not in keys}


def test_llama() -> None:
    spec = read_spec(LLAMA)
    assert (spec.family, spec.vocab_size, spec.hidden_size, spec.num_layers) == ("llama", 128256, 4096, 32)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.intermediate_size) == (32, 8, 128, 14336)
    assert (spec.norm_eps, spec.max_positions, spec.dtype) == (1e-5, 8192, "bf16")
    assert (spec.rope.kind, spec.rope.theta) == ("default", 500000.0)
    assert not any((spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.qk_norm, spec.tie_embeddings))
    assert [spec.window(layer) for layer in range(32)] == [0] * 32


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (LLAMA | {"attention_bias": True}, {"qkv_bias", "o_bias"}),
        (LLAMA | {"mlp_bias": True}, {"mlp_bias"}),
        (LLAMA | {"tie_word_embeddings": True}, {"tie_embeddings"}),
        (LLAMA | {"architectures": ["MistralForCausalLM"]}, set()),
        (QWEN2, {"qkv_bias"}),
        (QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128}, {"qk_norm"}),
        (QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, {"qk_norm", "qkv_bias", "o_bias"}),
        (LLAMA | {"architectures": ["InternLM2ForCausalLM"], "bias": False}, set()),
        (LLAMA | {"architectures": ["InternLM2ForCausalLM"], "bias": True}, {"qkv_bias", "o_bias"}),
    ],
)
def test_families_are_flags(config: Json, flags: set[str]) -> None:
    spec = read_spec(config)
    names = ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tie_embeddings")
    assert {name for name in names if getattr(spec, name)} == flags


def test_every_architecture_has_its_family() -> None:
    for architecture, family in ARCHITECTURES.items():
        assert read_spec(LLAMA | {"architectures": [architecture]}).family == family
    assert set(ARCHITECTURES.values()) == set(FAMILIES)
    assert set(ALIASES.values()) <= set(FAMILIES)


def as_transformers5(config: Json) -> Json:
    """Returns the config in the format of transformers 5."""
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", "default")
    rope = {"rope_theta": config["rope_theta"], "rope_type": kind} | scaling
    rest = without(config, "rope_theta", "rope_scaling", "torch_dtype")
    return rest | {"rope_parameters": rope, "dtype": config["torch_dtype"]}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3"} | LLAMA3_ROPE,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 2048,
            "attention_factor": 0.5,
            "beta_slow": 2,
        },
        {"type": "yarn", "factor": 40, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16, "truncate": False},
    ],
)
def test_both_formats_give_the_same_spec(scaling: Json | None) -> None:
    older = LLAMA | {"rope_scaling": scaling}
    assert read_spec(older) == read_spec(as_transformers5(older))
    for key, value in (scaling or {}).items():
        if key in ("factor", "attention_factor", "beta_slow", "beta_fast", "mscale", "mscale_all_dim", "truncate"):
            assert getattr(read_spec(older).rope, key) == value


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 8192),
        ({"type": "linear", "factor": 4.0}, 32768),
        ({"type": "dynamic", "factor": 2.0}, 16384),
        ({"rope_type": "llama3"} | LLAMA3_ROPE, 8192),  # max_position_embeddings is the scaled length
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
            8192,
        ),  # max_position_embeddings is the scaled length
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
            32768,
        ),  # Qwen: it is the trained length
        ({"type": "yarn", "factor": 4.0}, 32768),  # the trained length defaults to max_position_embeddings
    ],
)
def test_longest_sequence(scaling: Json | None, length: int) -> None:
    assert read_spec(LLAMA | {"rope_scaling": scaling}).max_positions == length


def test_trained_length_of_the_rope() -> None:
    def original(scaling: Json) -> int:
        return read_spec(LLAMA | {"rope_scaling": scaling}).rope.original_max

    assert original({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}) == 2048
    assert original({"type": "yarn", "factor": 4.0}) == 8192
    # As in transformers, dynamic scaling uses only max_position_embeddings.
    assert original({"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048}) == 8192


@pytest.mark.parametrize("key", sorted(LLAMA.keys() - {"model_type", "hidden_act", "tie_word_embeddings"}))
def test_missing_key(key: str) -> None:
    config = without(LLAMA, key)
    defaults = {"rope_theta": 10000.0, "num_key_value_heads": 32, "torch_dtype": "bf16"}
    if key == "rope_theta":
        assert read_spec(config).rope.theta == defaults[key]
    elif key == "num_key_value_heads":
        assert read_spec(config).num_kv_heads == defaults[key]
    elif key == "torch_dtype":
        assert read_spec(config).dtype == defaults[key]
    else:
        assert key in read_error(config)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("value", [0, -1, "32", 1.5, None, True, [32]])
def test_invalid_size(key: str, value: object) -> None:
    message = read_error(LLAMA | {key: value})
    assert key in message
    assert "an integer of 1 or more" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_key_value_heads": 5}, ["num_attention_heads=32", "num_key_value_heads=5"]),
        ({"num_key_value_heads": "x"}, ["config.json"]),
        ({"rms_norm_eps": "small"}, ["config.json"]),
        ({"rms_norm_eps": None}, ["config.json"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"torch_dtype": "int8"}, ["int8", "float32, bfloat16, float16"]),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["longrope", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor", "linear"]),
        ({"rope_scaling": {"type": "linear", "factor": "much"}}, ["config.json"]),
        ({"rope_scaling": [1, 2]}, ["config.json"]),
        ({"rope_scaling": "yarn"}, ["config.json"]),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            ["quantization_config", "'gptq'", "not supported"],
        ),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": []}, ["architectures", "LlamaForCausalLM"]),
        ({"architectures": None}, ["architectures", "LlamaForCausalLM"]),
    ],
)
def test_unsupported_config(change: Json, expected: list[str]) -> None:
    message = read_error(LLAMA | change)
    assert message.startswith("config.json: ")
    assert [text for text in expected if text not in message] == []


# MODEL_TYPE


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_aliases(alias: str) -> None:
    family = ALIASES[alias]
    architecture = next(a for a, f in ARCHITECTURES.items() if f == family)
    config = QWEN2 | {"architectures": [architecture]}
    assert read_spec(config, model_type=alias) == read_spec(config, model_type=family) == read_spec(config)


def test_model_type_replaces_a_missing_architecture() -> None:
    assert read_spec(without(LLAMA, "architectures"), model_type="llama") == read_spec(LLAMA)
    assert read_spec(LLAMA | {"architectures": ["MyOwnLlama"]}, model_type="llama") == read_spec(LLAMA)
    # Mistral is llama with a sliding window; checkpoints name either.
    assert read_spec(LLAMA, model_type="mistral").family == "mistral"


def test_model_type_that_contradicts_the_architecture() -> None:
    message = read_error(LLAMA, ConfigError, model_type="qwen_2")
    assert "MODEL_TYPE='qwen_2'" in message
    assert "LlamaForCausalLM" in message
    assert "leave MODEL_TYPE unset" in message


def test_unknown_model_type() -> None:
    message = read_error(LLAMA, ConfigError, model_type="gpt_5")
    assert "MODEL_TYPE='gpt_5'" in message
    assert all(name in message for name in (*FAMILIES, *ALIASES))


# ACT_TYPE, HACK_LAYER_NUM


@pytest.mark.parametrize("act_type", ["fp32", "bf16", "fp16"])
def test_act_type_overrides_the_checkpoint(act_type: str) -> None:
    assert read_spec(LLAMA, act_type=act_type).dtype == act_type


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16"), ("torch.float16", "fp16")],
)
def test_dtype_of_the_checkpoint(name: str, dtype: str) -> None:
    assert read_spec(LLAMA | {"torch_dtype": name}).dtype == dtype
    assert read_spec(without(LLAMA, "torch_dtype") | {"dtype": name}).dtype == dtype


@pytest.mark.parametrize(("num_layers", "expected"), [(0, 32), (1, 1), (31, 31), (32, 32), (99, 32)])
def test_number_of_layers(num_layers: int, expected: int) -> None:
    assert read_spec(LLAMA, num_layers=num_layers).num_layers == expected


# Windows and heads

WINDOW: Json = {"sliding_window": 128, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LLAMA | WINDOW, [0, 0, 0, 0]),  # llama ignores the window
        (LLAMA | WINDOW | {"architectures": ["MistralForCausalLM"]}, [128] * 4),
        (LLAMA | WINDOW | {"architectures": ["MistralForCausalLM"], "sliding_window": None}, [0] * 4),
        (QWEN2 | WINDOW, [0] * 4),
        (QWEN2 | WINDOW | {"use_sliding_window": True, "max_window_layers": 2}, [0, 0, 128, 128]),
        (QWEN2 | WINDOW | {"use_sliding_window": True, "max_window_layers": 0}, [128] * 4),
        (QWEN2 | WINDOW | {"use_sliding_window": True, "max_window_layers": 4}, [0] * 4),
        (
            QWEN2 | WINDOW | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
            [128, 0, 128, 0],
        ),
    ],
)
def test_windows(config: Json, windows: list[int]) -> None:
    spec = read_spec(config)
    assert [spec.window(layer) for layer in range(4)] == windows


def test_head_dim() -> None:
    assert read_spec(QWEN2).head_dim == 64
    assert read_spec(QWEN2 | {"head_dim": 128}).head_dim == 128
    assert read_spec(QWEN2 | {"head_dim": None}).head_dim == 64


def test_valid_tp_sizes() -> None:
    spec = read_spec(QWEN2)
    assert spec.valid_tp_sizes() == range(1, 15)
    spec.check_tp(14)
    with pytest.raises(ConfigError, match="TP_SIZE=15: the model has 14 query heads; allowed: 1 to 14"):
        spec.check_tp(15)
