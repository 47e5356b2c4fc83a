"""The summary of a run: throughput, latencies and goodput, computed from its records."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from rtp_llm.bench.record import Record


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of times, in seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        if not values:
            return cls(0.0, 0.0, 0.0)
        return cls(*(float(value) for value in np.percentile(values, (50, 90, 99))))


@dataclass(frozen=True)
class Slo:
    """Service level objective, in seconds: time to the first token, and mean time per further token of a request."""

    ttft: float
    itl: float

    def is_met(self, record: Record) -> bool:
        further = record.output_tokens - 1
        return record.ttft <= self.ttft and record.e2e - record.ttft <= self.itl * further


@dataclass(frozen=True)
class Summary:
    """Results of one run.

    output_rate       output tokens per second, from the first request to the last token
    input_rate        prompt tokens divided by the time to the first token, median over the requests; the speed of
                      prefill if requests run one at a time
    decode_rate       tokens per second of one request after its first token, median over the requests
    ttft, e2e         time to the first and to the last token, per request
    itl               time between two events of a response, over all requests
    tokens_per_event  1 if every token arrives in its own event; only then is ITL a time per token
    goodput           requests per second that met the SLO
    seconds           length of the run
    """

    requests: int
    errors: int
    seconds: float
    output_rate: float
    input_rate: float
    decode_rate: float
    ttft: Percentiles
    itl: Percentiles
    e2e: Percentiles
    tokens_per_event: float
    goodput: float

    @classmethod
    def of(cls, records: Sequence[Record], slo: Slo) -> "Summary":
        """Returns the summary of a run. Failed requests are counted, but otherwise ignored."""
        done = [record for record in records if not record.error]
        start = min((record.start for record in records), default=0.0)
        seconds = max((record.events[-1] for record in done), default=start) - start
        output_tokens, num_events = sum(r.output_tokens for r in done), sum(len(r.events) for r in done)

        def rate(total: float) -> float:
            return total / seconds if seconds else 0.0

        decode_rates = [(r.output_tokens - 1) / (r.e2e - r.ttft) for r in done if r.e2e > r.ttft]
        return cls(
            requests=len(records),
            errors=len(records) - len(done),
            seconds=seconds,
            output_rate=rate(output_tokens),
            input_rate=median([r.input_tokens / r.ttft for r in done] or [0.0]),
            decode_rate=median(decode_rates or [0.0]),
            ttft=Percentiles.of([r.ttft for r in done]),
            itl=Percentiles.of([gap for r in done for gap in r.gaps]),
            e2e=Percentiles.of([r.e2e for r in done]),
            tokens_per_event=output_tokens / num_events if num_events else 0.0,
            goodput=rate(sum(slo.is_met(r) for r in done)),
        )
