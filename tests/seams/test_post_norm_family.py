"""Families whose norms sit after the blocks, or around them, added by this file alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Exaone4Config, Exaone4ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from rtp_llm.model import spec
from tests.model import checkpoints, drive
from tests.model.checkpoints import CheckpointCase
from tests.model.oracle import make_oracle
from tests.quick import slow_except
from tests.seams.thread_ranks import thread_ranks


class SandwichLayer(LlamaDecoderLayer):
    """A layer of Llama with the norms of Gemma 2: before and after both attention and MLP."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.pre_feedforward_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attention = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)[0]
        hidden_states = hidden_states + self.post_attention_layernorm(attention)
        mlp = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states + self.post_feedforward_layernorm(mlp)


class SandwichForCausalLM(LlamaForCausalLM):
    """Llama with such layers."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model.layers = nn.ModuleList(SandwichLayer(config, i) for i in range(config.num_hidden_layers))


def exaone4_flags(config: spec.Json) -> dict[str, Any]:
    return {"norm_placement": "post", "qk_norm": True}


def sandwich_flags(config: spec.Json) -> dict[str, Any]:
    return {"norm_placement": "both", "qkv_bias": True, "o_bias": True}


EXAONE4: spec.Json = {"sliding_window": None, "layer_types": ["full_attention"] * 2, "head_dim": 24}
FAMILIES: dict[str, tuple[Any, Any, Callable[[spec.Json], dict[str, Any]], spec.Json]] = {
    "exaone4": (Exaone4Config, Exaone4ForCausalLM, exaone4_flags, EXAONE4),
    "sandwich": (LlamaConfig, SandwichForCausalLM, sandwich_flags, {"attention_bias": True}),
}


@pytest.mark.parametrize("tp_size", slow_except([1, 2], 2))
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_and_logits(family: str, tp_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_class, model_class, flags, config = FAMILIES[family]
    monkeypatch.setitem(spec.FAMILIES, family, flags)
    monkeypatch.setitem(spec.ARCHITECTURES, model_class.__name__, family)
    monkeypatch.setitem(checkpoints.FAMILIES, family, (config_class, model_class))
    torch.set_num_threads(1)
    oracle = make_oracle(CheckpointCase(family, family, config), tmp_path)
    with thread_ranks(oracle.path, tp_size) as (engine, _):
        oracle.check(drive.run(engine, oracle.greedy_requests()))
