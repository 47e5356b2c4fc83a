"""The serving metrics once more under vLLM's names (vLLM 0.33), so that dashboards made for it work unchanged."""

from collections.abc import Iterable
from copy import copy

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

OURS, THEIRS = "rtp_llm_", "vllm:"
# What vLLM has too, by our name without prefix; its own where it differs. It calls a histogram `…_total`.
SHARED = {
    name: name
    for name in (
        *("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"),
        *("prompt_tokens", "prompt_tokens_cached", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"),
        *("num_preemptions", "request_success", "admission_rejections", "corrupted_requests", "cache_config_info"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        *("request_time_per_output_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
        *("request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens"),
        *("request_generation_tokens", "request_params_max_tokens", "request_params_n"),
        *("estimated_flops_per_gpu", "estimated_read_bytes_per_gpu", "estimated_write_bytes_per_gpu"),
    )
} | {"iteration_tokens": "iteration_tokens_total"}
ENGINE = {"engine": "0"}  # vLLM counts its data-parallel engines


class VllmMetricAliases(Collector):
    """Renames what the registry's other collectors give. Registered last, and silent while it asks them."""

    def __init__(self, registry: CollectorRegistry):
        self._registry, self._asking = registry, False

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        if self._asking:
            return
        self._asking = True
        try:
            found = list(self._registry.collect())
        finally:
            self._asking = False
        for family in found:
            name = SHARED.get(family.name.removeprefix(OURS))
            if name:
                yield _renamed(family, THEIRS + name)


def _renamed(family: Metric, name: str) -> Metric:
    made = copy(family)
    made.name = name
    made.samples = [
        s._replace(name=name + s.name.removeprefix(family.name), labels=s.labels | ENGINE) for s in family.samples
    ]
    return made
