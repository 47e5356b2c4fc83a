"""`python -m rtp_llm.bench.peers.gguf_file CHECKPOINT FILE TYPE`: converts a checkpoint of the families Qwen2, Qwen3
and Llama to a GGUF file, for engines that cannot read safetensors. TYPE: f16, q8_0 or q4_0. Needs the package `gguf`.

Only for checkpoints with a byte-level BPE tokenizer. Permutes Llama's query and key weights for llama.cpp, whose rotary
embedding pairs adjacent elements; that of transformers pairs the two halves of a head.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("f16", "q8_0", "q4_0")}
_FILE_TYPES = {name: gguf.LlamaFileType[f"MOSTLY_{name.upper()}"] for name in _TYPES}


def convert(checkpoint: Path, file: Path, type_name: str) -> None:
    """Writes the GGUF file: matrices in the type `type_name`, vectors in float32."""
    config = json.loads((checkpoint / "config.json").read_text())
    family = config["model_type"]
    writer = gguf.GGUFWriter(file, family)
    _write_sizes(writer, config)
    writer.add_file_type(_FILE_TYPES[type_name])
    _write_tokenizer(writer, checkpoint, config)
    for name, weight in _read_tensors(checkpoint):
        if family == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        if weight.ndim == 1:
            writer.add_tensor(_gguf_name(name), weight)
        else:
            quantized = gguf.quants.quantize(weight, _TYPES[type_name])
            writer.add_tensor(_gguf_name(name), quantized, raw_dtype=_TYPES[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _write_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    model = tokenizer["model"]
    tokens = [f"[unused{number}]" for number in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for token in tokenizer["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _read_tensors(checkpoint: Path) -> list[tuple[str, NDArray[np.float32]]]:
    """Returns the tensors as float32. The peers' Python may lack safetensors: a header and raw bytes."""
    tensors = []
    for file in sorted(checkpoint.glob("*.safetensors")):
        raw = np.memmap(file, np.uint8, "r")
        header_size = int(raw[:8].view(np.uint64)[0])
        header = json.loads(raw[8 : 8 + header_size].tobytes())
        for name, info in header.items():
            if name != "__metadata__":
                start, end = (8 + header_size + offset for offset in info["data_offsets"])
                tensors.append((name, _to_float32(raw[start:end], info["dtype"]).reshape(info["shape"])))
    return tensors


def _to_float32(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def _gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
