"""Rotary position embedding and its scalings, as cosines and sines that all layers of a step share.

Formulas: linear (Chen et al. 2023, arXiv 2306.15595), dynamic NTK (as Hugging Face transformers defines it), yarn
(Peng et al. 2023, arXiv 2309.00071), llama3 (Llama 3.1's frequency bands).
"""

import math

import torch
from torch import Tensor

from rtp_llm.layers.rope_spec import RopeSpec


class RotaryEmbedding:
    """cos and sin for positions of a step."""

    def __init__(self, spec: RopeSpec, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.spec, self.head_dim, self.dtype = spec, head_dim, dtype
        self.scale = _attention_factor(spec) if spec.kind == "yarn" else 1.0
        self.frequencies = _frequencies(spec, head_dim).to(device)

    def cos_sin(self, positions: Tensor, rope_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, 1, head_dim / 2] in the model's dtype.

        `rope_lens` [T]: the length dynamic scaling goes by. A prompt's tokens go by the prompt's length and each later
        token by its own position, which is what transformers' cache holds too; so neither chunks nor batches change a
        token.
        """
        frequencies = self._dynamic(rope_lens) if self.spec.kind == "dynamic" else self.frequencies
        angle = positions[:, None].float() * frequencies
        return (angle.cos() * self.scale).to(self.dtype)[:, None], (angle.sin() * self.scale).to(self.dtype)[:, None]

    def _dynamic(self, rope_lens: Tensor) -> Tensor:
        """[T, head_dim / 2]: the base grows with the length, from the trained length on."""
        spec, dim = self.spec, self.head_dim
        length = rope_lens.clamp(min=spec.original_max).double()
        stretch = spec.factor * length / spec.original_max - (spec.factor - 1)
        base = spec.theta * stretch ** (dim / (dim - 2))
        return (base[:, None] ** -_exponents(dim).to(base)).float()


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [T, heads, head_dim]; halves are paired (i, i + head_dim / 2), as in all Hugging Face checkpoints."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float64) / dim


def _frequencies(spec: RopeSpec, dim: int) -> Tensor:
    """[dim / 2] float32: radians per position of each pair."""
    plain = spec.theta ** -_exponents(dim)
    if spec.kind == "linear":
        plain = plain / spec.factor
    elif spec.kind == "llama3":
        plain = _llama3(spec, plain)
    elif spec.kind == "yarn":
        plain = _yarn(spec, plain, dim)
    return plain.float()


def _llama3(spec: RopeSpec, plain: Tensor) -> Tensor:
    """Long waves are slowed by the factor, short ones kept, those between blended."""
    turns = spec.original_max * plain / (2 * math.pi)  # full rotations within the trained length
    blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blend = blend.clamp(0, 1)
    return blend * plain + (1 - blend) * plain / spec.factor


def _yarn(spec: RopeSpec, plain: Tensor, dim: int) -> Tensor:
    """Pairs that turn often keep their frequency, pairs that turn seldom are interpolated, a ramp lies between."""
    low, high = (_pair_with_turns(turns, spec, dim) for turns in (spec.beta_fast, spec.beta_slow))
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return ramp * plain / spec.factor + (1 - ramp) * plain


def _pair_with_turns(turns: float, spec: RopeSpec, dim: int) -> float:
    """Index of the pair that makes this many rotations within the trained length."""
    return dim * math.log(spec.original_max / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))


def _attention_factor(spec: RopeSpec) -> float:
    if spec.attention_factor is not None:
        return spec.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(spec.factor) + 1.0 if spec.factor > 1 else 1.0

    if spec.mscale and spec.mscale_all_dim:
        return scale(spec.mscale) / scale(spec.mscale_all_dim)
    return scale(1.0)
