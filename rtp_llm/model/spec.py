"""ModelSpec: the content of a checkpoint's config.json, from which the decoder is built.
Does not import torch.

Model families differ by flags of the ModelSpec, such as `qkv_bias`. To add a family, write a function that returns its
flags, register it in FAMILIES, and add a test that compares the model with transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from rtp_llm.errors import CheckpointError, ConfigError
from rtp_llm.layers.rope_spec import RopeKind, RopeSpec

DType = Literal["fp32", "bf16", "fp16"]
# Norms of each sub-block: before it (on its input), after it (on its output, before the residual addition), or both.
NormPlacement = Literal["pre", "post", "both"]
_DTYPES: dict[str, DType] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of a decoder model: sizes (in elements) and flags."""

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
    max_positions: int  # tokens of the longest supported sequence
    dtype: DType
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each query and key head
    norm_placement: NormPlacement = "pre"
    attention: tuple[str, ...] = ()  # kind per layer, a key of `decoder.ATTENTIONS`; empty: all "gqa"
    ffn: tuple[str, ...] = ()  # kind per layer, a key of `decoder.FFNS`; empty: all "gated_mlp"
    layer_ropes: tuple[RopeSpec | None, ...] = ()  # per layer; None: no rope; empty: all `rope`
    linear_method: str = ""  # of all linear layers but the output head; "": the best for the device
    head_method: str = ""  # of the output head
    tie_embeddings: bool = False
    sliding_window: int = 0  # tokens; 0: none
    window_layers: tuple[bool, ...] = ()  # per layer, whether it uses the window

    def window(self, layer: int) -> int:
        """Returns the number of newest keys that a token attends to in this layer, including its own; 0: all."""
        return self.sliding_window if self.sliding_window and self.window_layers[layer] else 0

    def attention_kind(self, layer: int) -> str:
        """Returns which implementation of attention this layer uses, a key of `decoder.ATTENTIONS`."""
        return self.attention[layer] if self.attention else "gqa"

    def ffn_kind(self, layer: int) -> str:
        """Returns the kind of feed-forward network of this layer: a key of `decoder.FFNS`, such as "gated_mlp"."""
        return self.ffn[layer] if self.ffn else "gated_mlp"

    def layer_rope(self, layer: int) -> RopeSpec | None:
        """Returns the rotary embedding of this layer, None if it has none."""
        return self.layer_ropes[layer] if self.layer_ropes else self.rope

    def valid_tp_sizes(self) -> range:
        """Returns the supported TP sizes: from 1 to the number of query heads."""
        return range(1, self.num_heads + 1)

    def check_tp(self, tp_size: int) -> None:
        """Raises ConfigError if the model cannot be split over `tp_size` ranks."""
        if tp_size not in self.valid_tp_sizes():
            raise ConfigError(
                f"TP_SIZE={tp_size}: the model has {self.num_heads} query heads; allowed: 1 to {self.num_heads}",
                check="M-01",
            )

    def fingerprint(self, checkpoint_digest: str) -> dict[str, Any]:
        """Returns the properties of the model that must be equal on all parts of the gang: checkpoint digest, family
        and dtype, with keys such as "model.family".
        """
        values = {"checkpoint": checkpoint_digest, "family": self.family, "dtype": self.dtype}
        return {f"model.{name}": value for name, value in values.items()}


Json = dict[str, Any]
_Family = Callable[[Json], dict[str, Any]]


def _llama(config: Json) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _mistral(config: Json) -> dict[str, Any]:
    return _window_flags(config, lambda layer: True)


def _qwen2(config: Json) -> dict[str, Any]:
    first_layer = config.get("max_window_layers", 0)
    window = _window_flags(config, lambda layer: layer >= first_layer) if config.get("use_sliding_window") else {}
    return {"qkv_bias": True} | window


def _qwen3(config: Json) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return _qwen2(config) | {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}


def _internlm2(config: Json) -> dict[str, Any]:
    bias = bool(config.get("bias", False))
    return {"qkv_bias": bias, "o_bias": bias}


FAMILIES: dict[str, _Family] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen_2": _qwen2,
    "qwen_3": _qwen3,
    "internlm2": _internlm2,
}
# The quant_method of config.json's quantization_config, and the key of `kernels.linear_methods.LINEAR_METHODS` for it.
QUANTIZATION_METHODS: dict[str, str] = {}
# By QUANTIZATION, the linear methods of the layers and of the output head, which 4 bits would harm most.
QUANTIZATIONS = {"INT8": ("int8", "int8"), "W8A8": ("w8a8", "w8a8"), "INT4": ("int4", "w8a8")}
ALIASES = {"qwen_tool": "qwen_2", "qwen_agent": "qwen_2", "qwen_3_tool": "qwen_3"}
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "YiForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen_2",
    "Qwen3ForCausalLM": "qwen_3",
    "InternLM2ForCausalLM": "internlm2",
    # Without an output head, as AutoModel and sentence-transformers save embedding models.
    "LlamaModel": "llama",
    "MistralModel": "mistral",
    "Qwen2Model": "qwen_2",
    "Qwen3Model": "qwen_3",
}


def spec_from_config(
    config: Json, *, model_type: str = "", act_type: str = "", num_layers: int = 0, quantization: str = ""
) -> ModelSpec:
    """Returns the ModelSpec of a Hugging Face config.json, written by transformers 4 (`rope_theta`, `rope_scaling`,
    `torch_dtype`) or 5 (`rope_parameters`, `dtype`).

    `model_type` (MODEL_TYPE), `act_type` (ACT_TYPE) and `num_layers` (HACK_LAYER_NUM) override config.json if set.
    `quantization` (QUANTIZATION): a key of QUANTIZATIONS.
    Raises CheckpointError, which names the key, if config.json is invalid or not supported. Raises ConfigError if
    MODEL_TYPE is unknown or contradicts the architectures, or if QUANTIZATION is set for a quantized checkpoint.
    """
    family = _select_family(config, model_type)
    try:
        spec = _parse_config(config, family)
    except KeyError as error:
        raise CheckpointError(f"config.json: key {error} is missing; a {family} checkpoint needs it") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json: cannot be read as a {family} model: {error}") from None
    if act_type:
        spec = replace(spec, dtype=act_type)  # type: ignore[arg-type]  # Config has validated it
    if quantization:
        spec = _quantize(spec, quantization)
    if 0 < num_layers < spec.num_layers:
        spec = replace(spec, num_layers=num_layers)
    return spec


def _quantize(spec: ModelSpec, quantization: str) -> ModelSpec:
    if spec.linear_method:
        raise ConfigError(
            f"QUANTIZATION={quantization}: the checkpoint is quantized already ({spec.linear_method}); allowed: leave"
            " it unset",
            check="M-14",
        )
    linear_method, head_method = QUANTIZATIONS[quantization]
    return replace(spec, linear_method=linear_method, head_method=head_method)


def _select_family(config: Json, model_type: str) -> str:
    architectures = config.get("architectures") or []
    detected = next((ARCHITECTURES[a] for a in architectures if a in ARCHITECTURES), "")
    if model_type:
        family = ALIASES.get(model_type, model_type)
        if family not in FAMILIES:
            names = ", ".join(sorted([*FAMILIES, *ALIASES]))
            raise ConfigError(
                f"MODEL_TYPE={model_type!r}: is not a supported model type; allowed: {names}", check="M-14"
            )
        if detected and detected != family and {detected, family} != {"llama", "mistral"}:
            raise ConfigError(
                f"MODEL_TYPE={model_type!r}: config.json says architectures={architectures}, which is {detected};"
                f" allowed: {detected}, or leave MODEL_TYPE unset",
                check="M-14",
            )
        return family
    if not detected:
        raise CheckpointError(
            f"config.json: architectures={architectures} is not supported; allowed: {', '.join(ARCHITECTURES)}"
        )
    return detected


def _parse_config(config: Json, family: str) -> ModelSpec:
    quantization = config.get("quantization_config")
    if quantization and quantization.get("quant_method") not in QUANTIZATION_METHODS:
        method = quantization.get("quant_method", "?")
        raise CheckpointError(
            f"config.json: quantization_config says {method!r}; quantized checkpoints are not supported yet;"
            " allowed: a checkpoint without quantization_config"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act={config['hidden_act']!r}; allowed: silu")
    num_heads = _read_size(config, "num_attention_heads")
    hidden_size = _read_size(config, "hidden_size")
    max_positions = _read_size(config, "max_position_embeddings")
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    return ModelSpec(
        family=family,
        vocab_size=_read_size(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=_read_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(config.get("head_dim") or hidden_size // num_heads),
        intermediate_size=_read_size(config, "intermediate_size"),
        norm_eps=float(config["rms_norm_eps"]),
        rope=_read_rope(config, max_positions),
        max_positions=_read_max_positions(config, max_positions),
        dtype=_read_dtype(config),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        linear_method=QUANTIZATION_METHODS[quantization["quant_method"]] if quantization else "",
        **FAMILIES[family](config),
    )


def _read_size(config: Json, key: str) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key}={value!r}; allowed: an integer of 1 or more")
    return value


def _window_flags(config: Json, has_window: Callable[[int], bool]) -> dict[str, Any]:
    """Returns the sliding-window fields of ModelSpec.

    `has_window`: returns whether a layer uses the window; called only if config.json has no layer_types.
    """
    window, num_layers = config.get("sliding_window"), config["num_hidden_layers"]
    if not window:
        return {}
    layer_types = config.get("layer_types")
    flags = (
        tuple(t == "sliding_attention" for t in layer_types)
        if layer_types
        else tuple(has_window(layer) for layer in range(num_layers))
    )
    return {"sliding_window": int(window), "window_layers": flags}


def _read_dtype(config: Json) -> DType:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in _DTYPES:
        raise CheckpointError(f"config.json: dtype={name!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _rope_settings(config: Json) -> Json:
    """Returns the rope settings of a transformers 4 or 5 config.json as one object."""
    parameters = config.get("rope_parameters")
    if parameters:
        return dict(parameters)
    return {"rope_theta": config.get("rope_theta", 10000.0)} | (config.get("rope_scaling") or {})


def _read_rope(config: Json, max_positions: int) -> RopeSpec:
    settings = _rope_settings(config)
    kind = _read_rope_kind(settings)
    original = settings.get("original_max_position_embeddings") if kind in ("llama3", "yarn") else None
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind != "default" and settings.get("factor") is None:
        raise CheckpointError(f"config.json: rope type {kind!r} needs the key 'factor', a number")
    scaling = {k: v for k, v in settings.items() if k in _ROPE_FIELDS and v is not None}
    return RopeSpec(theta, kind, original_max=int(original or max_positions), **scaling)


_ROPE_FIELDS = set(RopeSpec.__dataclass_fields__) - {"theta", "kind", "original_max"}


def _read_rope_kind(settings: Json) -> RopeKind:
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in get_args(RopeKind):
        raise CheckpointError(f"config.json: rope type {kind!r}; allowed: {', '.join(get_args(RopeKind))}")
    return cast(RopeKind, kind)


def _read_max_positions(config: Json, max_positions: int) -> int:
    """Returns the longest sequence that the checkpoint supports, in tokens.

    Rope types linear and dynamic: max_position_embeddings times the scaling factor. llama3: max_position_embeddings,
    which is the scaled length already. yarn: as llama3 if original_max_position_embeddings is set and differs from
    max_position_embeddings, else as linear.
    """
    settings = _rope_settings(config)
    kind = _read_rope_kind(settings)
    original = settings.get("original_max_position_embeddings")
    if kind in ("linear", "dynamic") or (kind == "yarn" and original in (None, max_positions)):
        return int(max_positions * float(settings.get("factor", 1.0)))
    return max_positions
