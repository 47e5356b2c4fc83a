"""Exports the serving metrics again under vLLM's names (vLLM 0.33), so that vLLM dashboards work unchanged."""

from collections.abc import Iterable
from copy import copy

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

PREFIX, VLLM_PREFIX = "rtp_llm_", "vllm:"
# {name: vLLM's name} of the metrics that vLLM has too, without prefixes. All names are equal but one: vLLM's histogram
# of tokens per step ends in `_total`.
VLLM_NAMES = {
    name: name
    for name in (
        *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
        *("prompt_tokens", "prompt_tokens_cached", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"),
        *("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
        *("num_preemptions", "request_success", "admission_rejections", "corrupted_requests", "cache_config_info"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        *("request_time_per_output_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
        *("request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens"),
        *("request_generation_tokens", "request_params_max_tokens", "request_params_n"),
        *("estimated_flops_per_gpu", "estimated_read_bytes_per_gpu", "estimated_write_bytes_per_gpu"),
    )
} | {"iteration_tokens": "iteration_tokens_total"}
ENGINE_LABEL = {"engine": "0"}  # vLLM's index of the data-parallel engine


class VllmMetricAliases(Collector):
    """Prometheus collector that exports the metrics of the registry's other collectors under vLLM's names.

    Its `collect` reads these metrics with `registry.collect`, which calls this collector's `collect` a second time; the
    inner call yields nothing.
    """

    def __init__(self, registry: CollectorRegistry):
        self._registry, self._is_collecting = registry, False

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        if self._is_collecting:
            return
        self._is_collecting = True
        try:
            families = list(self._registry.collect())
        finally:
            self._is_collecting = False
        for family in families:
            name = VLLM_NAMES.get(family.name.removeprefix(PREFIX))
            if name:
                yield _with_name(family, VLLM_PREFIX + name)


def _with_name(family: Metric, name: str) -> Metric:
    alias = copy(family)
    alias.name = name
    alias.samples = [
        s._replace(name=name + s.name.removeprefix(family.name), labels=s.labels | ENGINE_LABEL) for s in family.samples
    ]
    return alias
