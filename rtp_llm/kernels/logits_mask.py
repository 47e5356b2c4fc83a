"""Restricts logits to the tokens that a grammar allows.

In all functions, logits: [R, vocab_size] float32, contiguous; masks: [M, ceil(vocab_size / 8)] uint8, one bit per
token, lowest bit of a byte first; rows: M ascending row numbers, one per mask. Rows without a mask are not restricted.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtp_llm.kernels.sampling import FAILED, argmax_finite
from rtp_llm.native.library import library

Bits = NDArray[np.uint8]


def mask_logits(logits: Tensor, masks: Bits, rows: Sequence[int]) -> None:
    """Sets the logits of forbidden tokens (bit 0 in the mask) to -inf, in place. masks: one for each of `rows`."""
    kernels = library() if logits.is_cpu else None
    if kernels:
        mask_of_row = _mask_of_row(rows, len(logits))
        pointers = (masks.ctypes.data, mask_of_row.ctypes.data)
        kernels.rtp_mask_logits(logits.data_ptr(), *logits.shape, *pointers, torch.get_num_threads())
    elif rows:
        packed = torch.from_numpy(masks).to(logits.device).view(-1).int()
        ceilings = _ceilings_of_byte(logits.device).index_select(0, packed).view(len(rows), -1)[:, : logits.shape[1]]
        # Many times faster than `masked_fill_` on CPUs.
        if len(rows) == len(logits):
            torch.minimum(logits, ceilings, out=logits)
        else:
            logits[rows] = torch.minimum(logits[rows], ceilings)


def argmax_allowed(logits: Tensor, masks: Bits, rows: Sequence[int]) -> Tensor:
    """Returns, for each row of the logits, the allowed token with the highest logit (of equal ones the lowest id), [R]
    int64. masks: one for each of `rows`; in the other rows, all tokens are allowed.

    -1 (FAILED) for a row whose highest logit is NaN or infinite, before masking or after it (-inf: nothing is allowed).
    """
    kernels = library() if logits.is_cpu else None
    if kernels:
        tokens, mask_of_row = torch.empty(len(logits), dtype=torch.int64), _mask_of_row(rows, len(logits))
        pointers = (masks.ctypes.data, mask_of_row.ctypes.data, tokens.data_ptr())
        kernels.rtp_argmax_allowed(
            logits.data_ptr(), logits.stride(0), *logits.shape, *pointers, torch.get_num_threads()
        )
        return tokens
    masked = logits.clone()
    mask_logits(masked, masks, rows)
    return torch.where(logits.amax(-1).isfinite(), argmax_finite(masked), FAILED)


def _mask_of_row(rows: Sequence[int], num_rows: int) -> NDArray[np.int64]:
    """Returns the index of the mask of each row, [num_rows]; -1: none."""
    mask_of_row = np.full(num_rows, -1, np.int64)
    mask_of_row[list(rows)] = np.arange(len(rows))
    return mask_of_row


@cache
def _ceilings_of_byte(device: torch.device) -> Tensor:
    """Returns [256, 8] float32: by byte value, the upper limits of the logits of its 8 tokens (-inf if forbidden)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits, np.float32(np.inf), -np.float32(np.inf))).to(device)
