"""Computes the steps of one epoch on one rank. All ranks run the same code."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rtp_llm.contract.engine_output import Logprob
from rtp_llm.contract.sampling_metadata import SampledTokens, SamplingMetadata, StepResult
from rtp_llm.contract.step import Ints, Step
from rtp_llm.kernels.batch import ForwardBatch, to_tensor
from rtp_llm.layers.logits_processors import DEFAULT_LOGITS_PROCESSORS, LogitsProcessorFactory
from rtp_llm.layers.logprobs import compute_logprobs
from rtp_llm.layers.sampler import Sampler
from rtp_llm.runner.cost import CostEstimate
from rtp_llm.runner.input_batch import InputBatch, StepInputs
from rtp_llm.runner.residency import Residency


class ModelRunner:
    """Executes steps on one rank's device, with the weights and KV cache of its `Residency`. Holds the state of all
    sequences until a rank is lost (for one epoch).

    For each step, call `prepare`, which uses the host only, then `execute`, which another thread may run.
    """

    def __init__(
        self,
        residency: Residency,
        logits_processors: Sequence[LogitsProcessorFactory] = DEFAULT_LOGITS_PROCESSORS,
    ):
        """`logits_processors`: in order of application."""
        self.residency, self._tp = residency, residency.mesh.tp
        num_slots, spec = residency.config.max_sequences, residency.spec
        self.input_batch = InputBatch(residency.layout.groups, num_slots, residency.max_seq_len)
        self.cost = CostEstimate(spec, self._tp.size)
        self._sampler = None
        if self._tp.rank == 0:
            self._sampler = Sampler(num_slots, spec.vocab_size, residency.device, logits_processors)
        # The newest token of each sequence, by slot. Ranks keep it on the device, so that a step need not carry it.
        self._newest_tokens = torch.zeros(num_slots, dtype=torch.int64, device=residency.device)

    def prepare(self, step: Step) -> StepInputs:
        """Applies a step to this rank's table of sequences. Returns the arrays that `execute` needs."""
        memory = self.residency.kv_memory
        assert memory, "allocate_kv_cache comes first"
        memory.retire(step.retired_blocks)
        memory.reuse(step.new_blocks[:, 3])
        return self.input_batch.apply(step)

    @torch.inference_mode()
    def execute(self, inputs: StepInputs, sampling_metadata: SamplingMetadata | None = None) -> StepResult:
        """Computes the step whose arrays `prepare` returned, and samples its tokens on rank 0. The other ranks return
        an empty result and need no `sampling_metadata`.
        """
        if self.residency.device.type == "cuda":
            torch.cuda.set_device(self.residency.device)  # of this thread; Triton launches kernels on it
        hidden = self.forward(inputs)
        return self.sample(hidden, inputs, sampling_metadata or SamplingMetadata())

    def forward(self, inputs: StepInputs) -> Tensor:
        """Returns the hidden states [T, hidden_size] of all tokens of the step, equal on all ranks."""
        self.cost.add(inputs)
        batch = self._make_batch(inputs)
        return self.residency.forward(batch)

    def sample(self, hidden: Tensor, inputs: StepInputs, sampling_metadata: SamplingMetadata) -> StepResult:
        """Samples on rank 0 from the logits that the step needs, and broadcasts the sampled tokens to all ranks.

        hidden: [T, hidden_size]. The other ranks compute their shards of the logits.
        """
        if self._sampler:
            for slot in inputs.step.ended_slots.tolist():
                self._sampler.remove(slot)
            for slot, request in sampling_metadata.new_requests:
                self._sampler.reset(slot, request)
        result = StepResult(
            tokens=self._sample_tokens(hidden, inputs),
            prompt_logprobs=self._compute_prompt_logprobs(hidden, inputs, sampling_metadata),
            hidden_states=_to_bytes(hidden, sampling_metadata.hidden_indices),
        )
        self._keep_newest_tokens(inputs.sampled_slots, result.tokens)
        return result

    def _make_batch(self, inputs: StepInputs) -> ForwardBatch:
        device = self.residency.device
        batch = ForwardBatch.build(
            token_ids=inputs.token_ids,
            query_start_loc=inputs.query_start_loc,
            seq_lens=inputs.seq_lens,
            prompt_lens=inputs.prompt_lens,
            block_tables=inputs.block_tables,
            block_sizes=[group.block_size for group in self.residency.layout.groups],
            device=device,
        )
        if len(inputs.device_indices):
            newest = self._newest_tokens.index_select(0, to_tensor(inputs.device_slots, device))
            batch.token_ids.index_copy_(0, to_tensor(inputs.device_indices, device), newest)
        return batch

    def _sample_tokens(self, hidden: Tensor, inputs: StepInputs) -> list[SampledTokens]:
        tokens: list[SampledTokens] = []
        rows, indices = inputs.sampled_rows(), inputs.sampled_indices
        for tile in _split_rows(inputs.step.num_sampled, self.residency.max_logits_rows):
            logits = self._compute_logits(hidden, indices[tile])
            if logits is not None:
                sampler, tile_rows = self._require_sampler(), rows[tile]
                tokens += sampler.accept_drafts(sampler.sample(logits, tile_rows), tile_rows)
        return tokens

    def _compute_prompt_logprobs(
        self, hidden: Tensor, inputs: StepInputs, sampling_metadata: SamplingMetadata
    ) -> list[Logprob]:
        logprobs: list[Logprob] = []
        indices = inputs.step.logprob_indices
        for tile in _split_rows(np.ones_like(indices), self.residency.max_logits_rows):
            logits = self._compute_logits(hidden, indices[tile])
            if logits is not None:
                token_ids, tops = zip(*sampling_metadata.prompt_logprobs[tile], strict=True)
                logprobs += compute_logprobs(logits, token_ids, tops)
        return logprobs

    def _compute_logits(self, hidden: Tensor, indices: Ints) -> Tensor | None:
        """Returns the logits [len(indices), vocab_size] float32 of these tokens on rank 0, None on the others."""
        is_decode = len(indices) == len(hidden)  # then every token has logits, in order
        rows = hidden if is_decode else hidden[to_tensor(indices, hidden.device)]
        logits: Tensor | None = self.residency.model.logits(rows)
        return logits

    def _keep_newest_tokens(self, slots: Ints, tokens: list[SampledTokens]) -> None:
        """Broadcasts the last new token of each of the sequences `slots` to all ranks. Only rank 0 has the `tokens`."""
        if not len(slots):
            return
        last = [t.token_ids[-1] if t.token_ids else 0 for t in tokens] if self._sampler else [0] * len(slots)
        device = self._newest_tokens.device
        newest = self._tp.broadcast(torch.tensor(last, device=device))
        self._newest_tokens.index_copy_(0, to_tensor(slots, device), newest)

    def _require_sampler(self) -> Sampler:
        assert self._sampler, "only rank 0 samples"
        return self._sampler


def _to_bytes(hidden: Tensor, indices: Sequence[int]) -> list[bytes]:
    """Returns the hidden states of these tokens as the bytes of float32."""
    return [row.tobytes() for row in hidden[list(indices)].float().cpu().numpy()] if indices else []


def _split_rows(counts: Ints, max_rows: int) -> Iterator[slice]:
    """Yields slices of at most `max_rows` rows; the `counts[i]` rows of a sequence stay together.

    So no step needs more memory for logits than the warm-up step.
    """
    start = end = 0
    for count in counts[counts > 0].tolist():
        if end + count - start > max_rows and end > start:
            yield slice(start, end)
            start = end
        end += count
    if end > start:
        yield slice(start, end)
