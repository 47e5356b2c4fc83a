"""ModelSpec: a checkpoint's config.json turned into the data that one decoder is built from. Imports no torch.

Families differ by flags here, not by copied files. To add one: a function in FAMILIES, and a test against transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from rtp_llm.errors import CheckpointError, ConfigError
from rtp_llm.layers.rope_spec import RopeKind, RopeSpec

DType = Literal["fp32", "bf16", "fp16"]
_DTYPES: dict[str, DType] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: sizes in elements, biases and norms as flags."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: RopeSpec
    max_positions: int
    dtype: DType
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    fused_qkv: bool = False  # internlm2's wqkv and tensor names
    sliding_window: int = 0  # 0: none
    window_layers: tuple[bool, ...] = ()  # which layers it holds for

    def window(self, layer: int) -> int:
        """Keys that layer `layer` sees, its own token included; 0: all."""
        return self.sliding_window if self.sliding_window and self.window_layers[layer] else 0

    def valid_tp_sizes(self) -> range:
        """TP sizes this model can be split into: query heads, MLP and vocabulary pad, KV heads replicate."""
        return range(1, self.num_heads + 1)

    def check_tp(self, tp_size: int) -> None:
        """Raises ConfigError with the sizes that fit."""
        if tp_size not in self.valid_tp_sizes():
            raise ConfigError(
                f"TP_SIZE={tp_size}: the model has {self.num_heads} query heads; allowed: 1 to {self.num_heads}",
                check="M-01",
            )


Json = dict[str, Any]
_Family = Callable[[Json], dict[str, Any]]


def _llama(config: Json) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _mistral(config: Json) -> dict[str, Any]:
    return _window(config, lambda layer: True)


def _qwen2(config: Json) -> dict[str, Any]:
    first = config.get("max_window_layers", 0)
    window = _window(config, lambda layer: layer >= first) if config.get("use_sliding_window") else {}
    return {"qkv_bias": True} | window


def _qwen3(config: Json) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return _qwen2(config) | {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}


def _internlm2(config: Json) -> dict[str, Any]:
    bias = bool(config.get("bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "fused_qkv": True}


FAMILIES: dict[str, _Family] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen_2": _qwen2,
    "qwen_3": _qwen3,
    "internlm2": _internlm2,
}
ALIASES = {"qwen_tool": "qwen_2", "qwen_agent": "qwen_2", "qwen_3_tool": "qwen_3"}
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "YiForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen_2",
    "Qwen3ForCausalLM": "qwen_3",
    "InternLM2ForCausalLM": "internlm2",
}


def spec_from_config(config: Json, *, model_type: str = "", act_type: str = "", num_layers: int = 0) -> ModelSpec:
    """Reads a Hugging Face config.json of either generation (`rope_theta`/`rope_scaling`/`torch_dtype`,
    `rope_parameters`/`dtype`).

    `model_type` (MODEL_TYPE), `act_type` (ACT_TYPE) and `num_layers` (HACK_LAYER_NUM) override where set.
    Raises CheckpointError naming the key, ConfigError for a MODEL_TYPE that is not known or does not fit.
    """
    family = _family(config, model_type)
    try:
        spec = _read(config, family)
    except KeyError as error:
        raise CheckpointError(f"config.json: key {error} is missing; a {family} checkpoint needs it") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json: cannot be read as a {family} model: {error}") from None
    if act_type:
        spec = replace(spec, dtype=act_type)  # type: ignore[arg-type]  # Config allows just these
    if 0 < num_layers < spec.num_layers:
        spec = replace(spec, num_layers=num_layers)
    return spec


def _family(config: Json, model_type: str) -> str:
    architectures = config.get("architectures") or []
    found = next((ARCHITECTURES[a] for a in architectures if a in ARCHITECTURES), "")
    if model_type:
        asked = ALIASES.get(model_type, model_type)
        if asked not in FAMILIES:
            known = ", ".join(sorted([*FAMILIES, *ALIASES]))
            raise ConfigError(
                f"MODEL_TYPE={model_type!r}: not a model type this server knows; allowed: {known}", check="M-14"
            )
        if found and found != asked and {found, asked} != {"llama", "mistral"}:
            raise ConfigError(
                f"MODEL_TYPE={model_type!r}: config.json says architectures={architectures}, which is {found};"
                f" allowed: {found}, or leave MODEL_TYPE unset",
                check="M-14",
            )
        return asked
    if not found:
        raise CheckpointError(
            f"config.json: architectures={architectures} is none this server knows; allowed: {', '.join(ARCHITECTURES)}"
        )
    return found


def _read(config: Json, family: str) -> ModelSpec:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "?")
        raise CheckpointError(
            f"config.json: quantization_config says {method!r}; quantized checkpoints are not supported yet"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act={config['hidden_act']!r}; supported: silu")
    heads = _count(config, "num_attention_heads")
    hidden = _count(config, "hidden_size")
    positions = _count(config, "max_position_embeddings")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    return ModelSpec(
        family=family,
        vocab_size=_count(config, "vocab_size"),
        hidden_size=hidden,
        num_layers=_count(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate_size=_count(config, "intermediate_size"),
        norm_eps=float(config["rms_norm_eps"]),
        rope=_rope(config, positions),
        max_positions=_max_positions(config, positions),
        dtype=_dtype(config),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        **FAMILIES[family](config),
    )


def _count(config: Json, key: str) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key}={value!r}; allowed: an integer of 1 or more")
    return value


def _window(config: Json, holds: Callable[[int], bool]) -> dict[str, Any]:
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    if not window:
        return {}
    kinds = config.get("layer_types")
    flags = tuple(k == "sliding_attention" for k in kinds) if kinds else tuple(holds(i) for i in range(layers))
    return {"sliding_window": int(window), "window_layers": flags}


def _dtype(config: Json) -> DType:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in _DTYPES:
        raise CheckpointError(f"config.json: dtype={name!r}; supported: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _scaling(config: Json) -> Json:
    """The rope settings of either generation as one object."""
    parameters = config.get("rope_parameters")
    if parameters:
        return dict(parameters)
    return {"rope_theta": config.get("rope_theta", 10000.0)} | (config.get("rope_scaling") or {})


def _rope(config: Json, positions: int) -> RopeSpec:
    raw = _scaling(config)
    kind = _rope_kind(raw)
    original = raw.get("original_max_position_embeddings") if kind in ("llama3", "yarn") else None
    theta = float(raw.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind != "default" and raw.get("factor") is None:
        raise KeyError(f"factor of rope type {kind}")
    known = {k: v for k, v in raw.items() if k in _ROPE_FIELDS and v is not None}
    return RopeSpec(theta, kind, original_max=int(original or positions), **known)


_ROPE_FIELDS = set(RopeSpec.__dataclass_fields__) - {"theta", "kind", "original_max"}


def _rope_kind(raw: Json) -> RopeKind:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    for known in get_args(RopeKind):
        if kind == known:
            return cast(RopeKind, known)
    raise CheckpointError(f"config.json: rope type {kind!r}; supported: {', '.join(get_args(RopeKind))}")


def _max_positions(config: Json, positions: int) -> int:
    """Longest sequence the checkpoint is meant for, in tokens. linear and dynamic scaling stretch the trained length
    by their factor; yarn and llama3 checkpoints state the stretched length themselves."""
    raw = _scaling(config)
    kind = _rope_kind(raw)
    original = raw.get("original_max_position_embeddings")
    if kind in ("linear", "dynamic") or (kind == "yarn" and original in (None, positions)):
        return int(positions * float(raw.get("factor", 1.0)))
    return positions
