"""Properties of the engine, which rank 0 sends to the API process in the first frame of a connection (READY)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineInfo:
    """Properties of the engine that stay constant during an epoch, that is until a rank is lost and the ranks form a
    new communicator.

    The field names are the JSON keys of the READY frame, the first frame that rank 0 sends to the API process.
    """

    epoch: int
    max_seq_len: int  # tokens of prompt and output together
    max_seq_len_reason: str  # what bounds it, such as TEST_BLOCK_NUM=8
    vocab_size: int
    block_size: int  # tokens per KV block
    num_blocks: int  # KV blocks, equal on all ranks
    prefix_caching: bool
    family: str  # a key of model.spec.FAMILIES
    dtype: str  # of weights and KV cache: fp32, bf16 or fp16
