"""Samples tokens from logits on rank 0.

Random numbers are a function of (seed, position), so a position that is recomputed after a preemption or a restart, or
in another batch, draws the same number.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from rtp_llm.contract.engine_output import Logprob
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledToken, SamplingMetadata


def sample(logits: Tensor, sampling_metadata: SamplingMetadata) -> tuple[list[SampledToken], list[Logprob]]:
    """Returns a token per request, and a logprob per entry of `prompt_logits_rows`.

    logits: [R, vocab_size] float32, see SamplingMetadata.
    """
    prompt_logprobs = _prompt_logprobs(logits, sampling_metadata)
    requests, rows = sampling_metadata.requests, sampling_metadata.logits_rows
    if not requests:
        return [], prompt_logprobs
    request_logits = logits[rows] if len(rows) != len(logits) else logits
    tokens = _sample_tokens(_process_logits(request_logits, requests), requests)
    logprobs = _sampled_logprobs(request_logits, tokens, requests)
    nan_flags = request_logits.isnan().any(-1).tolist()
    return [
        SampledToken(None if has_nan else token, logprob)
        for token, logprob, has_nan in zip(tokens, logprobs, nan_flags, strict=True)
    ], prompt_logprobs


def uniform(seed: int, position: int) -> float:
    """Returns a number in [0, 1) that depends on seed and position only, not on the machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed & (2**64 - 1), position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) / float(1 << 53)


# Logits processing


def _process_logits(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Applies penalties, biases and min_tokens. Returns a copy if any row changes.

    logits: [len(requests), vocab_size].
    """
    if not any(r.params.needs_logits_processing for r in requests):
        return logits
    processed = logits.clone()
    for row, request in zip(processed, requests, strict=True):
        if request.params.needs_logits_processing:
            _process_row(row, request)
    return processed


def _process_row(row: Tensor, request: Request) -> None:
    """Changes the logits [vocab_size] of one request in place."""
    params = request.params
    if params.repetition_penalty != 1:
        token_ids = torch.tensor(sorted(set(request.tokens)), device=row.device)
        values = row[token_ids]
        penalty = params.repetition_penalty
        row[token_ids] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.presence_penalty or params.frequency_penalty) and request.num_output_tokens:
        tokens, counts = torch.tensor(request.output, device=row.device).unique(return_counts=True)
        row[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biases = torch.tensor(list(params.logit_bias.values()), device=row.device, dtype=row.dtype)
        row[torch.tensor(list(params.logit_bias), device=row.device)] += biases
    if request.num_output_tokens < params.min_tokens and params.stop_token_ids:
        row[torch.tensor(params.stop_token_ids, device=row.device)] = -torch.inf


# Sampling


def _sample_tokens(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Samples greedily, from all tokens, or from filtered tokens. Returns a token per request.

    logits: [len(requests), vocab_size]. The method depends on the request only, so results do not depend on the batch.
    """
    methods: dict[str, list[int]] = {"greedy": [], "unfiltered": [], "filtered": []}
    for index, request in enumerate(requests):
        params = request.params
        is_filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        methods["greedy" if params.is_greedy else "filtered" if is_filtered else "unfiltered"].append(index)
    tokens = [0] * len(requests)
    for name, method in (
        ("greedy", _sample_greedy),
        ("unfiltered", _sample_unfiltered),
        ("filtered", _sample_filtered),
    ):
        rows = methods[name]
        if rows:
            sampled = method(logits if len(rows) == len(logits) else logits[rows], [requests[i] for i in rows])
            for index, token in zip(rows, sampled.tolist(), strict=True):
                tokens[index] = token
    return tokens


def _sample_greedy(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    return logits.argmax(-1)


def _sample_unfiltered(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    return _inverse_cdf(_probabilities(logits, requests), requests)


def _sample_filtered(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Applies top-k, then top-p (Holtzman et al. 2019, arXiv 1904.09751), then min-p (Nguyen et al. 2024, arXiv
    2407.01082). Returns token ids [len(requests)].
    """
    params = [r.params for r in requests]
    probs, order = _probabilities(logits, requests).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(probs.shape[-1], device=logits.device)
    top_k = _column([p.top_k or probs.shape[-1] for p in params], logits)
    probs = probs.masked_fill(ranks >= top_k, 0)
    probs = probs / probs.sum(-1, keepdim=True)
    cumulative_before = probs.cumsum(-1) - probs
    top_p = _column([p.top_p for p in params], logits)
    min_p = _column([p.min_p for p in params], logits)
    keep = ((cumulative_before < top_p) & (probs >= min_p * probs[:, :1])) | (ranks == 0)
    sampled = _inverse_cdf(probs.masked_fill(~keep, 0), requests)
    return order.gather(-1, sampled[:, None])[:, 0]


def _probabilities(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Returns softmax(logits / temperature), [len(requests), vocab_size] float64."""
    temperature = _column([r.params.temperature for r in requests], logits)
    return (logits / temperature).softmax(-1)


def _inverse_cdf(weights: Tensor, requests: Sequence[Request]) -> Tensor:
    """Samples one column index per row by inverse transform sampling.

    Row i uses the random number of `requests[i]`.
    weights: [len(requests), vocab_size], probabilities that need not add up to 1. Returns [len(requests)].
    """
    numbers = _column([uniform(r.params.seed, r.num_tokens) for r in requests], weights).double()
    cumulative = weights.double().cumsum(-1)
    indices = (cumulative <= numbers * cumulative[:, -1:]).sum(-1)
    return indices.clamp(max=weights.shape[-1] - 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Returns the values as a tensor [len(values), 1] float64 on the device of `like`."""
    return torch.tensor(values, device=like.device, dtype=torch.float64)[:, None]


# Logprobs, computed from the logits before processing


def _sampled_logprobs(logits: Tensor, tokens: Sequence[int], requests: Sequence[Request]) -> list[Logprob | None]:
    """Returns a logprob per request, or None for requests without logprobs."""
    rows = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
    logprobs: list[Logprob | None] = [None] * len(requests)
    if rows:
        tops = [requests[i].params.logprobs or 0 for i in rows]
        for index, logprob in zip(rows, _make_logprobs(logits[rows], [tokens[i] for i in rows], tops), strict=True):
            logprobs[index] = logprob
    return logprobs


def _prompt_logprobs(logits: Tensor, sampling_metadata: SamplingMetadata) -> list[Logprob]:
    if not sampling_metadata.prompt_logits_rows:
        return []
    rows, tokens, tops = (list(column) for column in zip(*sampling_metadata.prompt_logits_rows, strict=True))
    return _make_logprobs(logits[rows], tokens, tops)


def _make_logprobs(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Logprob]:
    """Returns the logprobs of `tokens[i]` and of the `tops[i]` most likely tokens for each row i of the logits.

    logits: [num_rows, vocab_size].
    """
    log_probs = logits.log_softmax(-1)
    token_log_probs = log_probs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (log_probs > token_log_probs).sum(-1).tolist()
    top_values, top_ids = log_probs.topk(min(max(tops), log_probs.shape[-1]), -1)
    rows = zip(token_log_probs[:, 0].tolist(), ranks, tops, top_ids.tolist(), top_values.tolist(), strict=True)
    return [(value, rank, list(zip(ids[:top], values[:top], strict=True))) for value, rank, top, ids, values in rows]
