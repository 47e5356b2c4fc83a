"""What Prometheus reads of the serving of requests. The API process owns the one registry of its part; ranks send plain
numbers. What is read at scrape time, of gang, processes and devices, stands in `api/part_metrics.py`.

Stems, labels and buckets follow vLLM's, so that its dashboards port by replacing `vllm:` with `rtp_llm_`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside every counter, which nobody reads

LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1),
    *(2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
# vLLM's edges and finer ones below them: its first bucket, 10 ms, hides every fast GPU.
ITL = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
NUM_SEQUENCES = (1, 2, 5, 10, 20)


def one_two_five(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 … up to `limit`."""
    edges = [m * 10**e for e in range(9) for m in (1, 2, 5)]
    return [edge for edge in edges if edge <= limit] or [1]


class Metrics:
    """The metrics of one part. `model_name` labels all that concern serving."""

    def __init__(self, model_name: str, max_seq_len: int):
        self.registry = CollectorRegistry()
        tokens = one_two_five(max_seq_len)
        label = {"model_name": model_name}

        def counter(name: str, text: str, *labels: str) -> Any:
            made = Counter(f"rtp_llm_{name}", text, ["model_name", *labels], registry=self.registry)
            return _bound(made, label, labels)

        def gauge(name: str, text: str, *labels: str) -> Any:
            made = Gauge(f"rtp_llm_{name}", text, ["model_name", *labels], registry=self.registry)
            return _bound(made, label, labels)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Any:
            made = Histogram(f"rtp_llm_{name}", text, ["model_name"], buckets=tuple(buckets), registry=self.registry)
            return made.labels(**label)

        self.running = gauge("num_requests_running", "Sequences in the running batch")
        self.waiting = gauge("num_requests_waiting", "Sequences that wait for a place in the batch")
        self.waiting_by_reason = gauge(
            "num_requests_waiting_by_reason", "capacity: for a place or KV blocks; deferred: for lost ranks", "reason"
        )
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1")
        self.kv_used_tokens = gauge("kv_cache_used_tokens", "Tokens that the KV blocks in use can hold")
        self.kv_capacity_tokens = gauge("kv_cache_capacity_tokens", "Tokens that all KV blocks can hold")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted sequences")
        self.prompt_tokens_cached = counter("prompt_tokens_cached", "Prompt tokens that came from the prefix cache")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.prefix_queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache")
        self.prefix_hits = counter("prefix_cache_hits", "Tokens found in the prefix cache")
        self.preemptions = counter("num_preemptions", "Sequences sent back to the queue for want of KV blocks")
        self.success = counter("request_success", "Finished sequences", "finished_reason")
        self.rejections = counter("admission_rejections", "Requests answered 429", "reason")
        self.corrupted = counter("corrupted_requests", "Sequences ended because the model's logits were not numbers")
        self.resumed = counter("requests_resumed", "Sequences continued after ranks were lost")
        self.ttft = histogram("time_to_first_token_seconds", "From acceptance to the first token", TTFT)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a sequence", ITL)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean over a request, without the first token", ITL
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From acceptance to the last token", LATENCY)
        self.queue_time = histogram("request_queue_time_seconds", "In the queue", LATENCY)
        self.prefill_time = histogram("request_prefill_time_seconds", "From the queue to the first token", LATENCY)
        self.decode_time = histogram("request_decode_time_seconds", "From the first to the last token", LATENCY)
        self.inference_time = histogram("request_inference_time_seconds", "From the queue to the last token", LATENCY)
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens per sequence", tokens)
        self.request_generation_tokens = histogram("request_generation_tokens", "Tokens generated per sequence", tokens)
        self.params_max_tokens = histogram("request_params_max_tokens", "max_tokens per request", tokens)
        self.params_n = histogram("request_params_n", "Sequences per request", NUM_SEQUENCES)
        self.iteration_tokens = histogram("iteration_tokens", "Tokens per step", ITERATION_TOKENS)
        self.step_seconds = histogram("step_seconds", "Duration of a step", ITL)
        self.flops = counter("estimated_flops_per_gpu", "Floating-point operations of matrices and attention, per rank")
        self.read_bytes = counter("estimated_read_bytes_per_gpu", "Weights and KV cache read, per rank")
        self.write_bytes = counter("estimated_write_bytes_per_gpu", "KV cache written, per rank")
        self.cache_config = gauge(
            "cache_config_info", "1; how the KV cache is made", "block_size", "num_gpu_blocks", "enable_prefix_caching"
        )
        self.info = gauge("model_info", "1; the labels say what is served", "family", "dtype", "tp_size")
        self.build_info = gauge("build_info", "1; the label says which version", "version")
        self.http_requests = Counter(
            "rtp_llm_http_requests", "HTTP answers", ["method", "handler", "status"], registry=self.registry
        )
        self.http_seconds = Histogram(
            "rtp_llm_http_request_duration_seconds", "HTTP requests", ["method", "handler"], registry=self.registry
        )
        self.http_active = Gauge("rtp_llm_http_requests_active", "HTTP requests being answered", registry=self.registry)
        # A series that begins at 1 has no increase for Prometheus: those of the usual labels begin at 0.
        for reason in ("stop", "length", "abort", "error"):
            self.success.labels(finished_reason=reason)
        self.rejections.labels(reason="max_num_queued_reqs")
        self._totals: dict[str, float] = {}

    def step(self, stats: Mapping[str, Any], block_size: int, num_blocks: int) -> None:
        """Takes the numbers that rank 0 sends with each frame. Its totals start anew with each epoch, ours go on."""
        self.running.set(stats["running"])
        self.waiting.set(stats["waiting"])
        self.waiting_by_reason.labels(reason="capacity").set(stats["waiting"])
        self.kv_usage.set(stats["kv_used"] / num_blocks)
        self.kv_used_tokens.set(stats["kv_used"] * block_size)
        for name, metric in (
            ("preemptions", self.preemptions),
            ("prefix_queries", self.prefix_queries),
            ("prefix_hits", self.prefix_hits),
            ("flops", self.flops),
            ("read_bytes", self.read_bytes),
            ("write_bytes", self.write_bytes),
        ):
            metric.inc(max(0, stats[name] - self._totals.get(name, 0)))
            self._totals[name] = stats[name]
        if stats["step_tokens"]:
            self.iteration_tokens.observe(stats["step_tokens"])
            self.step_seconds.observe(stats["step_seconds"])

    def new_epoch(self, block_size: int, num_blocks: int, prefix_caching: bool) -> None:
        """Rank 0 counts from zero again, perhaps with another cache."""
        self._totals.clear()
        self.kv_capacity_tokens.set(block_size * num_blocks)
        self.cache_config.clear()
        self.cache_config.labels(
            block_size=str(block_size), num_gpu_blocks=str(num_blocks), enable_prefix_caching=str(prefix_caching)
        ).set(1)

    def reset_engine_gauges(self) -> None:
        """Nothing runs while there is no engine."""
        for gauge in (self.running, self.waiting, self.kv_usage, self.kv_used_tokens):
            gauge.set(0)
        self.waiting_by_reason.labels(reason="capacity").set(0)

    def watch_deferred(self, count: Callable[[], int]) -> None:
        """`count`: accepted sequences that wait for ranks to return, asked at each scrape."""
        self.waiting_by_reason.labels(reason="deferred").set_function(count)


def _bound(metric: Any, label: dict[str, str], further: tuple[str, ...]) -> Any:
    """The child for this model; metrics with further labels are completed where they are used."""
    return _PartialLabels(metric, label) if further else metric.labels(**label)


class _PartialLabels:
    """A metric whose model name is settled: `.labels(reason=…)` gives the child."""

    def __init__(self, metric: Any, label: dict[str, str]):
        self._metric, self._label = metric, label

    def labels(self, **labels: str) -> Any:
        return self._metric.labels(**self._label, **labels)

    def clear(self) -> None:
        self._metric.clear()
