"""What rank 0 tells the API process about the engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineInfo:
    """What rank 0 says of itself when the connection opens."""

    epoch: int
    max_seq_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    prefix_caching: bool
    family: str
    dtype: str
