"""Tests every alert rule with promtool: when it fires, with which labels, and that no other alert fires."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.monitoring.promtool import REPOSITORY, promtool

RULES = REPOSITORY / "image" / "prometheus" / "alerts.yml"
PART = 'job="rtp-llm", instance="part0:10000"'
MODEL = f'{PART}, model_name="m"'
HEALTHY = {
    f"up{{{PART}}}": "1x80",
    f"rtp_llm_ready{{{PART}}}": "1x80",
    f'rtp_llm_gang_member_up{{{PART}, world_rank="1"}}': "1x80",
    f'rtp_llm_last_step_timestamp_seconds{{{PART}, rank="0"}}': "0+30x80",
    f'rtp_llm_process_restarts_total{{{PART}, program="rank1", reason="signal"}}': "0x80",
    f'rtp_llm_doctor_check_status{{{PART}, check="S-01"}}': "0x80",
    f"rtp_llm_num_requests_running{{{MODEL}}}": "4x80",
    f"rtp_llm_num_requests_waiting{{{MODEL}}}": "1x80",
    f'rtp_llm_admission_rejections_total{{{MODEL}, reason="max_num_queued_reqs"}}': "0x80",
    f'rtp_llm_time_to_first_token_seconds_bucket{{{MODEL}, le="10"}}': "0+10x80",
    f'rtp_llm_time_to_first_token_seconds_bucket{{{MODEL}, le="20"}}': "0+10x80",
    f'rtp_llm_time_to_first_token_seconds_bucket{{{MODEL}, le="+Inf"}}': "0+10x80",
    f'rtp_llm_inter_token_latency_seconds_bucket{{{MODEL}, le="0.5"}}': "0+100x80",
    f'rtp_llm_inter_token_latency_seconds_bucket{{{MODEL}, le="0.75"}}': "0+100x80",
    f'rtp_llm_inter_token_latency_seconds_bucket{{{MODEL}, le="+Inf"}}': "0+100x80",
    f"rtp_llm_kv_cache_usage_perc{{{MODEL}}}": "0.97x80",
    f"rtp_llm_num_preemptions_total{{{MODEL}}}": "3x80",
    f'rtp_llm_request_success_total{{{MODEL}, finished_reason="stop"}}': "0+10x80",
    f'rtp_llm_request_success_total{{{MODEL}, finished_reason="error"}}': "0x80",
    f"rtp_llm_corrupted_requests_total{{{MODEL}}}": "0x80",
    f"rtp_llm_shm_size_bytes{{{PART}}}": "2000x80",
    f"rtp_llm_shm_free_bytes{{{PART}}}": "1900x80",
    f"rtp_llm_cgroup_oom_kills_total{{{PART}}}": "2x80",
    f'rtp_llm_gpu_up{{{PART}, gpu="0"}}': "1x80",
    f"rtp_llm_gpu_read_timestamp_seconds{{{PART}}}": "0+30x80",
    f'rtp_llm_gpu_ecc_uncorrected_total{{{PART}, gpu="0"}}': "0x80",
    f'rtp_llm_gpu_remap_failure{{{PART}, gpu="0"}}': "0x80",
    f'rtp_llm_gpu_clock_event{{{PART}, gpu="0", reason="power brake"}}': "0x80",
}
INTERVAL_SECONDS = 30
EVAL_TIME = "35m"


class AlertCase(NamedTuple):
    """Series that differ from those of a healthy gang (None: the series is removed), and the alert that then fires,
    with its labels."""

    alert: str
    changes: dict[str, str | None]
    severity: str
    labels: str = PART
    at: str = EVAL_TIME


def series(name: str) -> str:
    """Returns the series of the healthy gang whose name starts with `name`."""
    [match] = [key for key in HEALTHY if key.startswith(name)]
    return match


def case_for(
    alert: str, name: str, values: str | None, severity: str, labels: str = PART, at: str = EVAL_TIME
) -> AlertCase:
    return AlertCase(alert, {series(name): values}, severity, labels, at)


CASES = [
    AlertCase("RtpLlmAbsent", dict.fromkeys(HEALTHY), "critical", 'job="rtp-llm"'),
    case_for("RtpLlmScrapeFailed", "up{", "1x10 0x70", "critical"),
    case_for("RtpLlmNotReady", "rtp_llm_ready", "1x10 0x70", "critical"),
    case_for("RtpLlmGangMemberDown", "rtp_llm_gang_member_up", "1x10 0x70", "critical", f'{PART}, world_rank="1"'),
    case_for("RtpLlmHang", "rtp_llm_last_step", "0+30x60 1800x20", "critical", ""),
    case_for(
        "RtpLlmRestarts",
        "rtp_llm_process_restarts_total",
        "0x50 1x5 3x25",
        "warning",
        'instance="part0:10000", program="rank1"',
    ),
    case_for("RtpLlmDoctor", "rtp_llm_doctor_check_status", "2x80", "warning", f'{PART}, check="S-01"'),
    case_for("RtpLlmQueue", "rtp_llm_num_requests_waiting", "9x80", "warning", MODEL),
    case_for(
        "RtpLlmRejections",
        "rtp_llm_admission_rejections_total",
        "0x40 0+2x40",
        "warning",
        f'{MODEL}, reason="max_num_queued_reqs"',
    ),
    AlertCase(
        "RtpLlmSlowFirstToken",
        {series("rtp_llm_time_to_first_token_seconds_bucket{" + MODEL + ', le="10"}'): "0+9x80"},
        "warning",
        'model_name="m"',
    ),
    AlertCase(
        "RtpLlmSlowTokens",
        {series("rtp_llm_inter_token_latency_seconds_bucket{" + MODEL + ', le="0.5"}'): "0+90x80"},
        "warning",
        'model_name="m"',
    ),
    case_for("RtpLlmCacheFull", "rtp_llm_num_preemptions_total", "3+1x80", "warning", MODEL),
    AlertCase(
        "RtpLlmErrors",
        {series("rtp_llm_request_success_total{" + MODEL + ', finished_reason="error"}'): "0x40 0+1x40"},
        "critical",
        'model_name="m"',
    ),
    case_for("RtpLlmCorrupted", "rtp_llm_corrupted", "0x60 1x20", "critical", MODEL),
    case_for("RtpLlmSharedMemoryLow", "rtp_llm_shm_free", "1900x40 100x40", "warning"),
    case_for("RtpLlmOutOfMemory", "rtp_llm_cgroup_oom", "2x60 3x20", "critical"),
    case_for("RtpLlmGpuLost", "rtp_llm_gpu_up", "1x60 0x20", "critical", f'{PART}, gpu="0"'),
    case_for("RtpLlmGpuSilent", "rtp_llm_gpu_read", "0+30x60 1800x20", "warning"),
    AlertCase(  # the first Xid: its series did not exist before
        "RtpLlmGpuXid",
        {f'rtp_llm_gpu_xid_errors_total{{{PART}, gpu="0", xid="79"}}': "_x60 1x20"},
        "critical",
        f'{PART}, gpu="0", xid="79"',
    ),
    AlertCase(
        "RtpLlmGpuXid",
        {f'rtp_llm_gpu_xid_errors_total{{{PART}, gpu="0", xid="79"}}': "1x60 2x20"},
        "critical",
        f'{PART}, gpu="0", xid="79"',
    ),
    case_for("RtpLlmGpuMemory", "rtp_llm_gpu_ecc", "0x60 1x20", "critical", f'{PART}, gpu="0"'),
    case_for("RtpLlmGpuMemory", "rtp_llm_gpu_remap_failure", "0x60 1x20", "critical", f'{PART}, gpu="0"'),
    case_for("RtpLlmGpuSlow", "rtp_llm_gpu_clock", "0x40 1x40", "warning", f'{PART}, gpu="0", reason="power brake"'),
]


def assert_alerts(directory: Path, changes: dict[str, str | None], firing: list[str], at: str) -> None:
    """Asserts that exactly the alerts `firing` fire at the time `at`. The error has promtool's output."""
    values = HEALTHY | changes
    test = {
        "interval": f"{INTERVAL_SECONDS}s",
        "input_series": [{"series": name, "values": v} for name, v in values.items() if v is not None],
        "promql_expr_test": [
            {
                "expr": 'ALERTS{alertstate="firing"}',
                "eval_time": at,
                "exp_samples": [{"labels": labels, "value": 1} for labels in firing],
            }
        ],
    }
    # JSON is valid YAML. The rules are copied to the same directory, so that a container can read both.
    (directory / "alerts.yml").write_text(RULES.read_text())
    (directory / "test.yml").write_text(json.dumps({"rule_files": ["alerts.yml"], "tests": [test]}))
    result = promtool("test", "rules", "test.yml", directory=directory)
    assert result.returncode == 0, result.stdout + result.stderr


def alert_series(case: AlertCase) -> str:
    labels = f", {case.labels}" if case.labels else ""
    return f'ALERTS{{alertname="{case.alert}", alertstate="firing", severity="{case.severity}"{labels}}}'


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_no_alert_fires_for_a_healthy_gang(tmp_path: Path) -> None:
    assert_alerts(tmp_path, {}, [], EVAL_TIME)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_only_the_expected_alert_fires(case: AlertCase, tmp_path: Path) -> None:
    assert_alerts(tmp_path, case.changes, [alert_series(case)], case.at)


def test_every_rule_has_a_case_and_annotations() -> None:
    assert {rule["alert"] for rule in rules()} == {case.alert for case in CASES}
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_configuration_is_valid() -> None:
    result = promtool("check", "config", "prometheus.yml", directory=RULES.parent)
    assert result.returncode == 0, result.stdout + result.stderr
