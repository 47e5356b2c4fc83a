"""What a checkpoint says about its rotary embedding. Apart from layers.rope so that reading a config.json needs no
torch.
"""

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) and its scaling; `original_max` is the length trained
    without it.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
