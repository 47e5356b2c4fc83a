"""Expected results from transformers: greedy tokens and all logits, one prompt at a time with its own KV cache."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from rtp_llm.contract.request import Request
from tests.model.checkpoints import CheckpointCase, make_model, save_checkpoint
from tests.model.drive import Completions, greedy_request

Floats = NDArray[np.float32]

PROMPT_LENGTHS = (1, 3, 16, 37, 70)  # one token, one block exactly, several blocks, longer than TRAINED_LENGTH
NEW_TOKENS = 64
TOLERANCE = 1e-4  # between logits, absolute
# Two logits that are closer could swap order within the tolerance; a test with such a checkpoint would be flaky.
MIN_LOGIT_GAP = 3 * TOLERANCE
MIN_DISTINCT_TOKENS = 12  # in the output of each prompt


@dataclass(frozen=True)
class OracleAnswer:
    """Expected results for one prompt.

    prompt_logits: [len(prompt), vocab_size]. logits: [len(tokens), vocab_size]; each token is the argmax of its row.
    """

    prompt: list[int]
    tokens: list[int]
    prompt_logits: Floats
    logits: Floats

    def check(self, tokens: list[int], logits: list[Floats], tolerance: float = TOLERANCE) -> None:
        """Raises AssertionError if tokens or logits differ.

        Compares logits only up to the first different token, after which the inputs differ.
        """
        assert len(tokens) == len(logits) == len(self.tokens)
        differing = [
            i for i, (expected, token) in enumerate(zip(self.tokens, tokens, strict=True)) if expected != token
        ]
        end = differing[0] + 1 if differing else len(tokens)
        np.testing.assert_allclose(logits[:end], self.logits[:end], rtol=0, atol=tolerance)
        assert tokens == self.tokens

    def after(self, count: int) -> "OracleAnswer":
        """Returns the expected results without the first `count` tokens."""
        return replace(self, tokens=self.tokens[count:], logits=self.logits[count:])


@dataclass(frozen=True)
class Oracle:
    """A checkpoint on disk, and its expected results."""

    case: CheckpointCase
    path: Path
    answers: list[OracleAnswer]
    seed: int = 0  # of its weights

    def greedy_requests(self, max_tokens: int = NEW_TOKENS, **params: Any) -> list[Request]:
        """Returns a greedy request per prompt; its id is the index of the prompt."""
        return [
            greedy_request(answer.prompt, max_tokens, id=str(index), **params)
            for index, answer in enumerate(self.answers)
        ]

    def check(self, completions: Completions) -> None:
        """Raises AssertionError if completions of `greedy_requests` differ from the expected results."""
        for index, answer in enumerate(self.answers):
            answer.check(completions[str(index)].tokens, completions[str(index)].logits)


def make_oracle(case: CheckpointCase, directory: Path, device: torch.device | str = "cpu") -> Oracle:
    """Saves a checkpoint and returns it with its expected results.

    Tries seeds until the greedy output has no near ties (MIN_LOGIT_GAP) and no loops (MIN_DISTINCT_TOKENS); the first
    seed nearly always qualifies.
    """
    for seed in range(10):
        weights_seed = seed + zlib.crc32(case.name.encode())
        model = nn.Module.to(make_model(case, weights_seed), device)
        answers = [generate_answer(model, prompt) for prompt in _prompts(model.config.vocab_size, seed)]
        if all(_is_conclusive(a) for a in answers):
            save_checkpoint(model, case, directory)
            return Oracle(case, directory, answers, weights_seed)
    raise AssertionError(f"{case}: no seed gives greedy output without ties and loops")


def _prompts(vocab_size: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length).tolist() for length in PROMPT_LENGTHS]


def _is_conclusive(answer: OracleAnswer) -> bool:
    top_two = np.sort(answer.logits, axis=-1)[:, -2:]
    return bool(np.diff(top_two).min() > MIN_LOGIT_GAP) and len(set(answer.tokens)) >= MIN_DISTINCT_TOKENS


@torch.inference_mode()
def generate_answer(model: PreTrainedModel, prompt: list[int], forced: Sequence[int] = ()) -> OracleAnswer:
    """Returns the tokens and logits of greedy decoding, or the `forced` tokens and their logits."""
    _reset_rotary_embedding(model)
    cache = DynamicCache(config=model.config)
    tokens: list[int] = []
    step_logits = []
    input_ids = prompt
    while len(tokens) < NEW_TOKENS:
        # Positional arguments, because the cache's keyword changed in transformers 5.24.
        logits = model(torch.tensor([input_ids], device=model.device), None, None, cache, use_cache=True).logits[0]
        step_logits.append(logits.float().cpu().numpy())
        input_ids = [forced[len(tokens)] if forced else int(logits[-1].argmax())]
        tokens += input_ids
    return OracleAnswer(prompt, tokens, step_logits[0], np.stack([logits[-1] for logits in step_logits]))


def _reset_rotary_embedding(model: PreTrainedModel) -> None:
    """Resets dynamic rope, which in transformers remembers the longest sequence, even from other prompts."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(model.device)
