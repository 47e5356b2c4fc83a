"""The budget of reasoning, compared with a plain reading of the whole output."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledRows
from rtp_llm.contract.sampling_params import SamplingParams
from rtp_llm.layers.reasoning_budget import ReasoningBudget

VOCAB = 6
OPEN, CLOSE = (1,), (2, 3)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)
PARAMS = SamplingParams(max_tokens=99, reasoning_end=CLOSE)


def expected_token(output: list[int], start: tuple[int, ...], budget: int) -> int | None:
    """Returns the token that must follow, found by looking at everything."""
    reasoning = output[len(start) :]
    text = "".join(map(str, reasoning))
    if tuple(output[: len(start)]) != start or "23" in text or len(reasoning) < budget:
        return None
    return 3 if text.endswith("2") else 2


def allowed(processor: ReasoningBudget, output: list[int], drafts: list[int]) -> list[list[int]]:
    """Returns the tokens that each row of a step may sample."""
    rows = SampledRows.build([0], [len(output)], [drafts])
    logits = torch.zeros(len(rows), VOCAB)
    if processor.is_active(0):
        processor.apply(logits, rows)
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


@given(TOKENS, TOKENS, TOKENS, st.integers(0, 8), st.sampled_from([(), OPEN]))
def test_only_the_end_follows_a_spent_budget(
    before: list[int], after: list[int], drafts: list[int], budget: int, start: tuple[int, ...]
) -> None:
    processor = ReasoningBudget(VOCAB, torch.device("cpu"))
    params = replace(PARAMS, reasoning_budget=budget, reasoning_start=start)
    processor.reset(0, Request("r", [5, 1, 2, 3], params, output=before))
    processor.accept(0, after)
    processor.accept(0, drafts)
    processor.rollback(0, len(drafts))
    output = before + after
    found = allowed(processor, output, drafts)
    for offset in range(len(drafts) + 1):
        token = expected_token(output + drafts[:offset], start, budget)
        assert found[offset] == (list(range(VOCAB)) if token is None else [token])


def test_nothing_is_forced_without_a_budget() -> None:
    processor = ReasoningBudget(VOCAB, torch.device("cpu"))
    processor.reset(0, Request("r", [5], PARAMS, output=[4] * 9))
    assert not processor.is_active(0)
    processor.reset(0, Request("r", [5], replace(PARAMS, reasoning_budget=2)))
    processor.remove(0)
    assert not processor.is_active(0)
