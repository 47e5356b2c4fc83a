"""What the steps of a rank have cost, estimated from the sizes of the model: the floor that a device is measured by."""

import numpy as np

from rtp_llm.contract.step import Step
from rtp_llm.model.footprint import head_weights, kv_bytes_per_token, layer_weights, weight_bytes
from rtp_llm.model.spec import ModelSpec


class CostEstimate:
    """Totals of this epoch: floating-point operations, and bytes of weights and KV cache, of the rank that holds most.

    A matrix costs two operations per weight and token, attention four per head dimension and key that a token sees.
    Sliding windows count as if they were whole.
    """

    def __init__(self, spec: ModelSpec, tp_size: int):
        self._layers, self._head = layer_weights(spec, tp_size), head_weights(spec, tp_size)
        self._weight_bytes, self._kv_bytes = weight_bytes(spec, tp_size), kv_bytes_per_token(spec, tp_size)
        self._per_key = 4 * spec.num_layers * -(-spec.num_heads // tp_size) * spec.head_dim
        self.flops = self.read_bytes = self.write_bytes = 0

    def add(self, step: Step) -> None:
        keys_seen = int(np.sum(step.positions, dtype=np.int64)) + step.num_tokens
        self.flops += (
            2 * (self._layers * step.num_tokens + self._head * len(step.logits_indices)) + self._per_key * keys_seen
        )
        self.read_bytes += self._weight_bytes + self._kv_bytes * int(np.sum(step.seq_lens, dtype=np.int64))
        self.write_bytes += self._kv_bytes * step.num_tokens
