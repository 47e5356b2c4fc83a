"""Writes the Grafana dashboard from the table below:

    python image/grafana/make_dashboard.py > image/grafana/dashboards/rtp-llm.json

Each panel has a title, a unit, and queries with their legends. tests/monitoring checks that the file is current, that
each query parses, and that each of its metrics is in a live scrape.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 8, 7  # a third of Grafana's 24 columns
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """One panel. `queries`: pairs of PromQL and legend. `kind`: Grafana's panel type."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"


def quantiles(title: str, histogram: str) -> Panel:
    def query(quantile: float) -> str:
        return f"histogram_quantile({quantile}, sum by (le) (rate({metric(histogram + '_bucket', SERVED)}{RATE})))"

    return Panel(title, "s", tuple((query(quantile), f"p{quantile * 100:g}") for quantile in (0.5, 0.95, 0.99)))


def ratio(numerator: str, denominator: str, legend: str) -> tuple[str, str]:
    return f"{per_second(numerator, SERVED)} / {per_second(denominator, SERVED)}", legend


def mean(histogram: str, legend: str) -> tuple[str, str]:
    return ratio(f"{histogram}_sum", f"{histogram}_count", legend)


SERVED = 'model_name=~"$model"'
PARTS = 'instance=~"$instance"'
PROGRAM_LEGEND = "{{instance}} {{program}}"


def metric(name: str, *conditions: str) -> str:
    return f"rtp_llm_{name}{{{', '.join(conditions)}}}"


def since(timestamp: str) -> str:
    return f"time() - {metric(timestamp, PARTS)}"


def per_second(name: str, *conditions: str, by: str = "") -> str:
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric(name, *conditions)}{RATE}))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Service": (
        Panel("Ready", "bool_yes_no", ((metric("ready", PARTS), "{{instance}}"),), "stat"),
        Panel("State", "none", ((f"{metric('state', PARTS)} == 1", "{{instance}}: {{state}}"),), "stat"),
        Panel(
            "Sequences",
            "short",
            (
                (metric("num_requests_running", SERVED), "running"),
                (metric("num_requests_waiting_by_reason", SERVED), "waiting: {{reason}}"),
            ),
        ),
        Panel(
            "Tokens per second",
            "short",
            (
                (per_second("prompt_tokens_total", SERVED), "prompt"),
                (per_second("generation_tokens_total", SERVED), "generated"),
            ),
        ),
        Panel(
            "Finished per second",
            "reqps",
            ((per_second("request_success_total", SERVED, by="finished_reason"), "{{finished_reason}}"),),
        ),
        Panel(
            "Rejected, resumed and corrupted per second",
            "reqps",
            (
                (per_second("admission_rejections_total", SERVED), "rejected with 429"),
                (per_second("requests_resumed_total", SERVED), "resumed after a rank loss"),
                (per_second("corrupted_requests_total", SERVED), "NaN logits"),
            ),
        ),
        Panel("HTTP responses per second", "reqps", ((per_second("http_requests_total", by="status"), "{{status}}"),)),
    ),
    "Latency": (
        quantiles("Time to first token", "time_to_first_token_seconds"),
        quantiles("Inter-token latency", "inter_token_latency_seconds"),
        quantiles("End-to-end request latency", "e2e_request_latency_seconds"),
        Panel(
            "Request time by phase (mean)",
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
        Panel("KV cache in use", "percentunit", ((metric("kv_cache_usage_perc", SERVED), "{{model_name}}"),)),
        Panel(
            "Prefix cache hits",
            "percentunit",
            (ratio("prefix_cache_hits_total", "prefix_cache_queries_total", "of the tokens looked up"),),
        ),
        Panel("Preemptions per second", "short", ((per_second("num_preemptions_total", SERVED), "preemptions"),)),
        quantiles("Step", "step_seconds"),
        Panel("Tokens per step (mean)", "short", (mean("iteration_tokens", "tokens"),)),
        Panel(
            "Work of each GPU per second (estimated)",
            "short",
            (
                (per_second("estimated_flops_per_gpu_total", SERVED), "floating-point operations"),
                (per_second("estimated_read_bytes_per_gpu_total", SERVED), "bytes read"),
            ),
        ),
    ),
    "Gang": (
        Panel("Ranks", "bool_on_off", ((metric("gang_member_up", PARTS), "rank {{world_rank}}"),), "stat"),
        Panel("Time since the last heartbeat", "s", ((metric("gang_heartbeat_age_seconds", PARTS), "rank {{rank}}"),)),
        Panel("Time since the last step", "s", ((since("last_step_timestamp_seconds"), "rank {{rank}}"),)),
        Panel("Lag before the all-reduce", "s", ((metric("rank_lag_seconds", PARTS), "rank {{rank}}"),)),
        Panel(
            "Startup time by phase", "s", ((metric("startup_seconds", PARTS), "rank {{rank}}: {{phase}}"),), "bargauge"
        ),
        Panel(
            "Memory of the ranks",
            "bytes",
            (
                (metric("weight_memory_bytes", PARTS), "weights, rank {{rank}}"),
                (metric("kv_cache_memory_bytes", PARTS), "KV cache, rank {{rank}}"),
            ),
        ),
    ),
    "GPUs": (
        Panel("Utilisation", "percentunit", ((metric("gpu_utilization_ratio", PARTS), "{{instance}} GPU {{gpu}}"),)),
        Panel("Memory in use", "bytes", ((metric("gpu_memory_used_bytes", PARTS), "{{instance}} GPU {{gpu}}"),)),
        Panel("Power", "watt", ((metric("gpu_power_watts", PARTS), "{{instance}} GPU {{gpu}}"),)),
        Panel("Temperature", "celsius", ((metric("gpu_temperature_celsius", PARTS), "{{instance}} GPU {{gpu}}"),)),
        Panel(
            "NVLink bytes per second",
            "Bps",
            (
                (
                    per_second("gpu_nvlink_bytes_total", PARTS, by="instance, gpu, direction"),
                    "GPU {{gpu}} {{direction}}",
                ),
            ),
        ),
        Panel(
            "Faults",
            "short",
            (
                (metric("gpu_xid_errors_total", PARTS), "GPU {{gpu}} Xid {{xid}}"),
                (metric("gpu_ecc_uncorrected_total", PARTS), "GPU {{gpu}} ECC"),
                (f"{metric('gpu_clock_event', PARTS)} == 1", "GPU {{gpu}} {{reason}}"),
                (f"{metric('gpu_up', PARTS)} == 0", "GPU {{gpu}} is lost"),
            ),
        ),
    ),
    "Machine, supervisor, doctor": (
        Panel(
            "Resident memory", "bytes", ((metric("process_resident_memory_bytes", PARTS), "{{instance}} {{program}}"),)
        ),
        Panel(
            "Cores in use",
            "short",
            ((per_second("process_cpu_seconds_total", PARTS, by="instance, program"), PROGRAM_LEGEND),),
        ),
        Panel(
            "Memory of the container",
            "bytes",
            (
                (metric("cgroup_memory_usage_bytes", PARTS), "{{instance}}"),
                (metric("cgroup_memory_limit_bytes", PARTS), "{{instance}} limit"),
            ),
        ),
        Panel("Free in /dev/shm", "bytes", ((metric("shm_free_bytes", PARTS), "{{instance}}"),)),
        Panel(
            "Restarts",
            "short",
            ((f"sum by (program, reason) ({metric('process_restarts_total', PARTS)})", "{{program}}: {{reason}}"),),
        ),
        Panel(
            "Doctor findings",
            "short",
            ((f"{metric('doctor_check_status', PARTS)} > 0", "{{instance}} {{check}}"),),
            "bargauge",
        ),
    ),
}


def panels() -> Iterator[dict[str, Any]]:
    top = number = 0
    for row, members in ROWS.items():
        number += 1
        yield {"id": number, "type": "row", "title": row, "collapsed": False, "gridPos": _grid_position(0, top, 24, 1)}
        top += 1
        for i, panel in enumerate(members):
            number += 1
            yield _panel(number, panel, _grid_position(i % 3 * WIDTH, top + i // 3 * HEIGHT, WIDTH, HEIGHT))
        top += -(-len(members) // 3) * HEIGHT


def _grid_position(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _panel(number: int, panel: Panel, grid_position: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(65 + i), "expr": query, "legendFormat": legend, "datasource": SOURCE}
        for i, (query, legend) in enumerate(panel.queries)
    ]
    return {
        **{"id": number, "type": panel.kind, "title": panel.title, "gridPos": grid_position, "datasource": SOURCE},
        **{"targets": targets, "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []}},
    }


def dashboard() -> dict[str, Any]:
    def variable(name: str, label: str, source_metric: str) -> dict[str, Any]:
        return {
            **{"name": name, "label": label, "type": "query", "datasource": SOURCE, "refresh": 2},
            **{
                "query": f"label_values({source_metric}, {'model_name' if name == 'model' else name})",
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
