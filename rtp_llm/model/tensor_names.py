"""Tables of the names and layouts of checkpoint tensors, per model family. No torch.

The code of the model uses the tensor names of Llama's checkpoints. A family with other names adds a table to
TENSOR_NAMES.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FusedTensor:
    """A checkpoint tensor that stacks the rows of several linear layers, such as a fused QKV projection.

    parts: the names of these layers in Llama's checkpoints, such as ("q_proj", "k_proj", "v_proj").
    per_kv_head: the rows of all parts are grouped by KV head; otherwise each part is contiguous, in order.
    """

    parts: tuple[str, ...]
    per_kv_head: bool = False


@dataclass(frozen=True)
class TensorNames:
    """How a model family names the tensors of its checkpoints.

    renames: piece of a Llama tensor name, such as ".o_proj." -> this family's piece, such as ".wo.".
    fused: name of a layer, such as "wqkv" -> the FusedTensor that is this layer's weight.
    """

    renames: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, FusedTensor] = field(default_factory=dict)

    def rename(self, name: str) -> str:
        """Returns the name of Llama's tensor `name` in this family's checkpoints."""
        for old, new in self.renames.items():
            name = name.replace(old, new)
        return name

    def find_fused(self, name: str) -> tuple[str, list[str], bool] | None:
        """Returns (name in the checkpoint, Llama's names of all parts, `per_kv_head`) of the fused tensor that contains
        Llama's tensor `name`; None if no fused tensor contains it.

        `per_kv_head`: the rows are grouped by KV head: first its query heads, then its key, then its value.
        """
        for fused_name, fused in self.fused.items():
            for part in fused.parts:
                if f".{part}." in name:
                    names = [name.replace(f".{part}.", f".{other}.") for other in fused.parts]
                    return self.rename(name.replace(f".{part}.", f".{fused_name}.")), names, fused.per_kv_head
        return None


TENSOR_NAMES: dict[str, TensorNames] = {
    "internlm2": TensorNames(
        renames={
            "model.embed_tokens.": "model.tok_embeddings.",
            "lm_head.": "output.",
            ".self_attn.": ".attention.",
            ".o_proj.": ".wo.",
            ".mlp.": ".feed_forward.",
            ".gate_proj.": ".w1.",
            ".up_proj.": ".w3.",
            ".down_proj.": ".w2.",
            ".input_layernorm.": ".attention_norm.",
            ".post_attention_layernorm.": ".ffn_norm.",
        },
        fused={"wqkv": FusedTensor(("q_proj", "k_proj", "v_proj"), per_kv_head=True)},
    ),
}
LLAMA_NAMES = TensorNames()  # of every family that is not in the table
BASE_MODEL_NAMES = TensorNames(renames={"model.": ""})  # of its checkpoints without an output head, as AutoModel saves
