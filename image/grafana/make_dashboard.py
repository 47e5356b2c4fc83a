"""Prints the Grafana dashboard that the table ROWS in this file describes:

    python image/grafana/make_dashboard.py > image/grafana/dashboards/rtp-llm.json

A panel has a title, a unit, and queries with their legends. tests/monitoring checks that the JSON file is current, that
each query parses, and that each metric exists in a live scrape.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 8, 7  # of a panel, in cells of Grafana's grid, which has 24 columns
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """One panel of the dashboard. `queries`: (PromQL, legend) of each query."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    panel_type: str = "timeseries"


def quantiles(title: str, histogram: str) -> Panel:
    def query(quantile: float) -> str:
        return f"histogram_quantile({quantile}, sum by (le) (rate({metric(histogram + '_bucket', MODEL)}{RATE})))"

    return Panel(title, "s", tuple((query(quantile), f"p{quantile * 100:g}") for quantile in (0.5, 0.95, 0.99)))


def ratio(numerator: str, denominator: str, legend: str) -> tuple[str, str]:
    return f"{per_second(numerator, MODEL)} / {per_second(denominator, MODEL)}", legend


def mean(histogram: str, legend: str) -> tuple[str, str]:
    return ratio(f"{histogram}_sum", f"{histogram}_count", legend)


MODEL = 'model_name=~"$model"'
INSTANCE = 'instance=~"$instance"'
PROGRAM_LEGEND = "{{instance}} {{program}}"
NVLINK_LEGEND = "GPU {{gpu}} {{direction}}"


def metric(name: str, *conditions: str) -> str:
    return f"rtp_llm_{name}{{{', '.join(conditions)}}}"


def since(timestamp: str) -> str:
    return f"time() - {metric(timestamp, INSTANCE)}"


def per_second(name: str, *conditions: str, by: str = "") -> str:
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric(name, *conditions)}{RATE}))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Service": (
        Panel("Ready", "bool_yes_no", ((metric("ready", INSTANCE), "{{instance}}"),), "stat"),
        Panel("State", "none", ((f"{metric('state', INSTANCE)} == 1", "{{instance}}: {{state}}"),), "stat"),
        Panel(
            "Sequences",
            "short",
            (
                (metric("num_requests_running", MODEL), "running"),
                (metric("num_requests_waiting_by_reason", MODEL), "waiting: {{reason}}"),
            ),
        ),
        Panel(
            "Tokens per second",
            "short",
            (
                (per_second("prompt_tokens_total", MODEL), "prompt"),
                (per_second("generation_tokens_total", MODEL), "generated"),
            ),
        ),
        Panel(
            "Finished per second",
            "reqps",
            ((per_second("request_success_total", MODEL, by="finished_reason"), "{{finished_reason}}"),),
        ),
        Panel(
            "Rejected, resumed and failed per second",
            "reqps",
            (
                (per_second("admission_rejections_total", MODEL), "rejected (429)"),
                (per_second("requests_resumed_total", MODEL), "resumed after lost ranks"),
                (per_second("corrupted_requests_total", MODEL), "NaN logits"),
                (per_second("poison_requests_total", MODEL), "poison requests"),
            ),
        ),
        Panel("HTTP responses per second", "reqps", ((per_second("http_requests_total", by="status"), "{{status}}"),)),
    ),
    "Latency": (
        quantiles("Time to first token", "time_to_first_token_seconds"),
        quantiles("Between two tokens", "inter_token_latency_seconds"),
        quantiles("Whole request", "e2e_request_latency_seconds"),
        Panel(
            "Latency by phase (mean)",
            "s",
            (
                mean("request_queue_time_seconds", "queue"),
                mean("request_prefill_time_seconds", "prefill"),
                mean("request_decode_time_seconds", "decode"),
            ),
        ),
        Panel(
            "Tokens per request (mean)",
            "short",
            (mean("request_prompt_tokens", "prompt"), mean("request_generation_tokens", "generated")),
        ),
    ),
    "Scheduler and KV cache": (
        Panel("KV cache in use", "percentunit", ((metric("kv_cache_usage_perc", MODEL), "{{model_name}}"),)),
        Panel(
            "Prefix cache hits",
            "percentunit",
            (ratio("prefix_cache_hits_total", "prefix_cache_queries_total", "of the tokens looked up"),),
        ),
        Panel("Preemptions per second", "short", ((per_second("num_preemptions_total", MODEL), "preemptions"),)),
        quantiles("Step", "step_seconds"),
        Panel("Tokens per step (mean)", "short", (mean("iteration_tokens", "tokens"),)),
        Panel(
            "Operations and bytes of each GPU per second (estimated)",
            "short",
            (
                (per_second("estimated_flops_per_gpu_total", MODEL), "floating-point operations"),
                (per_second("estimated_read_bytes_per_gpu_total", MODEL), "bytes read"),
            ),
        ),
    ),
    "Gang": (
        Panel("Ranks", "bool_on_off", ((metric("gang_member_up", INSTANCE), "rank {{world_rank}}"),), "stat"),
        Panel("Since the last heartbeat", "s", ((metric("gang_heartbeat_age_seconds", INSTANCE), "rank {{rank}}"),)),
        Panel("Since the last step", "s", ((since("last_step_timestamp_seconds"), "rank {{rank}}"),)),
        Panel("Lag before all-reduce", "s", ((metric("rank_lag_seconds", INSTANCE), "rank {{rank}}"),)),
        Panel(
            "Startup by phase", "s", ((metric("startup_seconds", INSTANCE), "rank {{rank}}: {{phase}}"),), "bargauge"
        ),
        Panel(
            "Memory of the ranks",
            "bytes",
            (
                (metric("weight_memory_bytes", INSTANCE), "weights, rank {{rank}}"),
                (metric("kv_cache_memory_bytes", INSTANCE), "KV cache, rank {{rank}}"),
            ),
        ),
    ),
    "GPUs": (
        Panel("Utilisation", "percentunit", ((metric("gpu_utilization_ratio", INSTANCE), "{{instance}} GPU {{gpu}}"),)),
        Panel("Memory in use", "bytes", ((metric("gpu_memory_used_bytes", INSTANCE), "{{instance}} GPU {{gpu}}"),)),
        Panel("Power", "watt", ((metric("gpu_power_watts", INSTANCE), "{{instance}} GPU {{gpu}}"),)),
        Panel("Temperature", "celsius", ((metric("gpu_temperature_celsius", INSTANCE), "{{instance}} GPU {{gpu}}"),)),
        Panel(
            "NVLink bytes per second",
            "Bps",
            ((per_second("gpu_nvlink_bytes_total", INSTANCE, by="instance, gpu, direction"), NVLINK_LEGEND),),
        ),
        Panel(
            "Errors and throttling",
            "short",
            (
                (metric("gpu_xid_errors_total", INSTANCE), "GPU {{gpu}} Xid {{xid}}"),
                (metric("gpu_ecc_uncorrected_total", INSTANCE), "GPU {{gpu}} ECC"),
                (f"{metric('gpu_clock_event', INSTANCE)} == 1", "GPU {{gpu}} {{reason}}"),
                (f"{metric('gpu_up', INSTANCE)} == 0", "GPU {{gpu}} is lost"),
            ),
        ),
    ),
    "Machine, supervisor, doctor": (
        Panel("Resident memory", "bytes", ((metric("process_resident_memory_bytes", INSTANCE), PROGRAM_LEGEND),)),
        Panel(
            "Cores in use",
            "short",
            ((per_second("process_cpu_seconds_total", INSTANCE, by="instance, program"), PROGRAM_LEGEND),),
        ),
        Panel(
            "Memory of the container",
            "bytes",
            (
                (metric("cgroup_memory_usage_bytes", INSTANCE), "{{instance}}"),
                (metric("cgroup_memory_limit_bytes", INSTANCE), "{{instance}} limit"),
            ),
        ),
        Panel("Free in /dev/shm", "bytes", ((metric("shm_free_bytes", INSTANCE), "{{instance}}"),)),
        Panel(
            "Restarts",
            "short",
            ((f"sum by (program, reason) ({metric('process_restarts_total', INSTANCE)})", "{{program}}: {{reason}}"),),
        ),
        Panel(
            "Doctor findings",
            "short",
            ((f"{metric('doctor_check_status', INSTANCE)} > 0", "{{instance}} {{check}}"),),
            "bargauge",
        ),
    ),
}


def panels() -> Iterator[dict[str, Any]]:
    top = number = 0
    for title, row_panels in ROWS.items():
        number += 1
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": _grid_pos(0, top, 24, 1)}
        top += 1
        for i, panel in enumerate(row_panels):
            number += 1
            yield _panel_json(number, panel, _grid_pos(i % 3 * WIDTH, top + i // 3 * HEIGHT, WIDTH, HEIGHT))
        top += -(-len(row_panels) // 3) * HEIGHT


def _grid_pos(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _panel_json(number: int, panel: Panel, grid_pos: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(65 + i), "expr": query, "legendFormat": legend, "datasource": DATASOURCE}
        for i, (query, legend) in enumerate(panel.queries)
    ]
    return {
        **{"id": number, "type": panel.panel_type, "title": panel.title, "gridPos": grid_pos, "datasource": DATASOURCE},
        **{"targets": targets, "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []}},
    }


def dashboard() -> dict[str, Any]:
    def variable(name: str, label: str, metric_name: str) -> dict[str, Any]:
        return {
            **{"name": name, "label": label, "type": "query", "datasource": DATASOURCE, "refresh": 2},
            **{
                "query": f"label_values({metric_name}, {'model_name' if name == 'model' else name})",
                "includeAll": True,
            },
            **{"multi": True, "current": {"text": "All", "value": "$__all"}},
        }

    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    variables = [
        source,
        variable("model", "Model", "rtp_llm_model_info"),
        variable("instance", "Part", "rtp_llm_ready"),
    ]
    return {
        **{"uid": "rtp-llm", "title": "rtp-llm", "tags": ["rtp-llm"], "schemaVersion": 39, "editable": True},
        **{"refresh": "5s", "time": {"from": "now-15m", "to": "now"}, "templating": {"list": variables}},
        "panels": list(panels()),
    }


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=1)
    print()
