"""Rotary position embedding (RoPE) with its scaling methods; all layers of a step share its cosines and sines.

Linear: Chen et al. 2023, arXiv 2306.15595. Dynamic NTK: as in Hugging Face transformers. YaRN: Peng et al. 2023, arXiv
2309.00071. llama3: the frequency bands of Llama 3.1.
"""

import math

import torch
from torch import Tensor

from rtp_llm.layers.rope_spec import RopeSpec


class RotaryEmbedding:
    """Rotary position embedding (RoPE): computes cos and sin for the positions of a step."""

    def __init__(self, spec: RopeSpec, head_dim: int, device: torch.device, dtype: torch.dtype):
        self.spec, self.head_dim, self.dtype = spec, head_dim, dtype
        self.scale = _yarn_attention_factor(spec) if spec.kind == "yarn" else 1.0
        self.inv_freq = _compute_inv_freq(spec, head_dim).to(device)
        self._exponents = _exponents(head_dim).to(device)  # there already: a CUDA graph cannot copy them from the host

    def cos_sin(self, positions: Tensor, rope_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (cos, sin), each [num_tokens, 1, head_dim / 2] in the model's dtype.

        positions: [num_tokens]. rope_lens: [num_tokens], the sequence length that dynamic scaling uses for each token:
        the prompt's length for prompt tokens, position + 1 for later ones. transformers uses the same lengths. They do
        not depend on how the scheduler splits the prompt or on the other requests of the step.
        """
        inv_freq = self._dynamic_inv_freq(rope_lens) if self.spec.kind == "dynamic" else self.inv_freq
        angles = positions[:, None].float() * inv_freq
        return (angles.cos() * self.scale).to(self.dtype)[:, None], (angles.sin() * self.scale).to(self.dtype)[:, None]

    def _dynamic_inv_freq(self, rope_lens: Tensor) -> Tensor:
        """Returns inverse frequencies [num_tokens, head_dim / 2] float32.

        The base is theta for sequences up to the trained length, and grows with the length of longer ones.
        """
        spec, dim = self.spec, self.head_dim
        lengths = rope_lens.clamp(min=spec.original_max).double()
        stretch = spec.factor * lengths / spec.original_max - (spec.factor - 1)
        base = spec.theta * stretch ** (dim / (dim - 2))
        return (base[:, None] ** -self._exponents).float()


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float64) / dim


def _compute_inv_freq(spec: RopeSpec, dim: int) -> Tensor:
    """Returns inverse frequencies [dim / 2] float32: by how many radians each pair of elements turns per position."""
    inv_freq = spec.theta ** -_exponents(dim)
    if spec.kind == "linear":
        inv_freq = inv_freq / spec.factor
    elif spec.kind == "llama3":
        inv_freq = _llama3_inv_freq(spec, inv_freq)
    elif spec.kind == "yarn":
        inv_freq = _yarn_inv_freq(spec, inv_freq, dim)
    return inv_freq.float()


def _llama3_inv_freq(spec: RopeSpec, inv_freq: Tensor) -> Tensor:
    """Returns `inv_freq` with low frequencies divided by the factor, high ones kept, and a linear transition."""
    num_rotations = spec.original_max * inv_freq / (2 * math.pi)  # within the trained length
    smooth = (num_rotations - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return smooth * inv_freq + (1 - smooth) * inv_freq / spec.factor


def _yarn_inv_freq(spec: RopeSpec, inv_freq: Tensor, dim: int) -> Tensor:
    """Returns `inv_freq` with low frequencies divided by the scaling factor, high ones kept, and a linear transition.

    High: more than beta_fast rotations within the trained length. Low: fewer than beta_slow rotations.
    """
    low, high = (_find_correction_index(beta, spec, dim) for beta in (spec.beta_fast, spec.beta_slow))
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return ramp * inv_freq / spec.factor + (1 - ramp) * inv_freq


def _find_correction_index(num_rotations: float, spec: RopeSpec, dim: int) -> float:
    """Returns the (fractional) index of the pair of elements that turns `num_rotations` times in the trained length."""
    return dim * math.log(spec.original_max / (num_rotations * 2 * math.pi)) / (2 * math.log(spec.theta))


def _yarn_attention_factor(spec: RopeSpec) -> float:
    if spec.attention_factor is not None:
        return spec.attention_factor

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(spec.factor) + 1.0 if spec.factor > 1 else 1.0

    if spec.mscale and spec.mscale_all_dim:
        return scale(spec.mscale) / scale(spec.mscale_all_dim)
    return scale(1.0)
