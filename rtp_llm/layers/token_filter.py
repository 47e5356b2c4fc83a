"""Sampling with top-k, top-p and min-p without sorting the vocabulary.

All three keep a prefix of the tokens sorted by descending probability, then by id. top-k keeps the first k. Of these,
top-p (Holtzman et al. 2019, arXiv 1904.09751) keeps the tokens whose predecessors have less than the fraction p of the
probability. Of these, min-p (Nguyen et al. 2024, arXiv 2407.01082) keeps the tokens with at least the fraction min-p of
the highest probability. The first token is always kept. The sampled token is the first at which the cumulative
probability of the kept tokens exceeds their total times the row's random number in [0, 1).

The weight of a token is exp((logit - highest logit) / temperature) in float64, so probabilities compare as in a sort in
float64. No weight depends on another row.
"""

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtp_llm.kernels.sampling import FAILED, token_weights, top_tokens

NUM_CANDIDATES = 256  # tokens of a row that are sorted; a peaked distribution keeps fewer
NUM_BINS = 4096  # of a flat row, so that one bin holds a few hundred of 150,000 tokens
# Tokens that are more temperatures than this below the highest share the last bin. A million of them weigh less than
# the rounding of a sum in float64.
BIN_RANGE = 50.0
# Bounds the relative error of a sum of weights in float32. That of a weight exp(-x) is below 2e-7 * (1 + x), and the
# weighted mean of x is at most the logarithm of the number of tokens, about 13.
ROUGH_ERROR = 1e-5

# `number`: the random number of the row, in [0, 1). The others are those of the request.
FILTER_PARAMS = np.dtype([("temperature", "f8"), ("top_k", "i8"), ("top_p", "f8"), ("min_p", "f8"), ("number", "f8")])


def sample_filtered(logits: Tensor, params: NDArray[np.void]) -> Tensor:
    """Samples a token per row after top-k, top-p and min-p. Returns token ids [R] int64; -1 (FAILED) for a row whose
    highest logit is NaN or infinite.

    logits: [R, vocab_size] float32. params: [R], a structured array (FILTER_PARAMS) with the fields temperature (above
    0), top_k, top_p, min_p, and number, the row's random number in [0, 1).
    """
    values, ids, masses = top_tokens(logits, min(NUM_CANDIDATES, logits.shape[-1]), params["temperature"])
    tokens = np.full(len(ids), FAILED)
    for row in np.isfinite(values[:, 0]).nonzero()[0].tolist():
        unsorted = _UnsortedTokens(logits[row], float(params[row]["temperature"]), float(masses[row]))
        index = _sample_candidates(values[row], params[row], unsorted)
        tokens[row] = _sample_unsorted(params[row], unsorted) if index is None else ids[row, index]
    return torch.from_numpy(tokens).to(logits.device)


def _sample_candidates(values: NDArray[np.float32], params: np.void, unsorted: "_UnsortedTokens") -> int | None:
    """Returns the index of the sampled candidate, or None if the row keeps tokens that may not be candidates.

    values: the highest logits of the row, [num_candidates], descending.
    """
    num_candidates, vocab_size = len(values), unsorted.vocab_size
    weights = np.exp((values.astype(np.float64) - values[0]) / params["temperature"])
    ends = weights.cumsum()
    # A token of weight 0 cannot be sampled, so it does not matter whether it is kept.
    num_kept = min(int((weights > 0).sum()), int((weights >= params["min_p"]).sum()))
    top_k = int(params["top_k"]) or vocab_size
    if top_k <= num_candidates:
        num_kept = min(num_kept, top_k)
    if params["top_p"] < 1:
        if num_candidates < top_k < vocab_size:
            return None  # the mass of these k tokens is unknown
        num_kept = min(num_kept, _count_top_p(ends, params["top_p"], top_k, unsorted))
    num_certain = num_candidates if num_candidates == vocab_size else int((values > values[-1]).sum())
    if num_kept > num_certain:
        return None
    num_kept = max(num_kept, 1)
    return min(int(ends.searchsorted(params["number"] * ends[num_kept - 1], "right")), num_kept - 1)


def _count_top_p(ends: NDArray[np.float64], top_p: float, top_k: int, unsorted: "_UnsortedTokens") -> int:
    """Returns how many candidates top-p keeps. ends: [num_candidates], the weight of all up to each of them."""
    starts = np.append(0.0, ends[:-1])
    if top_k <= len(ends):
        return int(starts.searchsorted(top_p * ends[top_k - 1]))
    rough = unsorted.rough_mass
    fewest, most = (int(starts.searchsorted(top_p * rough * factor)) for factor in (1 - ROUGH_ERROR, 1 + ROUGH_ERROR))
    return most if fewest == most else int(starts.searchsorted(top_p * unsorted.mass(unsorted.end)))


def _sample_unsorted(params: np.void, tokens: "_UnsortedTokens") -> int:
    """Returns the token of a row that keeps many tokens, or equal ones."""
    end = tokens.end
    if 0 < params["top_k"] < tokens.vocab_size:
        end = tokens.end_of_count(int(params["top_k"]))
    if params["top_p"] < 1:
        end = min(end, tokens.end_of_mass(float(params["top_p"]) * tokens.mass(end)))
    if params["min_p"] > 0:
        end = min(end, tokens.end_of_weight(min(float(params["min_p"]), 1.0)))
    return tokens.token_at(float(params["number"]) * tokens.mass(max(end, (0, 1))))


_End = tuple[int, int]  # of a prefix: all bins before this one, and so many tokens of this one


class _UnsortedTokens:
    """The tokens of one row in descending order, of which only the bins that are looked at are sorted.

    A bin is a range of logits; bin 0 holds the highest. rough_mass: see `top_tokens`.
    """

    end: _End = (NUM_BINS, 0)

    def __init__(self, logits: Tensor, temperature: float, rough_mass: float):
        self._logits, self._temperature, self.rough_mass = logits, temperature, rough_mass
        self.vocab_size = len(logits)

    def mass(self, end: _End) -> float:
        """Returns the total weight (unnormalized probability) of the most probable tokens, up to `end` (bin, n)."""
        if end == self.end:
            return float(self._weights.sum())
        bin, count = end
        return float(self._sorted_bin(bin)[1][count - 1]) if count else self._mass_before(bin)

    def end_of_count(self, count: int) -> _End:
        """Returns where the `count` most probable tokens end (top-k). This end (bin, n) includes all bins (ranges of
        logits) before this one, which have higher logits, and the n most probable tokens of this one.
        """
        ends = self._bins.bincount(minlength=NUM_BINS).cumsum(0).cpu().numpy()
        bin = int(ends.searchsorted(count))
        return bin, count - int(ends[bin - 1] if bin else 0)

    def end_of_mass(self, mass: float) -> _End:
        """Returns where the most probable tokens reach a total weight (unnormalized probability) of `mass` (top-p), as
        an end (bin, n) like `end_of_count`; includes the token that reaches it.
        """
        bin = int(self._mass_ends.searchsorted(mass))
        if bin == NUM_BINS:
            return self.end
        starts = np.append(self._mass_before(bin), self._sorted_bin(bin)[1][:-1])
        return bin, int((starts < mass).sum())

    def end_of_weight(self, weight: float) -> _End:
        """Returns where the tokens, in descending order, fall below `weight` (min-p), as an end (bin, n) like
        `end_of_count`. `weight`: at most 1, the weight (unnormalized probability) of the first token.
        """
        bins = self._bins[self._weights >= weight]
        bin = int(bins.max())
        return bin, int((bins == bin).sum())

    def token_at(self, mass: float) -> int:
        """Returns the first token, in descending order, at which the sum of the weights exceeds `mass`: the sampled
        token.
        """
        # Rounding can make `mass` the weight of all tokens: the last bin that adds to it is the last one to look at.
        bin = min(int(self._mass_ends.searchsorted(mass, "right")), int(self._mass_ends.argmax()))
        ids, ends = self._sorted_bin(bin)
        return int(ids[min(int(ends.searchsorted(mass, "right")), len(ids) - 1)])

    @cached_property
    def _weights(self) -> Tensor:
        return token_weights(self._logits, self._temperature)

    @cached_property
    def _bins(self) -> Tensor:
        """The bin of each token, [vocab_size] int32. Rounding keeps the order of the logits."""
        highest = self._logits.max()
        spread = float(highest - self._logits.min())  # inf if a token is forbidden
        width = max(min(spread, BIN_RANGE * self._temperature) / NUM_BINS, 1e-30)
        return (highest - self._logits).div_(width).clamp_(max=NUM_BINS - 1).int()

    @cached_property
    def _mass_ends(self) -> NDArray[np.float64]:
        """The weight of all tokens up to the end of each bin."""
        ends: NDArray[np.float64] = self._bins.bincount(self._weights, NUM_BINS).cumsum(0).cpu().numpy()
        return ends

    def _mass_before(self, bin: int) -> float:
        return float(self._mass_ends[bin - 1]) if bin else 0.0

    def _sorted_bin(self, bin: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Returns the token ids of a bin in order, and the weight of all tokens up to and including each of them."""
        ids = (self._bins == bin).cpu().numpy().nonzero()[0]
        ids = ids[np.argsort(-self._logits[ids].cpu().numpy(), kind="stable")]
        return ids, self._mass_before(bin) + self._weights[ids].cumsum(0).cpu().numpy()
