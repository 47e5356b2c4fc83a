"""Weight-only 8-bit linear layers, added by this file alone: int8 weights with a float32 scale per output feature."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rtp_llm.kernels.linear_method import LinearMethod, Weights, WeightTensor
from rtp_llm.kernels.linear_methods import LINEAR_METHODS
from rtp_llm.layers.linear import ParallelLinear
from rtp_llm.layers.parameter import ShardedParameter
from rtp_llm.model import spec
from rtp_llm.model.decoder import Decoder
from tests.model import drive
from tests.model.checkpoints import CASES, edit_config, make_model, save_checkpoint
from tests.model.oracle import Oracle, generate_answer
from tests.quick import slow_except
from tests.seams.thread_ranks import thread_ranks

PROMPTS = ([7], list(range(3, 40)), list(range(100, 170)))
SEED = 2  # of weights without near ties between the tokens of the answers


class Int8PerChannel(LinearMethod):
    """y = (x Wᵀ) * scale + b, with W in int8."""

    name = "int8_per_channel"

    @property
    def tensors(self) -> dict[str, WeightTensor]:
        return {"weight": WeightTensor(torch.int8), "weight_scale": WeightTensor(torch.float32, ((0, 1),))}

    def apply(self, x: Tensor, weights: Weights, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weights["weight"].to(x.dtype)) * weights["weight_scale"].to(x.dtype)
        return y if bias is None else y + bias


def is_quantized(name: str) -> bool:
    return "_proj" in name and name.endswith(".weight")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (int8 weight [out, in], scale [out] float32)."""
    scale = weight.abs().amax(1) / 127
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def round_weights(model: PreTrainedModel) -> None:
    """Replaces the weights by the values that their quantized form stands for."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_quantized(name):
                quantized, scale = quantize(parameter)
                parameter.copy_(quantized.float() * scale[:, None])


def quantize_checkpoint(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if is_quantized(name)]:
        tensors[name], tensors[f"{name}_scale"] = quantize(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    edit_config(directory, lambda config: config | {"quantization_config": {"quant_method": "int8"}})


@pytest.fixture(params=["llama", "llama-tied", "qwen2-14-heads"])
def oracle(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    monkeypatch.setitem(LINEAR_METHODS, Int8PerChannel.name, Int8PerChannel)
    monkeypatch.setitem(spec.QUANTIZATION_METHODS, "int8", Int8PerChannel.name)
    torch.set_num_threads(1)
    case = next(case for case in CASES if case.name == request.param)
    model = make_model(case, SEED)
    save_checkpoint(model, case, tmp_path)
    quantize_checkpoint(tmp_path)
    round_weights(model)
    return Oracle(case, tmp_path, [generate_answer(model, list(prompt)) for prompt in PROMPTS])


@pytest.mark.parametrize("tp_size", slow_except([1, 2, 3], 2))
def test_same_tokens_and_logits_as_dequantized_weights(oracle: Oracle, tp_size: int) -> None:
    with thread_ranks(oracle.path, tp_size) as (engine, ranks):
        oracle.check(drive.run(engine, oracle.greedy_requests()))
    for runner, _ in ranks:
        layers = linear_layers(runner.residency.model)
        assert {layer.method.name for layer in layers} == {
            "int8_per_channel",
            runner.residency.model.lm_head.method.name,
        }
        for layer in layers:
            assert sum(w.nbytes for w in layer.weights.values()) == layer.method.weight_bytes
        for parameter in runner.residency.model.parameters():
            assert isinstance(parameter, ShardedParameter)
            assert len(set(parameter.slices)) == len(parameter.slices), "a slice is read twice"


def linear_layers(model: Decoder) -> list[ParallelLinear]:
    return [module for module in model.modules() if isinstance(module, ParallelLinear)]


def test_a_quarter_of_the_bytes_are_read(oracle: Oracle) -> None:
    """Of the weights of the linear layers, compared with float32; all else is read as before."""
    with thread_ranks(oracle.path, 1) as (_, [(runner, load_stats)]):
        pass
    head = runner.residency.model.lm_head
    layers = [layer for layer in linear_layers(runner.residency.model) if layer is not head]
    num_weights = sum(layer.method.out_size * layer.method.in_size for layer in layers)
    num_outputs = sum(layer.method.out_size for layer in layers)
    linear_bytes = sum(layer.method.weight_bytes for layer in layers)
    assert linear_bytes == num_weights + 4 * num_outputs
    tensors = load_file(oracle.path / "model.safetensors")
    assert load_stats.bytes == sum(t.nbytes for t in tensors.values())
    others = sum(t.nbytes for name, t in tensors.items() if "_proj.weight" not in name)
    assert load_stats.bytes == linear_bytes + others


def test_an_unknown_quantization_is_refused(oracle: Oracle) -> None:
    edit_config(oracle.path, lambda config: config | {"quantization_config": {"quant_method": "surprise"}})
    config = json.loads((oracle.path / "config.json").read_text())
    with pytest.raises(spec.CheckpointError, match="surprise"):
        spec.spec_from_config(config)
