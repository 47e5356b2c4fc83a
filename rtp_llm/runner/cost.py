"""Roofline cost model: FLOPs and memory traffic of the steps of a rank, estimated from the sizes of the model."""

import numpy as np

from rtp_llm.model.footprint import head_weights, kv_bytes_per_token, layer_weights, weight_bytes
from rtp_llm.model.spec import ModelSpec
from rtp_llm.runner.input_batch import StepInputs


class CostEstimate:
    """Total FLOPs, and bytes of weights and KV cache read and written, since the ranks formed their communicator.

    Estimates, for the rank with the largest shard. Counts 2 FLOPs per matrix element and token; for attention, 4 *
    head_dim per query head and attended key. Ignores sliding windows.
    """

    def __init__(self, spec: ModelSpec, tp_size: int):
        self._num_layer_weights, self._num_head_weights = layer_weights(spec, tp_size), head_weights(spec, tp_size)
        self._weight_bytes, self._kv_bytes = weight_bytes(spec, tp_size), kv_bytes_per_token(spec, tp_size)
        self._flops_per_key = 4 * spec.num_layers * -(-spec.num_heads // tp_size) * spec.head_dim
        self.flops = self.read_bytes = self.write_bytes = 0

    def add(self, inputs: StepInputs) -> None:
        """Adds the cost of one step to the totals."""
        step, seq_lens = inputs.step, inputs.seq_lens.astype(np.int64)
        num_tokens, counts = step.num_tokens, step.counts.astype(np.int64)
        num_keys = int((counts * seq_lens - counts * (counts - 1) // 2).sum())  # each token attends to those before it
        num_logits = int(step.num_sampled.sum()) + len(step.logprob_indices)
        matrix_elements = self._num_layer_weights * num_tokens + self._num_head_weights * num_logits
        self.flops += 2 * matrix_elements + self._flops_per_key * num_keys
        self.read_bytes += self._weight_bytes + self._kv_bytes * int(seq_lens.sum())
        self.write_bytes += self._kv_bytes * num_tokens
