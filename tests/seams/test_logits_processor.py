"""A logits processor that this file adds: ten tokens are allowed, and none twice in a row.

The second rule depends on the token before, which after a draft is the draft. With drafts of three tokens per step the
text must be that without drafts.
"""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.layers.logits_processors import DEFAULT_LOGITS_PROCESSORS
from rtp_llm.layers.sampler import Sampler

pytestmark = pytest.mark.parametrize("temperature", [0.0, 0.8])
CPU = torch.device("cpu")
VOCAB = 300
ALLOWED = tuple(range(20, 120, 10))
NUM_TOKENS = 60
PROMPTS = ([7, 8, 9], [20], [4, 4, 50, 1])
# Which token follows which; the tests' model looks at the newest token only.
BIGRAM_LOGITS = 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))


class AllowTenTokens:
    """Forbids all tokens but ALLOWED, and of those the newest token of the sequence."""

    def __init__(self, vocab_size: int, device: torch.device):
        self.mask = torch.full((vocab_size,), -torch.inf, device=device)
        self.mask[list(ALLOWED)] = 0
        self.tokens: dict[int, list[int]] = {}

    def reset(self, slot: int, request: Request) -> None:
        self.tokens[slot] = list(request.tokens)

    def is_active(self, slot: int) -> bool:
        return slot in self.tokens

    def apply(self, logits: Tensor, rows: SampledRows) -> None:
        for row, slot in enumerate(rows.slots.tolist()):
            if slot in self.tokens:
                logits[row] += self.mask
                logits[row, [*self.tokens[slot], *rows.drafts_before(row)][-1]] = -torch.inf

    def accept(self, slot: int, token_ids: Sequence[int]) -> None:
        if slot in self.tokens:
            self.tokens[slot] += token_ids

    def rollback(self, slot: int, num_tokens: int) -> None:
        if slot in self.tokens:
            del self.tokens[slot][len(self.tokens[slot]) - num_tokens :]

    def remove(self, slot: int) -> None:
        self.tokens.pop(slot, None)


def make_request(index: int, temperature: float, output: Sequence[int] = ()) -> Request:
    params = SamplingParams(
        max_tokens=NUM_TOKENS, temperature=temperature, top_p=0.95, seed=index, frequency_penalty=0.3, min_tokens=5
    )
    return Request(str(index), list(PROMPTS[index]), params, list(output))


def propose(tokens: Sequence[int], num_tokens: int) -> list[int]:
    """Returns fixed drafts: what followed the newest token when it last occurred, so some are right and some wrong."""
    seen = [i for i in range(len(tokens) - 1) if tokens[i] == tokens[-1]]
    return list(tokens[seen[-1] + 1 :][:num_tokens]) if seen else [ALLOWED[0]] * num_tokens


class Generation:
    """Sequences that grow step by step, as in the runner. `num_accepted`: drafts that were right."""

    def __init__(self, requests: Sequence[Request], num_drafts: int):
        self.requests, self.num_drafts, self.num_accepted = requests, num_drafts, 0
        self.sampler = Sampler(8, VOCAB, CPU, [*DEFAULT_LOGITS_PROCESSORS, AllowTenTokens])
        for slot, request in enumerate(requests):
            self.sampler.reset(slot, request)

    def run(self) -> list[list[int]]:
        while any(r.num_output_tokens < NUM_TOKENS for r in self.requests):
            self.step()
        return [r.output[:NUM_TOKENS] for r in self.requests]

    def step(self) -> None:
        drafts = [propose(r.tokens, self.num_drafts) for r in self.requests]
        rows = SampledRows.build(range(len(drafts)), [r.num_tokens for r in self.requests], drafts)
        inputs = [t for r, draft in zip(self.requests, drafts, strict=True) for t in (r.tokens[-1], *draft)]
        output = self.sampler.sample(BIGRAM_LOGITS[inputs], rows)
        for request, sampled in zip(self.requests, self.sampler.accept_drafts(output, rows), strict=True):
            assert not sampled.failed
            self.num_accepted += len(sampled.token_ids) - 1
            request.tokens += sampled.token_ids


def generate(temperature: float, num_drafts: int = 0) -> list[list[int]]:
    return Generation([make_request(i, temperature) for i in range(len(PROMPTS))], num_drafts).run()


def test_only_allowed_tokens_and_none_twice_in_a_row(temperature: float) -> None:
    for tokens in generate(temperature):
        assert set(tokens) <= set(ALLOWED)
        assert all(a != b for a, b in pairwise(tokens))
        assert len(set(tokens)) > 2


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_drafts_do_not_change_the_text(temperature: float, num_drafts: int) -> None:
    generation = Generation([make_request(i, temperature) for i in range(len(PROMPTS))], num_drafts)
    assert generation.run() == generate(temperature)
    assert generation.num_accepted > 10, "the proposer is never right, so nothing is tested"


def test_a_resumed_sequence_continues(temperature: float) -> None:
    texts = generate(temperature)
    resumed = [make_request(i, temperature, text[:17]) for i, text in enumerate(texts)]
    assert Generation(resumed, 3).run() == texts
