"""Log-probabilities of tokens, from the logits before any processing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rtp_llm.contract.engine_output import Logprob


def compute_logprobs(logits: Tensor, tokens: Sequence[int], tops: Sequence[int | tuple[int, ...]]) -> list[Logprob]:
    """Returns, for each row i of the logits, (logprob of `tokens[i]`, number of tokens that are more likely, list of
    (token id, logprob) of the `tops[i]` most likely tokens).

    logits: [len(tokens), vocab_size] float32, at least one row; the function allocates a tensor of the same size.
    tops: if an entry is a tuple of token ids instead of a number, the list has these tokens, in this order.
    """
    counts = [top if isinstance(top, int) else 0 for top in tops]
    log_probs = logits.log_softmax(-1)
    token_log_probs = log_probs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (log_probs > token_log_probs).sum(-1).tolist()
    top_values, top_ids = log_probs.topk(min(max(counts), log_probs.shape[-1]), -1)
    rows = zip(token_log_probs[:, 0].tolist(), ranks, counts, top_ids.tolist(), top_values.tolist(), strict=True)
    result = [(value, rank, list(zip(ids[:top], values[:top], strict=True))) for value, rank, top, ids, values in rows]
    for row, top in enumerate(tops):
        if not isinstance(top, int):
            result[row] = (*result[row][:2], list(zip(top, log_probs[row, list(top)].tolist(), strict=True)))
    return result
