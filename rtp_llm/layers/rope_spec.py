"""Parameters of the rotary embedding. Separate from `layers.rope`, so that config.json can be read without torch."""

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) and its scaling; fields as in Hugging Face's config.json."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max: int = 0  # tokens; the length trained without scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn, as all below
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
