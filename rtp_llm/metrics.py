"""Prometheus metrics of requests and of the engine. The API process of each part has one registry of them, and receives
the engine's statistics from rank 0 with each step. `api/part_metrics.py` has the metrics of the gang, processes and
devices, which are read at each scrape.

Names, labels and buckets follow vLLM's: its dashboards work after replacing `vllm:` with `rtp_llm_`.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # no `…_created` series for each counter

LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1),
    *(2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
# vLLM's buckets, and smaller ones: vLLM's first bucket, 10 ms, is too large for fast GPUs.
ITL_BUCKETS = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
ITERATION_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
NUM_SEQUENCES_BUCKETS = (1, 2, 5, 10, 20)


def build_1_2_5_buckets(max_value: int) -> list[int]:
    """Returns 1, 2, 5, 10, 20, 50 … up to `max_value`."""
    buckets = [m * 10**e for e in range(9) for m in (1, 2, 5)]
    return [bucket for bucket in buckets if bucket <= max_value] or [1]


class Metrics:
    """The metrics of one part. All but the HTTP metrics have the label `model_name`."""

    def __init__(self, model_name: str, max_seq_len: int):
        self.registry = CollectorRegistry()
        token_buckets = build_1_2_5_buckets(max_seq_len)
        model_label = {"model_name": model_name}

        def make(kind: Any, name: str, description: str, *labels: str, **options: Any) -> Any:
            names = ["model_name", *labels]
            metric = kind(f"rtp_llm_{name}", description, names, registry=self.registry, **options)
            return _PartialLabels(metric, model_label) if labels else metric.labels(**model_label)

        def histogram(name: str, description: str, buckets: Iterable[float]) -> Any:
            return make(Histogram, name, description, buckets=tuple(buckets))

        counter, gauge = partial(make, Counter), partial(make, Gauge)
        self.running = gauge("num_requests_running", "Sequences in the running batch")
        self.waiting = gauge("num_requests_waiting", "Sequences in the queue")
        self.waiting_by_reason = gauge(
            "num_requests_waiting_by_reason",
            "Waiting sequences. capacity: for a free slot or KV blocks; deferred: for lost ranks to restart",
            "reason",
        )
        self.kv_usage = gauge("kv_cache_usage_perc", "Fraction of the KV blocks in use, 0 to 1")
        self.kv_used_tokens = gauge("kv_cache_used_tokens", "Tokens that the KV blocks in use can hold")
        self.kv_capacity_tokens = gauge("kv_cache_capacity_tokens", "Tokens that all KV blocks can hold")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted sequences")
        self.prompt_tokens_cached = counter("prompt_tokens_cached", "Prompt tokens taken from the prefix cache")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.prefix_queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache")
        self.prefix_hits = counter("prefix_cache_hits", "Tokens found in the prefix cache")
        self.drafts = counter("spec_decode_num_drafts", "Times that a step verified draft tokens of a sequence")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Draft tokens verified, such as a grammar's")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Draft tokens accepted")
        self.preemptions = counter("num_preemptions", "Sequences returned to the queue because the KV cache was full")
        self.success = counter("request_success", "Finished sequences", "finished_reason")
        self.rejections = counter("admission_rejections", "Requests rejected with 429", "reason")
        self.ignored_fields = counter("ignored_request_fields", "Fields of requests that had no effect", "field")
        self.corrupted = counter("corrupted_requests", "Sequences failed because the model's logits were NaN")
        self.convicted = counter("poison_requests", "Requests failed because the engine crashes when it computes them")
        self.resumed = counter("requests_resumed", "Sequences resumed after ranks were lost")
        self.ttft = histogram("time_to_first_token_seconds", "Time from acceptance to the first token", TTFT_BUCKETS)
        self.itl = histogram("inter_token_latency_seconds", "Time between two tokens of a sequence", ITL_BUCKETS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token of a request, without the first token",
            ITL_BUCKETS,
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Time from acceptance to the last token", LATENCY_BUCKETS)
        self.queue_time = histogram("request_queue_time_seconds", "Time in the queue", LATENCY_BUCKETS)
        self.prefill_time = histogram(
            "request_prefill_time_seconds", "Time from the queue to the first token", LATENCY_BUCKETS
        )
        self.decode_time = histogram(
            "request_decode_time_seconds", "Time from the first to the last token", LATENCY_BUCKETS
        )
        self.inference_time = histogram(
            "request_inference_time_seconds", "Time from the queue to the last token", LATENCY_BUCKETS
        )
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens per sequence", token_buckets)
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Tokens generated per sequence", token_buckets
        )
        self.params_max_tokens = histogram("request_params_max_tokens", "max_tokens per request", token_buckets)
        self.params_n = histogram("request_params_n", "Sequences per request", NUM_SEQUENCES_BUCKETS)
        self.iteration_tokens = histogram("iteration_tokens", "Tokens per step", ITERATION_TOKENS_BUCKETS)
        self.step_seconds = histogram("step_seconds", "Duration of a step", ITL_BUCKETS)
        self.flops = counter(
            "estimated_flops_per_gpu", "Floating-point operations of matrix products and attention, per rank"
        )
        self.read_bytes = counter("estimated_read_bytes_per_gpu", "Bytes of weights and KV cache read, per rank")
        self.write_bytes = counter("estimated_write_bytes_per_gpu", "Bytes of KV cache written, per rank")
        self.cache_config = gauge(
            "cache_config_info",
            "1; the labels are the KV cache's settings",
            "block_size",
            "num_gpu_blocks",
            "enable_prefix_caching",
        )
        self.info = gauge("model_info", "1; the labels describe the model", "family", "dtype", "tp_size")
        self.build_info = gauge("build_info", "1; the label is the version", "version")
        self.http_requests = Counter(
            "rtp_llm_http_requests", "HTTP responses", ["method", "handler", "status"], registry=self.registry
        )
        self.http_seconds = Histogram(
            "rtp_llm_http_request_duration_seconds",
            "Duration of HTTP requests",
            ["method", "handler"],
            registry=self.registry,
        )
        self.http_active = Gauge("rtp_llm_http_requests_active", "HTTP requests in progress", registry=self.registry)
        # Start the series at 0: Prometheus' increase() misses the first event of a series that starts at 1.
        for reason in ("stop", "length", "abort", "error"):
            self.success.labels(finished_reason=reason)
        self.rejections.labels(reason="max_num_queued_reqs")
        self._epoch_totals: dict[str, float] = {}

    def record_step(self, stats: Mapping[str, Any], block_size: int, num_blocks: int) -> None:
        """Records the statistics that rank 0 sends with each step. `block_size`: tokens per KV block; `num_blocks`: KV
        blocks in the cache.

        Totals in `stats` restart at 0 when the ranks form a new communicator (an epoch); the exported counters add up
        over all epochs.
        """
        self.running.set(stats["running"])
        self.waiting.set(stats["waiting"])
        self.waiting_by_reason.labels(reason="capacity").set(stats["waiting"])
        self.kv_usage.set(stats["kv_used"] / num_blocks)
        self.kv_used_tokens.set(stats["kv_used"] * block_size)
        for name, metric in (
            ("preemptions", self.preemptions),
            ("prefix_queries", self.prefix_queries),
            ("prefix_hits", self.prefix_hits),
            ("drafts", self.drafts),
            ("draft_tokens", self.draft_tokens),
            ("accepted_tokens", self.accepted_tokens),
            ("flops", self.flops),
            ("read_bytes", self.read_bytes),
            ("write_bytes", self.write_bytes),
        ):
            metric.inc(max(0, stats[name] - self._epoch_totals.get(name, 0)))
            self._epoch_totals[name] = stats[name]
        if stats["step_tokens"]:
            self.iteration_tokens.observe(stats["step_tokens"])
            self.step_seconds.observe(stats["step_seconds"])

    def start_epoch(self, block_size: int, num_blocks: int, prefix_caching: bool) -> None:
        """Prepares for the statistics of a new communicator of the ranks (an epoch): their totals start at 0 again, but
        the exported counters go on. Also sets the metrics of the KV cache, which has `num_blocks` blocks of
        `block_size` tokens.
        """
        self._epoch_totals.clear()
        self.kv_capacity_tokens.set(block_size * num_blocks)
        self.cache_config.clear()
        self.cache_config.labels(
            block_size=str(block_size), num_gpu_blocks=str(num_blocks), enable_prefix_caching=str(prefix_caching)
        ).set(1)

    def reset_engine_gauges(self) -> None:
        """Sets to 0 the gauges that describe a running engine, since the engine is lost."""
        for gauge in (self.running, self.waiting, self.kv_usage, self.kv_used_tokens):
            gauge.set(0)
        self.waiting_by_reason.labels(reason="capacity").set(0)

    def set_deferred_function(self, count: Callable[[], int]) -> None:
        """Sets the function that returns how many sequences wait until lost ranks have restarted. Each scrape calls it,
        for the waiting sequences with `reason="deferred"`.
        """
        self.waiting_by_reason.labels(reason="deferred").set_function(count)


class _PartialLabels:
    """A metric whose label `model_name` is set: `.labels(…)` takes the other labels."""

    def __init__(self, metric: Any, model_label: dict[str, str]):
        self._metric, self._model_label = metric, model_label

    def labels(self, **labels: str) -> Any:
        return self._metric.labels(**self._model_label, **labels)

    def clear(self) -> None:
        self._metric.clear()
