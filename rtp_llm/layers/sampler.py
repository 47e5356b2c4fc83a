"""Chooses tokens from logits on rank 0. Randomness is a function of (seed, position): whoever recomputes a position
after a preemption, a restart or in another batch draws the same number.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from rtp_llm.contract.engine_output import Logprob
from rtp_llm.contract.request import Request
from rtp_llm.contract.sampling_metadata import SampledToken, SamplingMetadata


def sample(logits: Tensor, sampling: SamplingMetadata) -> tuple[list[SampledToken], list[Logprob]]:
    """logits [R, vocab] float32. Returns a token per request, and a record per prompt row."""
    prompt_records = _prompt_logprobs(logits, sampling)
    if not sampling.requests:
        return [], prompt_records
    raw = logits[sampling.rows] if len(sampling.rows) != len(logits) else logits
    tokens = _sample_tokens(_process_logits(raw, sampling.requests), sampling.requests)
    records = _logprobs(raw, tokens, sampling.requests)
    corrupted = raw.isnan().any(-1).tolist()
    return [
        SampledToken(None if bad else token, record)
        for token, record, bad in zip(tokens, records, corrupted, strict=True)
    ], prompt_records


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), the same for the same (seed, position) on every machine."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed & (2**64 - 1), position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) / float(1 << 53)


# Editing logits


def _process_logits(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Penalties, biases and the ban on ending too early; a copy where anything changes."""
    if not any(r.params.needs_logits_processing for r in requests):
        return logits
    edited = logits.clone()
    for row, request in zip(edited, requests, strict=True):
        if request.params.needs_logits_processing:
            _process_row(row, request)
    return edited


def _process_row(row: Tensor, request: Request) -> None:
    params = request.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(request.tokens)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and request.num_output_tokens:
        tokens, counts = torch.tensor(request.output, device=row.device).unique(return_counts=True)
        row[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biases = torch.tensor(list(params.logit_bias.values()), device=row.device, dtype=row.dtype)
        row[torch.tensor(list(params.logit_bias), device=row.device)] += biases
    if request.num_output_tokens < params.min_tokens and params.stop_token_ids:
        row[torch.tensor(params.stop_token_ids, device=row.device)] = -torch.inf


# Choosing


def _sample_tokens(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Three ways, told apart per request and never per batch, so that company changes no token."""
    methods: dict[str, list[int]] = {"greedy": [], "plain": [], "cut": []}
    for index, request in enumerate(requests):
        params = request.params
        cut = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        methods["greedy" if params.is_greedy else "cut" if cut else "plain"].append(index)
    tokens = [0] * len(requests)
    for name, way in (("greedy", _sample_greedy), ("plain", _sample_unfiltered), ("cut", _sample_filtered)):
        rows = methods[name]
        if rows:
            chosen = way(logits if len(rows) == len(logits) else logits[rows], [requests[i] for i in rows])
            for index, token in zip(rows, chosen.tolist(), strict=True):
                tokens[index] = token
    return tokens


def _sample_greedy(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    return logits.argmax(-1)


def _sample_unfiltered(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    return _inverse_cdf(_probabilities(logits, requests), requests)


def _sample_filtered(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """top-k, then top-p (Holtzman et al. 2019, arXiv 1904.09751), then min-p (Nguyen et al. 2024, arXiv 2407.01082)."""
    params = [r.params for r in requests]
    probs, order = _probabilities(logits, requests).sort(dim=-1, descending=True, stable=True)
    place = torch.arange(probs.shape[-1], device=logits.device)
    top_k = _column([p.top_k or probs.shape[-1] for p in params], logits)
    probs = probs.masked_fill(place >= top_k, 0)
    probs = probs / probs.sum(-1, keepdim=True)
    before = probs.cumsum(-1) - probs
    top_p = _column([p.top_p for p in params], logits)
    min_p = _column([p.min_p for p in params], logits)
    keep = ((before < top_p) & (probs >= min_p * probs[:, :1])) | (place == 0)
    picked = _inverse_cdf(probs.masked_fill(~keep, 0), requests)
    return order.gather(-1, picked[:, None])[:, 0]


def _probabilities(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    temperature = _column([r.params.temperature for r in requests], logits)
    return (logits / temperature).softmax(-1)


def _inverse_cdf(weights: Tensor, requests: Sequence[Request]) -> Tensor:
    """Inverse of the cumulative distribution at each request's own uniform number."""
    numbers = _column([uniform(r.params.seed, r.num_tokens) for r in requests], weights).double()
    cumulative = weights.double().cumsum(-1)
    picked = (cumulative <= numbers * cumulative[:, -1:]).sum(-1)
    return picked.clamp(max=weights.shape[-1] - 1)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float64)[:, None]


# Logprobs: of the model's own logits, before any editing


def _logprobs(logits: Tensor, tokens: Sequence[int], requests: Sequence[Request]) -> list[Logprob | None]:
    wanted = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
    records: list[Logprob | None] = [None] * len(requests)
    if wanted:
        tops = [requests[i].params.logprobs or 0 for i in wanted]
        for index, record in zip(wanted, _records(logits[wanted], [tokens[i] for i in wanted], tops), strict=True):
            records[index] = record
    return records


def _prompt_logprobs(logits: Tensor, sampling: SamplingMetadata) -> list[Logprob]:
    if not sampling.prompt_rows:
        return []
    rows, tokens, tops = (list(part) for part in zip(*sampling.prompt_rows, strict=True))
    return _records(logits[rows], tokens, tops)


def _records(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Logprob]:
    table = logits.log_softmax(-1)
    chosen = table.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (table > chosen).sum(-1).tolist()
    values, ids = table.topk(min(max(tops), table.shape[-1]), -1)
    rows = zip(chosen[:, 0].tolist(), ranks, tops, ids.tolist(), values.tolist(), strict=True)
    return [
        (value, rank, list(zip(top_ids[:top], top_values[:top], strict=True)))
        for value, rank, top, top_ids, top_values in rows
    ]
