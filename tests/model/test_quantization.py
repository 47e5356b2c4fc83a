"""QUANTIZATION: the decoder compared with transformers whose linears are quantized here, and what it costs in text."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rtp_llm.engine.engine import Engine
from rtp_llm.errors import ConfigError
from rtp_llm.layers.linear import ParallelLinear
from rtp_llm.model.footprint import weight_bytes
from rtp_llm.model.spec import QUANTIZATION_METHODS, QUANTIZATIONS, spec_from_config
from rtp_llm.parallel.group import SingleRankGroup
from rtp_llm.text.tokenizer import Tokenizer
from tests.model import drive
from tests.model.checkpoints import CASES, CheckpointCase, make_model, save_checkpoint
from tests.model.oracle import generate_answer
from tests.quick import slow_except
from tests.seams.thread_ranks import thread_ranks

DEMO = Path(__file__).parents[2] / "image/demo/model"
QUESTIONS = ("What does rtp-llm-doctor check?", "How do I set the number of GPUs?", "Which port does the server use?")
PROMPTS = [[7], list(range(3, 40)), list(range(100, 170))]
# Bounds of the KL divergence from transformers, in nats: values that the two round otherwise because sums have other
# last bits, and shards of TP 2 that have scales of their own.
KL_OF_ROUNDING = {"INT8": 1e-9, "W8A8": 1e-3, "INT4": 1e-3}
KL_OF_SHARDS = {"INT8": 2e-3, "W8A8": 2e-2, "INT4": 0.15}
Logits = NDArray[np.float32]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def round_symmetric(x: Tensor, group: int) -> Tensor:
    """Returns x [rows, size] with each group of a row rounded to 255 levels."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group)).double()
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return (torch.round(blocks / scale) * scale).flatten(1)[:, : x.shape[1]].float()


def round_to_four_bits(weight: Tensor) -> Tensor:
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = (torch.where(-low >= high, low, high) / -8).bfloat16().float()
    rounded = torch.round(blocks / torch.where(scale == 0, 1, scale)).clamp(-8, 7) * scale
    return rounded.flatten(1)[:, : weight.shape[1]]


Rounding = Callable[[Tensor], Tensor]
ROUNDINGS: dict[str, tuple[Rounding, Rounding]] = {  # of weights, of inputs
    "int8": (lambda w: round_symmetric(w, w.shape[1]), lambda x: x),
    "w8a8": (lambda w: round_symmetric(w, w.shape[1]), lambda x: round_symmetric(x, x.shape[1])),
    "int4": (round_to_four_bits, lambda x: round_symmetric(x, 32)),
}


class RoundedLinear(nn.Module):
    """A linear layer of transformers with rounded weights and inputs."""

    def __init__(self, original: nn.Linear, method: str):
        super().__init__()
        round_weight, self.round_input = ROUNDINGS[method]
        self.weight, self.bias = round_weight(original.weight.detach()), original.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.round_input(x.flatten(0, -2)), self.weight, self.bias).unflatten(0, x.shape[:-1])


def quantize(model: PreTrainedModel, quantization: str) -> None:
    """Replaces the model's linears, as QUANTIZATION says."""
    layer_method, head_method = QUANTIZATIONS[quantization]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, RoundedLinear(child, head_method if name == "lm_head" else layer_method))


def divergences(expected: Sequence[Logits], actual: Sequence[Logits]) -> tuple[float, float]:
    """Returns (mean KL divergence in nats, share of rows with the same best token)."""
    p, q = (torch.from_numpy(np.stack(list(logits))).double().log_softmax(-1) for logits in (expected, actual))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return float(kl), float((p.argmax(-1) == q.argmax(-1)).double().mean())


def forced_logits(engine: Engine, prompts: Sequence[list[int]], tokens: Sequence[list[int]]) -> list[Logits]:
    """Returns the logits of each token of the answers, which are given."""
    requests = [
        drive.greedy_request(p, len(t), id=str(i)) for i, (p, t) in enumerate(zip(prompts, tokens, strict=True))
    ]
    completions = drive.run(engine, requests, {str(i): list(t) for i, t in enumerate(tokens)})
    return [row for i in range(len(prompts)) for row in completions[str(i)].logits]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", slow_except(["llama", "llama-tied", "qwen2-14-heads", "qwen3"], "qwen2-14-heads"))
def test_logits_equal_those_of_rounded_linears(name: str, quantization: str, tp_size: int, tmp_path: Path) -> None:
    """With several ranks each rounds its own shard, so that a few values are rounded otherwise."""
    case = next(case for case in CASES if case.name == name)
    model = make_model(case, 2)
    save_checkpoint(model, case, tmp_path)
    quantize(model, quantization)
    answers = [generate_answer(model, list(prompt)) for prompt in PROMPTS]
    with thread_ranks(tmp_path, tp_size, quantization=quantization) as (engine, ranks):
        actual = forced_logits(engine, PROMPTS, [a.tokens for a in answers])
    for runner, _ in ranks:
        methods = {m.method.name for m in runner.residency.model.modules() if isinstance(m, ParallelLinear)}
        assert methods == set(QUANTIZATIONS[quantization])
    kl, agreement = divergences([row for a in answers for row in a.logits], actual)
    assert kl < (KL_OF_SHARDS if tp_size > 1 else KL_OF_ROUNDING)[quantization]
    assert agreement > (0.7 if quantization == "INT4" else 0.9 if tp_size > 1 else 0.98)


def trained_like(path: Path) -> None:
    """Saves a model as training leaves them: weights with decaying spectra, layers that change the residual stream
    little, and a few channels in which the states are eight times as large.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    case = CheckpointCase("trained-like", "llama", sizes)
    model = make_model(case, 5)
    outliers = torch.arange(10, 256, 64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                u, s, v = torch.linalg.svd(parameter, full_matrices=False)
                decay = torch.arange(1, len(s) + 1) ** -0.5
                gain = 0.3 if "o_proj" in name or "down_proj" in name else 1.0
                parameter.copy_(u * (gain * s.norm() * decay / decay.norm()) @ v)
                if parameter.shape[1] == 256 and "o_proj" not in name:
                    parameter[:, outliers] /= 8**0.5
            elif "layernorm" in name:
                parameter[outliers] *= 8
    save_checkpoint(model, case, path)


# (largest KL divergence in nats, smallest share of equal best tokens); docs/performance states them
ACCURACY = {
    ("demo", "INT8"): (0.003, 0.97),
    ("demo", "W8A8"): (0.01, 0.95),
    ("demo", "INT4"): (0.3, 0.7),
    ("trained-like", "INT8"): (0.05, 0.75),
    ("trained-like", "W8A8"): (0.4, 0.5),
    ("trained-like", "INT4"): (2, 0.1),
}


@pytest.mark.parametrize(
    ("checkpoint", "quantization"), slow_except(ACCURACY, *(row for row in ACCURACY if row[0] == "demo"))
)
def test_text_stays_close_to_the_unquantized_model(checkpoint: str, quantization: str, tmp_path: Path) -> None:
    path, prompts = DEMO, [Tokenizer.load(DEMO).encode(question) for question in QUESTIONS]
    if checkpoint != "demo":
        trained_like(tmp_path)
        path, prompts = tmp_path, PROMPTS
    requests = [drive.greedy_request(prompt, 64, id=str(i)) for i, prompt in enumerate(prompts)]
    plain = drive.run(drive.make_single_rank_engine(path), requests)
    tokens = [plain[str(i)].tokens for i in range(len(prompts))]
    expected = [row for i in range(len(prompts)) for row in plain[str(i)].logits]
    actual = forced_logits(drive.make_single_rank_engine(path, quantization=quantization), prompts, tokens)
    kl, agreement = divergences(expected, actual)
    print(checkpoint, quantization, kl, agreement)
    most, least = ACCURACY[checkpoint, quantization]
    assert kl < most
    assert agreement > least


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_estimate_of_memory_knows_the_quantized_size(quantization: str) -> None:
    """The demo's head is tied: its embedding stays in memory beside the quantized head."""
    runner, _ = drive.load_runner(DEMO, {"quantization": quantization}, SingleRankGroup())
    model = runner.residency.model
    layers = [module for module in model.modules() if isinstance(module, ParallelLinear)]
    actual = sum(w.nbytes for layer in layers for w in layer.weights.values()) + model.embed_tokens.weight.nbytes
    assert weight_bytes(runner.residency.spec, 1) == pytest.approx(actual, rel=0.05)


def test_a_quantized_checkpoint_is_not_quantized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZATION_METHODS, "other", "plain")
    config = json.loads((DEMO / "config.json").read_text()) | {"quantization_config": {"quant_method": "other"}}
    with pytest.raises(ConfigError, match="QUANTIZATION=INT8: the checkpoint is quantized already"):
        spec_from_config(config, quantization="INT8")
