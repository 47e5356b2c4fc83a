"""The built-in logits processors follow their formulas while sequences start, grow, are rolled back and end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.layers.logits_processors import DEFAULT_LOGITS_PROCESSORS, LogitsProcessor, MinTokens, Penalties

CPU = torch.device("cpu")
VOCAB = 12  # small, so that tokens repeat
NUM_SLOTS = 4


def make_request(prompt: Sequence[int], output: Sequence[int] = (), **params: Any) -> Request:
    return Request("", list(prompt), SamplingParams(max_tokens=100, **params), list(output))


def edited(logits: Tensor, prompt: Sequence[int], output: Sequence[int], params: SamplingParams) -> Tensor:
    """Returns the logits [VOCAB] by the definition of the parameters, in float64."""
    counts, result = Counter(output), logits.double().clone()
    for token in range(VOCAB):
        if token in prompt or token in output:
            penalty = params.repetition_penalty
            result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
        result[token] -= params.presence_penalty * (counts[token] > 0) + params.frequency_penalty * counts[token]
        result[token] += params.logit_bias.get(token, 0)
        if token in params.stop_token_ids and len(output) < params.min_tokens:
            result[token] = -torch.inf
        if params.allowed_token_ids and token not in params.allowed_token_ids:
            result[token] = -torch.inf
        text, words = ",".join(map(str, [*output, token])), (",".join(map(str, word)) for word in params.bad_words)
        if any(f",{text}".endswith(f",{word}") for word in words):
            result[token] = -torch.inf
    return result


@dataclass
class ExpectedSequence:
    """The sequence that a slot should hold. `accepted`: tokens after the request's own."""

    request: Request
    accepted: list[int] = field(default_factory=list)

    def expected(self, logits: Tensor, drafts: Sequence[int]) -> Tensor:
        output = [*self.request.output, *self.accepted, *drafts]
        prompt = self.request.tokens[: self.request.num_prompt_tokens]
        return edited(logits, prompt, output, self.request.params)


def random_request(rng: np.random.Generator) -> Request:
    def choose(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    tokens = rng.integers(VOCAB, size=12).tolist()
    prompt_len = int(rng.integers(1, 8))
    return make_request(
        tokens[:prompt_len],
        tokens[prompt_len : prompt_len + rng.integers(5)],
        repetition_penalty=choose(1.0, 1.3, 0.5),
        presence_penalty=choose(0.0, 0.75, -1.5),
        frequency_penalty=choose(0.0, 0.25, -0.5),
        logit_bias=choose({}, {3: 2.5}, {3: -100.0, 11: 0.5}),
        min_tokens=choose(0, 3, 8),
        stop_token_ids=choose((), (5,), (0, 11)),
        allowed_token_ids=choose((), (), (1, 2, 5, 11)),
        bad_words=choose((), ((3,), (7, 1)), ((4, 2), (9, 2), (1, 2, 3), (2, 2))),
    )


def check_rows(
    processors: list[LogitsProcessor], sequences: dict[int, ExpectedSequence], rng: np.random.Generator
) -> None:
    """Edits one step's rows, some after drafts, and compares each with the definition."""
    slots = rng.permutation(list(sequences)).tolist()
    drafts = [rng.integers(VOCAB, size=rng.integers(4)).tolist() for _ in slots]
    rows = SampledRows.build(slots, [9] * len(slots), drafts)
    logits = torch.from_numpy(rng.normal(0, 3, (len(rows), VOCAB)).astype(np.float32))
    expected = torch.stack(
        [sequences[slot].expected(logits[row], rows.drafts_before(row)) for row, slot in enumerate(rows.slots.tolist())]
    )
    for processor in processors:
        processor.apply(logits, rows)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-5)
    for slot in sequences:
        unchanged = logits.clone()
        for processor in processors:
            if not processor.is_active(slot):
                processor.apply(unchanged, SampledRows.build([slot] * len(logits), [9] * len(logits)))
        assert torch.equal(unchanged, logits), "an inactive processor changes logits"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_lives_of_sequences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    processors = [make(VOCAB, CPU) for make in DEFAULT_LOGITS_PROCESSORS]
    sequences: dict[int, ExpectedSequence] = {}
    for _ in range(25):
        slot = int(rng.integers(NUM_SLOTS))
        action = rng.random()
        if slot not in sequences or action < 0.15:
            sequences[slot] = ExpectedSequence(random_request(rng))
            for processor in processors:
                processor.reset(slot, sequences[slot].request)
        elif action < 0.25:
            del sequences[slot]
            for processor in processors:
                processor.remove(slot)
                assert not processor.is_active(slot)
        elif action < 0.4:
            count = int(rng.integers(len(sequences[slot].accepted) + 1))
            del sequences[slot].accepted[len(sequences[slot].accepted) - count :]
            for processor in processors:
                processor.rollback(slot, count)
        else:
            tokens = rng.integers(VOCAB, size=rng.integers(1, 4)).tolist()
            sequences[slot].accepted += tokens
            for processor in processors:
                processor.accept(slot, tokens)
        if sequences:
            check_rows(processors, sequences, rng)


def test_repetition_penalty_of_a_long_output_matches_transformers() -> None:
    """The table of a sequence grows many times."""
    vocab_size = 5000
    rng = np.random.default_rng(1)
    prompt, output = rng.integers(vocab_size, size=10).tolist(), rng.integers(vocab_size, size=3000).tolist()
    processor = Penalties(vocab_size, CPU)
    processor.reset(0, make_request(prompt, repetition_penalty=1.2))
    for token in output:
        processor.accept(0, [token])
    logits = torch.from_numpy(rng.normal(0, 3, (1, vocab_size)).astype(np.float32))
    expected = RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([prompt + output]), logits.clone())
    processor.apply(logits, SampledRows.build([0], [3010]))
    torch.testing.assert_close(logits, expected)


def test_requests_without_edits_cost_nothing() -> None:
    for processor in (Penalties(VOCAB, CPU), MinTokens(VOCAB, CPU)):
        processor.reset(0, make_request([1, 2], [3], min_tokens=1, stop_token_ids=(4,)))
        processor.reset(1, make_request([1, 2], min_tokens=3))  # no stop token could end it
        assert not any(processor.is_active(slot) for slot in range(3))


def test_min_tokens_ends() -> None:
    processor = MinTokens(VOCAB, CPU)
    processor.reset(0, make_request([1], [2], min_tokens=3, stop_token_ids=(4,)))
    processor.accept(0, [1])
    assert processor.is_active(0)
    processor.accept(0, [1])
    assert not processor.is_active(0)
    processor.rollback(0, 1)
    assert processor.is_active(0)
