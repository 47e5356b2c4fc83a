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
CHECKED_STEPS = 64  # after as many, the estimate is compared with one from these steps alone


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

    So the filter can settle on a wrong explanation, say that rows cost nothing and all steps the same. Every
    CHECKED_STEPS steps, a second filter learns from these steps alone. It replaces the first one if it explains them
    clearly better.
    """

    def __init__(self) -> None:
        self._logs = np.log(FIRST_GUESS)
        self._covariance = FIRST_COVARIANCE.copy()
        self.per_unit = StepWork(*FIRST_GUESS)  # seconds
        self.is_known = False  # a step has been measured
        self._unchecked: list[tuple[StepWork, float]] = []  # steps since the last comparison, seconds

    def seconds(self, work: StepWork) -> float:
        """Returns the expected duration of a step in seconds."""
        return sum(self._parts(work))

    def record(self, work: StepWork, seconds: float) -> None:
        """Updates the costs with the measured duration of a step."""
        if seconds <= 0:
            return
        self._update(work, seconds)
        self._unchecked.append((work, seconds))
        if len(self._unchecked) == CHECKED_STEPS:
            self._check(self._unchecked)
            self._unchecked = []

    def _update(self, work: StepWork, seconds: float) -> None:
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

    def _check(self, steps: list[tuple[StepWork, float]]) -> None:
        """Starts anew from these steps if that explains them clearly better."""
        error = self._mean_error(steps)
        if error <= NOISE:
            return
        other = StepCost()
        for work, seconds in steps:
            other._update(work, seconds)
        if other._mean_error(steps) < error / 2:
            self._logs, self._covariance, self.per_unit = other._logs, other._covariance, other.per_unit

    def _mean_error(self, steps: list[tuple[StepWork, float]]) -> float:
        """Returns the mean size of the error of the logarithm; one above 1 counts as 1, as a hiccup may cause it."""
        return sum(min(1, abs(math.log(seconds / self.seconds(work)))) for work, seconds in steps) / len(steps)

    def _parts(self, work: StepWork) -> StepWork:
        """Returns the seconds that each kind of work adds to a step; 0 for work that other work hides."""
        parts = StepWork(*(cost * amount for cost, amount in zip(self.per_unit, work, strict=True)))
        if parts.steps >= parts.logit_rows + parts.other_rows:
            return parts._replace(logit_rows=0, other_rows=0)
        return parts._replace(steps=0)
