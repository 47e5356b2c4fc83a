"""Estimates how long the next step will take, from the durations of past steps."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rtp_llm.engine.scheduler_output import ScheduledChunk

# Seconds of a step with a 0.5B model on two CPU cores. Only their ratios matter: the first step sets the scale.
FIRST_GUESS = (0.02, 1.4e-3, 1e-3, 2.5e-7, 2.5e-7)
FIRST_COVARIANCE = np.eye(5)  # of the logarithms: each ratio may be wrong by a factor of 3
NOISE = 0.1  # standard deviation of the logarithm of a duration
DRIFT = 5e-4  # fraction by which a step moves the covariance back to its initial value, so that costs can always change
_DRIFTED = DRIFT * FIRST_COVARIANCE
MAX_DEVIATIONS = 2.0  # of the expected error that count, so that a hiccup of the machine changes little


class StepWork(NamedTuple):
    """The amounts of work from which the duration of a step is predicted. A row is a token of the step.

    steps: 1, the fixed cost of a step: reading the weights, starting kernels. Weights are read while rows are computed,
        so a step takes the longer of the two.
    logit_rows: tokens that have logits: decodes, ends of prompts, prompt tokens with logprobs.
    other_rows: tokens without logits.
    decode_keys: tokens that decodes attend to, summed over the decodes.
    prompt_keys: tokens that prompt tokens attend to, summed over the prompt tokens; in its own chunk, a token attends
        to half of the tokens on average.
    """

    steps: float = 1
    logit_rows: float = 0
    other_rows: float = 0
    decode_keys: float = 0
    prompt_keys: float = 0

    @classmethod
    def of(cls, chunks: Sequence[ScheduledChunk]) -> "StepWork":
        """Returns the work of a step that computes these chunks."""
        logit_rows = other_rows = decode_keys = prompt_keys = 0.0
        for chunk in chunks:
            num_logits = min(chunk.num_tokens, chunk.num_sampled + chunk.num_prompt_logprobs)
            logit_rows += num_logits
            other_rows += chunk.num_tokens - num_logits
            keys = chunk.num_tokens * (chunk.start + chunk.num_tokens / 2)
            if chunk.num_tokens == chunk.num_sampled:
                decode_keys += keys
            else:
                prompt_keys += keys
        return cls(1, logit_rows, other_rows, decode_keys, prompt_keys)


IDLE = StepWork(0)


class StepCost:
    """Predicts the duration of steps. Learns the seconds per unit of each kind of work in `StepWork`. The duration of a
    step is the larger of its fixed cost and the cost of its rows (tokens), plus the cost of the keys that these attend
    to.

    An extended Kalman filter estimates the logarithms of the costs (Simon, Optimal State Estimation, 13.2). So costs
    stay positive, and those of GPUs, 100 times smaller, are learned alike. A step does not change the cost of work that
    it does not have, or that other work hides (the smaller of fixed cost and rows).
    """

    def __init__(self) -> None:
        self._logs = np.log(FIRST_GUESS)
        self._covariance = FIRST_COVARIANCE.copy()
        self.per_unit = StepWork(*FIRST_GUESS)  # seconds
        self.is_known = False  # a step has been measured

    def seconds(self, work: StepWork) -> float:
        """Returns the expected duration of a step in seconds."""
        return sum(self._parts(work))

    def record(self, work: StepWork, seconds: float) -> None:
        """Updates the costs with the measured duration of a step."""
        if seconds <= 0:
            return
        parts = self._parts(work)
        expected = sum(parts)
        error = math.log(seconds / expected)
        if self.is_known:
            shares = np.array(parts) / expected  # the derivatives of the logarithm of the duration
            gain = self._covariance @ shares
            variance = float(shares @ gain) + NOISE**2
            limit = MAX_DEVIATIONS * math.sqrt(variance)
            self._logs += gain * (max(-limit, min(error, limit)) / variance)
            self._covariance -= gain[:, None] * (gain / variance)
            self._covariance *= 1 - DRIFT
            self._covariance += _DRIFTED
        else:
            self._logs += error
        self.is_known = True
        self.per_unit = StepWork(*np.exp(self._logs).tolist())

    def _parts(self, work: StepWork) -> StepWork:
        """Returns the seconds that each kind of work adds to a step; 0 for work that other work hides."""
        parts = StepWork(*(cost * amount for cost, amount in zip(self.per_unit, work, strict=True)))
        if parts.steps >= parts.logit_rows + parts.other_rows:
            return parts._replace(logit_rows=0, other_rows=0)
        return parts._replace(steps=0)
