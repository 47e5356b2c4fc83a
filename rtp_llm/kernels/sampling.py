"""Kernels that sample tokens from rows of logits [R, vocab_size] float32.

The kernels of `rtp_llm.native` distribute the rows over threads. Without them, torch computes the same.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtp_llm.native.library import Library, library

FAILED = -1  # the token of a row that cannot be sampled: its highest logit is NaN or infinite

Doubles = NDArray[np.float64]


def _kernels_for(logits: Tensor) -> Library | None:
    """Returns the kernels that read these logits, None if torch does."""
    return library() if logits.is_cpu and logits.stride(1) == 1 and logits.dtype == torch.float32 else None


def argmax_finite(logits: Tensor) -> Tensor:
    """Returns the token with the highest logit of each row (of equal ones the lowest id), [R] int64; -1 (FAILED) for a
    row if that logit is NaN or infinite.
    """
    kernels = _kernels_for(logits)
    if kernels is None:
        highest, tokens = logits.max(-1)
        return torch.where(highest.isfinite(), tokens, FAILED)
    tokens = torch.empty(len(logits), dtype=torch.int64)
    kernels.rtp_argmax_finite(
        logits.data_ptr(), logits.stride(0), *logits.shape, tokens.data_ptr(), torch.get_num_threads()
    )
    return tokens


def top_tokens(
    logits: Tensor, count: int, temperatures: Doubles
) -> tuple[NDArray[np.float32], NDArray[np.int64], Doubles]:
    """Returns the highest logits of each row and their token ids, both [R, count], and an approximate mass of each row,
    [R].

    Sorted by descending logit, then by id. If more tokens than fit have the same lowest logit, it is undefined which of
    them are returned. The mass is the sum of exp((logit - highest logit) / temperature), with a relative error below
    `token_filter.ROUGH_ERROR`. If the highest logit is NaN or infinite, the first returned one is too, and the rest is
    undefined. temperatures: [R].
    """
    kernels = _kernels_for(logits)
    if kernels is None:
        values, ids = _sorted_top(logits, count)
        divisors = torch.from_numpy(temperatures).to(logits)[:, None]
        masses = (logits - logits.amax(-1, keepdim=True)).div_(divisors).exp_().sum(-1, dtype=torch.float64)
        return values.cpu().numpy(), ids.cpu().numpy(), masses.cpu().numpy()
    highest = np.empty((len(logits), count), np.float32)
    tokens, mass = np.empty(highest.shape, np.int64), np.empty(len(logits))
    kernels.rtp_top_tokens(
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        count,
        np.ascontiguousarray(temperatures).ctypes.data,
        highest.ctypes.data,
        tokens.ctypes.data,
        mass.ctypes.data,
        torch.get_num_threads(),
    )
    return highest, tokens, mass


def _sorted_top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, ids = logits.topk(count, -1)
    ids, by_id = ids.sort(-1)
    values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, by_value)


def sample_by_id(logits: Tensor, temperatures: Doubles, numbers: Doubles) -> Tensor:
    """Samples one token per row by inverse transform sampling over all tokens in order of their ids.

    Returns [R] int64: for each row the first token at which the running sum of the weights exceeds the row's random
    number times their total; -1 (FAILED) if the highest logit is NaN or infinite. A weight is exp((logit - highest
    logit) / temperature) in float64. temperatures: [R]. numbers: [R], the random numbers, in [0, 1).
    """
    kernels = _kernels_for(logits)
    if kernels is None:
        rows = zip(logits, temperatures.tolist(), numbers.tolist(), strict=True)
        return torch.stack([_sample_row_by_id(*row) for row in rows])
    tokens = torch.empty(len(logits), dtype=torch.int64)
    temperatures, numbers = np.ascontiguousarray(temperatures), np.ascontiguousarray(numbers)
    kernels.rtp_sample_by_id(
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        temperatures.ctypes.data,
        numbers.ctypes.data,
        tokens.data_ptr(),
        torch.get_num_threads(),
    )
    return tokens


def _sample_row_by_id(logits: Tensor, temperature: float, number: float) -> Tensor:
    ends = token_weights(logits, temperature).cumsum(0)  # NaN if the highest logit is not finite
    token = torch.searchsorted(ends, ends[-1] * number, right=True).clamp(max=len(logits) - 1)
    return torch.where(ends[-1].isfinite(), token, FAILED)


def token_weights(logits: Tensor, temperature: float) -> Tensor:
    """Returns exp((logit - highest logit) / temperature), [vocab_size] float64. logits: [vocab_size] float32."""
    return logits.double().sub_(logits.max()).div_(temperature).exp_()
